"""Many methods from one calibration pass: Hessians of the unquantized model, collected once and kept on disk.

`quantize_model` calibrates each layer on the output of the quantized layers before it, so its Hessians serve one method only.
Here every layer sees what the unquantized layers before it give.  That is one pass for any number of methods and formats, and
leaves out that later layers may make up for the errors of earlier ones: docs/evaluation.md says how much that is.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ptq.calibrate.hessian import Hessian
from ptq.calibrate.hooks import observe_outputs
from ptq.core.formats import choose_tensor_scale
from ptq.core.packing import Quantized
from ptq.methods import METHODS
from ptq.run.config import QuantConfig
from ptq.runtime.adapter import Adapter

Importances = Mapping[str, Sequence[Tensor]]
"""By the full name of a stage's first linear: for each batch, what its tokens count for (n, length)."""
Layer = tuple[str, nn.Module]


@torch.no_grad()
def store_hessians(
    adapter: Adapter,
    batches: Sequence[Tensor],
    importances: Mapping[str, Importances | None],
    folder: Path,
    progress: Callable[[list[Layer]], Iterable[Layer]] = list,
) -> None:
    """One pass of `batches`, token ids (n, length) each: writes H (d_in, d_in) float32 of every stage under every importance (None:
    every token counts the same) to `folder`, a file a layer.

    One layer's Hessians are in memory at a time.  Raises ValueError that names the stage where an activation is not finite.
    """
    hidden = [adapter.embed(tokens) for tokens in batches]
    for prefix, layer in progress(list(adapter.layers())):
        first = {layer.get_submodule(stage[0]): f"{prefix}.{stage[0]}" for stage in adapter.stages}
        sums = {
            (importance, name): Hessian(int(linear.in_features), device=hidden[0].device)  # type: ignore[arg-type]
            for linear, name in first.items()
            for importance in importances
        }
        for i, x in enumerate(hidden):

            def observe(linear: nn.Module, x: Tensor, _y: Tensor, i: int = i) -> None:
                for importance, weights in importances.items():
                    sums[importance, first[linear]].add(x, None if weights is None else weights[first[linear]][i])  # noqa: B023

            with observe_outputs(first, observe):
                hidden[i] = adapter.forward(layer, x)
        tensors = {f"{importance} {name}": mean(hessian, name) for (importance, name), hessian in sums.items()}
        save_file(tensors, folder / f"{prefix}.safetensors")


def mean(hessian: Hessian, name: str) -> Tensor:
    try:
        return hessian.mean().cpu()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@torch.no_grad()
def quantize_from(adapter: Adapter, folder: Path, importance: str, config: QuantConfig) -> Iterator[tuple[str, Quantized]]:
    """Quantizes the model in place by the Hessians in `folder`, and yields (full name, weight) of each linear.

    The linears of a stage share a tensor_scale.  Raises ValueError that names the stage where damping does not cure H.
    """
    for prefix, layer in adapter.layers():
        with safe_open(folder / f"{prefix}.safetensors", framework="pt") as stored:
            for stage in adapter.stages:
                weights: list[Tensor] = [layer.get_submodule(name).weight for name in stage]  # type: ignore[misc]
                H = stored.get_tensor(f"{importance} {prefix}.{stage[0]}") if config.needs_calibration else None
                H = None if H is None else H.to(weights[0].device)
                W = torch.cat([weight.float() for weight in weights])
                options = {"rule": config.rule, "damp": config.damp, "tensor_scale": choose_tensor_scale(W, config.format)}
                try:
                    quantized = METHODS[config.method](W, H, config.format, **options).quantized
                except ValueError as error:
                    raise type(error)(f"{prefix}.{stage[0]}: {error}") from None
                start = 0
                for name, weight in zip(stage, weights, strict=True):
                    part = quantized.rows(start, start := start + weight.shape[0])
                    weight.copy_(part.dequantize())
                    yield f"{prefix}.{name}", part
