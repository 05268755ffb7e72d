"""The loop: layer by layer through a model, each layer calibrated on the output of the quantized ones before it.

For each layer: run it once and collect H per stage; quantize its linears; run it again to get the next layer's input.  One
layer's Hessians are alive at a time, and layers are asked of the adapter one by one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ptq.activations import Activations, each_batch, embed_all
from ptq.adapter import Adapter
from ptq.clock import phase
from ptq.config import QuantConfig
from ptq.distributed import Team, assign
from ptq.hessian import Hessian
from ptq.packing import Quantized
from ptq.plan import Plan, make_plan
from ptq.stage import Numbers, Record, Solved, Stage, make_record, share_solved, solve_stage
from ptq.token_weights import TokenWeights
from ptq.watch import watch_inputs


@dataclass(frozen=True)
class LayerResult:
    """A finished layer.  `layer` holds the quantized weights.  `batch`: sequences that ran at once; replaying needs the same."""

    index: int
    layer: nn.Module
    records: list[Record]
    quantized: dict[str, Quantized]
    batch: int


def quantize_model(
    adapter: Adapter, batches: Sequence[Tensor] | None, config: QuantConfig, token_weights: TokenWeights | None = None
) -> Iterator[tuple[Record, Quantized]]:
    """Quantizes the model in place and yields (record, weight) for each linear as its layer is done.

    `batches`: token ids (n, length) each, on the model's device; None for methods that need no calibration.  `token_weights`: for
    the same batches, what each token counts for in H (ptq.token_weights); every token counts the same without.
    Raises ValueError, before any work, for whatever `make_plan` finds, and later for non-finite activations or an H that damping
    does not cure, naming layer and stage; CertificateError where the loss identity fails.
    """
    plan = make_plan(adapter, config)
    for done in quantize_layers(adapter, batches, config, plan, token_weights):
        yield from ((record, done.quantized[record.name]) for record in done.records)


@torch.no_grad()
def quantize_layers(
    adapter: Adapter,
    batches: Sequence[Tensor] | None,
    config: QuantConfig,
    plan: Plan,
    token_weights: TokenWeights | None = None,
    *,
    team: Team | None = None,
    finished: int = 0,
    restore: Callable[[int, nn.Module], int] | None = None,
    on_host: bool | None = None,
) -> Iterator[LayerResult]:
    """Quantizes layer by layer, each as the adapter gives it; what `quantize_model` says holds here.

    `batches` and `token_weights` are those of this rank of the `team`.  The first `finished` layers are not quantized but made
    what they were by restore(index, layer), which returns the batch they ran with.
    """
    team = team or Team()
    if not batches and config.needs_calibration:
        raise ValueError(f"method {config.method} with scale rule {config.rule} needs calibration tokens")
    hidden, sequences = None, 0
    if batches:
        device = batches[0].device
        sequences = round(team.total(sum(len(tokens) for tokens in batches), device))
        hidden = embed_all(adapter, batches, on_host, team.local_groups(sequences))
    weights = {name: torch.cat(parts) for name, parts in (token_weights or {}).items()}
    for index, (prefix, layer) in enumerate(adapter.layers(range(0 if hidden else finished, len(adapter.names)))):
        index += 0 if hidden else finished
        if index < finished:
            assert hidden and restore
            hidden.batch = restore(index, layer)
        else:
            stages = stages_of(adapter, prefix, layer, plan)
            batch = hidden.batch if hidden else 0
            with phase("forward"):
                hessians = collect_hessians(adapter, layer, stages, hidden, weights, team, sequences)
            records, quantized = quantize_stages(stages, hessians, config, team)
            yield LayerResult(index, layer, records, quantized, hidden.batch if hidden else batch)
        if hidden:
            with phase("forward"):
                propagate(adapter, layer, hidden)


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


def propagate(adapter: Adapter, layer: nn.Module, hidden: Activations) -> None:
    """Turns the layer's input into its output."""

    def work(rows: slice) -> None:
        hidden.store(rows, adapter.forward(layer, hidden.load(rows)))

    each_batch(hidden, "forward", work)


