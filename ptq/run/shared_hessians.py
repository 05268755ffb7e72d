"""Many methods from one calibration pass: Hessians of the unquantized model, collected once and kept on disk.

The loop calibrates each layer on the output of the quantized layers before it, so its Hessians serve one method only.
Here every layer sees what the unquantized layers before it give.  That is one pass for any number of methods and formats,
and leaves out that later layers may make up for the errors of earlier ones: docs/evaluation.md says how much that is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq.calibrate.collect import Sums
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.importance import TokenImportance
from ptq.core.packing import Quantized
from ptq.run.loop import Calibration, Shards, SumsOf, quantize_layers
from ptq.run.plan import Pass, make_plan
from ptq.run.recipe import Recipe, Rules
from ptq.run.record import Record
from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.hooks import observe_inputs


@torch.no_grad()
def store_hessians(
    adapter: Adapter,
    batches: Sequence[Tensor],
    importances: Mapping[str, TokenImportance | None],
    folder: Path,
    progress: Callable[[str], object] = lambda layer: None,
) -> None:
    """One pass of `batches`, token ids (n, length) each: writes H (d_in, d_in) float32 of every group of linears under every
    importance of tokens (None: all the same) to `folder`, a file a layer.

    One layer's Hessians are in memory at a time.  Raises ValueError that names the group where an activation is not finite.
    """
    hidden = [adapter.embed(tokens) for tokens in batches]
    for layer in adapter.layers():
        firsts: dict[nn.Module, str] = {
            layer.linear(group[0]): layer.full_name(group[0]) for group in adapter.plan(layer).groups
        }
        sums = {
            (importance, name): Hessian(linear.in_features, device=hidden[0].device)  # type: ignore[arg-type]
            for linear, name in firsts.items()
            for importance in importances
        }
        for i, states in enumerate(hidden):

            def observe(linear: nn.Module, x: Tensor, _tokens: Tensor | None, i: int = i) -> None:
                for importance, weights in importances.items():
                    sums[importance, firsts[linear]].add(x, None if weights is None else weights[firsts[linear]][i])  # noqa: B023

            output = observe_inputs(firsts, observe, None, lambda: adapter.forward(layer, states))  # noqa: B023
            assert output is not None
            hidden[i] = output
        tensors = {f"{importance} {name}": mean(hessian, name) for (importance, name), hessian in sums.items()}
        tokens = sum(len(states) * states.shape[1] for states in hidden)
        save_file(tensors, folder / f"{layer.name}.safetensors", metadata={"tokens": str(tokens)})
        progress(layer.name)


def mean(hessian: Hessian, name: str) -> Tensor:
    try:
        return hessian.mean().cpu()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def stored_sums(folder: Path, importance: str) -> SumsOf:
    """An option of the loop: its sums are what `store_hessians` left in `folder`."""

    def read(layer: Layer, _plan: LayerPlan, groups: Pass, _shards: Shards) -> list[Sums]:
        device = next(layer.module.parameters()).device
        found = []
        with safe_open(folder / f"{layer.name}.safetensors", framework="pt") as stored:
            for group in groups:
                hessian = Hessian(group.matrices[0].d_in, device=device)
                hessian.sum.copy_(stored.get_tensor(f"{importance} {layer.full_name(group.names[0])}"))
                hessian.weight += 1
                hessian.tokens = int(stored.metadata()["tokens"])
                found.append(Sums(hessian))
        return found

    return read


def quantize_from(
    adapter: Adapter, folder: Path, importance: str, recipe: Recipe | Rules
) -> Iterator[tuple[Record, Quantized]]:
    """As `quantize_model`, by the Hessians in `folder`.  Raises ValueError for drift, of which they know nothing."""
    plan = make_plan(adapter, recipe)
    for done in quantize_layers(adapter, plan, Calibration(), sums_of=stored_sums(folder, importance)):
        yield from ((record, done.quantized[record.name]) for record in done.records)
