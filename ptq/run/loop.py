"""The loop: layer by layer through a model, each layer calibrated on the output of the quantized ones before it.

For each layer: run it once and collect H per stage; quantize its linears; run it again to get the next layer's input.  One
layer's Hessians are alive at a time, and layers are asked of the adapter one by one.

Where drift is made good (ptq.calibrate.drift), the original model's hidden states come along, and a layer may
be run stage by stage.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptq.calibrate.activations import embed_all, propagate
from ptq.calibrate.collect import Original, Stage, Sums, collect, first_of, shape_of
from ptq.calibrate.importance import TokenImportance
from ptq.calibrate.validation import Validation
from ptq.core.packing import Quantized
from ptq.run.config import QuantConfig
from ptq.run.plan import Plan, make_plan
from ptq.run.solve import Numbers, Record, Solved, make_record, share_solved, solve_stage
from ptq.runtime.adapter import Adapter
from ptq.runtime.checks import check_float32
from ptq.runtime.clock import phase
from ptq.runtime.distributed import Ranks, shard_rows


@dataclass(frozen=True)
class LayerResult:
    """A finished layer.  `layer` holds the quantized weights.  `batch`: sequences that ran at once; replaying needs the same."""

    index: int
    layer: nn.Module
    records: list[Record]
    quantized: dict[str, Quantized]
    batch: int


def quantize_model(
    adapter: Adapter,
    batches: Sequence[Tensor] | None,
    config: QuantConfig,
    token_importance: TokenImportance | None = None,
    curvature: Mapping[str, Tensor] | None = None,
    validation: Tensor | None = None,
) -> Iterator[tuple[Record, Quantized]]:
    """Quantizes the model in place and yields (record, weight) for each linear as its layer is done.

    `batches`: token ids (n, length) each, on the model's device; None for methods that need no calibration.  `token_importance`:
    for the same batches, what each token counts for in H (ptq.calibrate.importance); every token counts the same without.
    `curvature`: by linear, G for row feedback (ptq.calibrate.importance).  `validation`: token ids (n, length) to measure errors on.
    Raises ValueError, before any work, for whatever `make_plan` finds, and later for non-finite activations or an H that damping
    does not cure, naming layer and stage; CertificateError where the loss identity fails.
    """
    plan = make_plan(adapter, config)
    for done in quantize_layers(adapter, batches, config, plan, token_importance, curvature, validation):
        yield from ((record, done.quantized[record.name]) for record in done.records)


@torch.no_grad()
def quantize_layers(
    adapter: Adapter,
    batches: Sequence[Tensor] | None,
    config: QuantConfig,
    plan: Plan,
    token_importance: TokenImportance | None = None,
    curvature: Mapping[str, Tensor] | None = None,
    validation: Tensor | None = None,
    *,
    ranks: Ranks | None = None,
    finished: int = 0,
    restore: Callable[[int, nn.Module], int] | None = None,
    on_host: bool | None = None,
) -> Iterator[LayerResult]:
    """Quantizes layer by layer, each as the adapter gives it; what `quantize_model` says holds here.

    `batches` and `token_importance` are those of this rank of the `ranks`.  The first `finished` layers are not quantized but made
    what they were by restore(index, layer), which returns the batch they ran with.
    """
    check_float32()
    ranks = ranks or Ranks()
    if not batches and config.needs_calibration:
        raise ValueError(f"method {config.method} with scale rule {config.rule} needs calibration tokens")
    if config.row_feedback and curvature is None:
        raise ValueError(
            "row feedback needs the curvature of the loss in every linear's outputs; give what token_importance leaves"
        )
    hidden, beside, sequences = None, None, 0
    if batches:
        device = batches[0].device
        sequences = round(ranks.all_reduce_value(sum(len(tokens) for tokens in batches), device))
        hidden = embed_all(adapter, batches, on_host, ranks.local_groups(sequences))
        beside = (hidden.copy(on_host), hidden.empty_like(on_host)) if config.drift else None
    watch = None if validation is None else Validation(adapter, validation)
    weights = {name: torch.cat(parts) for name, parts in (token_importance or {}).items()}
    for index, (prefix, layer) in enumerate(adapter.layers(range(0 if hidden else finished, len(adapter.names)))):
        index += 0 if hidden else finished
        if watch:
            with phase("report"):
                watch.before(layer)
        original = Original(copy.deepcopy(layer), *beside) if beside else None
        if index < finished:
            assert hidden and restore
            hidden.batch = restore(index, layer)
            if original:
                original.hidden.batch = hidden.batch
            if watch:
                watch.after(layer)
        else:
            batch = hidden.batch if hidden else 0
            stages = stages_of(adapter, prefix, layer, plan)
            records: list[Record] = []
            quantized: dict[str, Quantized] = {}
            for part in [[stage] for stage in stages] if original and config.stagewise else [stages]:
                shares = shard_rows([shape_of(stage) for stage in part], ranks, divisible=not config.row_feedback)
                with phase("forward"):
                    sums = collect(adapter, layer, part, hidden, weights, ranks, sequences, shares, original)
                records += quantize_stages(part, sums, shares, config, ranks, quantized, curvature or {})
            if watch:
                with phase("report"):
                    errors = watch.after(layer)
                records = [replace(one, validation_error=errors[one.name[len(prefix) + 1 :]]) for one in records]
            yield LayerResult(index, layer, records, quantized, hidden.batch if hidden else batch)
        with phase("forward"):
            if hidden:
                propagate(adapter, layer, hidden, "forward")
            if original and original.ran:
                beside = original.output, original.hidden
            elif original:
                propagate(adapter, original.layer, original.hidden, "forward")


def stages_of(adapter: Adapter, prefix: str, layer: nn.Module, plan: Plan) -> list[Stage]:
    """The linears of the layer that are to be quantized, by full name, stage by stage."""
    stages = [
        {f"{prefix}.{name}": linear_of(layer, name) for name in stage if f"{prefix}.{name}" in plan.linears}
        for stage in adapter.stages
    ]
    return [stage for stage in stages if stage]


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    linear = layer.get_submodule(name)
    assert isinstance(linear, nn.Linear), name
    return linear


def quantize_stages(
    stages: list[Stage],
    sums: list[Sums | None],
    shares: list[list[range]],
    config: QuantConfig,
    ranks: Ranks,
    quantized: dict[str, Quantized],
    curvature: Mapping[str, Tensor],
) -> list[Record]:
    """Solves the stages, each rank its `shares`, and puts the results into the linears of every rank and into `quantized`."""
    solved: list[Solved | None] = [None] * len(stages)
    for i, stage in enumerate(stages):
        own, sums[i] = sums[i], None
        if shares[i][ranks.rank]:
            try:
                solved[i] = solve_stage(stage, own, config, curvature, shares[i][ranks.rank], ranks)
            except ValueError as error:
                raise type(error)(f"{', '.join(stage)}: {error}") from None
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
                raise torch.OutOfMemoryError(
                    f"out of memory in phase 'solve' of {', '.join(stage)}, for matrices of {first_of(stage).in_features}²; set "
                    f"--activations host, or leave this stage to more memory with --ignore ({reason})"
                ) from error
    with phase("communicate"):
        shared = [
            share_solved(stage, one, share, config, ranks) for stage, one, share in zip(stages, solved, shares, strict=True)
        ]
    records: list[Record] = []
    for stage, (whole, numbers) in zip(stages, shared, strict=True):
        Q, start = whole.dequantize(), 0
        for (name, linear), row in zip(stage.items(), numbers.tolist(), strict=True):
            stop = start + linear.out_features
            linear.weight.copy_(Q[start:stop])
            records.append(make_record(name, linear, Numbers(*row), config))
            quantized[name] = whole.rows(start, stop)
            start = stop
    return records