def collect_hessians(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[Stage],
    hidden: Activations | None,
    token_weights: Mapping[str, Tensor],
    team: Team,
    sequences: int,
) -> list[Hessian | None]:
    """One Hessian per stage from one pass of `hidden` through the layer, summed over the team on the rank that solves it.

    `sequences`: of all ranks.
    """
    if hidden is None or not stages:
        return [None] * len(stages)
    partial: list[tuple[int, list[Hessian]]] = []  # a tree of sums: two of the same height become one of the next
    for groups in [[group] for group in hidden.groups] if team.deterministic else [hidden.groups]:
        new = 0, collect_groups(adapter, layer, stages, hidden, token_weights, groups)
        while partial and partial[-1][0] == new[0]:
            height, before = partial.pop()
            new = height + 1, [a.merge(b) for a, b in zip(before, new[1], strict=True)]
        partial.append(new)
    ((_, hessians),) = partial
    with phase("communicate"):
        for hessian, owner in zip(hessians, owners_of(stages, team), strict=True):
            team.sum_to(hessian.sum, owner)
            team.sum_to(hessian.weight, owner)
            hessian.tokens = sequences * hidden.data.shape[1]
    return list(hessians)


def collect_groups(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[Stage],
    hidden: Activations,
    token_weights: Mapping[str, Tensor],
    groups: list[slice],
) -> list[Hessian]:
    firsts = [next(iter(stage.items())) for stage in stages]
    names: dict[nn.Module, str] = {linear: name for name, linear in firsts}
    hessians: dict[nn.Module, Hessian] = {}

    def restart() -> None:
        hessians.update({linear: Hessian(linear.in_features, device=linear.weight.device) for _, linear in firsts})

    def work(rows: slice) -> None:
        def see(linear: nn.Module, x: Tensor) -> None:
            with phase("hessian"):
                hessians[linear].add(x, token_weights[names[linear]][rows] if token_weights else None)

        with watch_inputs(names, see, last=firsts[-1][1]):
            adapter.forward(layer, hidden.load(rows))

    restart()
    each_batch(hidden, "forward", work, groups=groups, restart=restart)
    return list(hessians.values())


def first_of(stage: Stage) -> nn.Linear:
    return next(iter(stage.values()))


def owners_of(stages: list[Stage], team: Team) -> list[int]:
    """The rank that solves each stage.  A factorization costs about as much as a sweep over as many rows as there are columns."""
    shapes = [(sum(linear.out_features for linear in stage.values()), first_of(stage).in_features) for stage in stages]
    return assign([(d_out + d_in) * d_in * d_in for d_out, d_in in shapes], team.size)


def quantize_stages(
    stages: list[Stage], hessians: list[Hessian | None], config: QuantConfig, team: Team
) -> tuple[list[Record], dict[str, Quantized]]:
    """Solves the stages, each on its rank, and puts the results into the linears of every rank."""
    owners = owners_of(stages, team)
    solved: list[Solved | None] = [None] * len(stages)
    for i, stage in enumerate(stages):
        hessian, hessians[i] = hessians[i], None
        if owners[i] == team.rank:
            try:
                solved[i] = solve_stage(stage, hessian, config)
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
            share_solved(stage, one, owner, config, team) for stage, one, owner in zip(stages, solved, owners, strict=True)
        ]
    records: list[Record] = []
    quantized: dict[str, Quantized] = {}
    for stage, (whole, numbers) in zip(stages, shared, strict=True):
        Q, start = whole.dequantize(), 0
        for (name, linear), row in zip(stage.items(), numbers.tolist(), strict=True):
            stop = start + linear.out_features
            linear.weight.copy_(Q[start:stop])
            records.append(make_record(name, linear, Numbers(*row), config))
            quantized[name] = whole.rows(start, stop)
            start = stop
    return records, quantized
