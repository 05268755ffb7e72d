"""What the solve of a stage needs of the calibration tokens, from one pass of them through a layer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from ptq.calibrate.activations import Activations, each_batch
from ptq.calibrate.drift import Drift
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.hooks import observe_inputs
from ptq.runtime.adapter import Adapter
from ptq.runtime.clock import phase
from ptq.runtime.distributed import Ranks

Stage = dict[str, nn.Linear]


@dataclass
class Original:
    """The layer as it was, what the original model puts into it, and room for what comes out; `ran`: whether that is there."""

    layer: nn.Module
    hidden: Activations
    output: Activations
    ran: bool = False


@dataclass(frozen=True)
class Sums:
    hessian: Hessian
    drift: Drift | None = None

    def merge(self, other: "Sums") -> "Sums":
        """Takes the other's tokens in, and returns itself."""
        self.hessian.merge(other.hessian)
        if self.drift and other.drift:
            self.drift.merge(other.drift)
        return self


def collect(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[Stage],
    hidden: Activations | None,
    token_importance: Mapping[str, Tensor],
    ranks: Ranks,
    sequences: int,
    shares: list[list[range]],
    original: Original | None = None,
) -> list[Sums | None]:
    """The sums of each stage from one pass of `hidden` through the layer, added up over the ranks on the ranks that solve it.

    `sequences`: of all ranks.  `shares`: for each stage and rank, the rows it solves (ptq.runtime.distributed.shard_rows).  With
    `original`, the sums tell too what the stages are to make good.
    """
    if hidden is None or not stages:
        return [None] * len(stages)
    partial: list[tuple[int, list[Sums]]] = []  # a tree of sums: two of the same height become one of the next
    for groups in [[group] for group in hidden.groups] if ranks.deterministic else [hidden.groups]:
        if original:
            new = 0, collect_drift(adapter, layer, stages, hidden, token_importance, groups, original)
        else:
            new = 0, collect_hessians(adapter, layer, stages, hidden, token_importance, groups)
        while partial and partial[-1][0] == new[0]:
            height, before = partial.pop()
            new = height + 1, [a.merge(b) for a, b in zip(before, new[1], strict=True)]
        partial.append(new)
    ((_, whole),) = partial
    with phase("communicate"):
        for sums, share in zip(whole, shares, strict=True):
            owners = [rank for rank, rows in enumerate(share) if rows]
            for tensor in (sums.hessian.sum, sums.hessian.weight, *([sums.drift.sum] if sums.drift else [])):
                if len(owners) > 1:
                    ranks.all_reduce(tensor)
                else:
                    ranks.reduce(tensor, owners[0])
            sums.hessian.tokens = sequences * hidden.data.shape[1]
    return list(whole)


def collect_hessians(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[Stage],
    hidden: Activations,
    token_importance: Mapping[str, Tensor],
    groups: list[slice],
) -> list[Sums]:
    firsts = [next(iter(stage.items())) for stage in stages]
    names: dict[nn.Module, str] = {linear: name for name, linear in firsts}
    hessians: dict[nn.Module, Hessian] = {}

    def restart() -> None:
        hessians.update({linear: Hessian(linear.in_features, device=linear.weight.device) for _, linear in firsts})

    def work(rows: slice) -> None:
        def observe(linear: nn.Module, x: Tensor) -> None:
            with phase("hessian"):
                hessians[linear].add(x, token_importance[names[linear]][rows] if token_importance else None)

        observe_inputs(names, observe, firsts[-1][1], lambda: adapter.forward(layer, hidden.load(rows)))

    restart()
    each_batch(hidden, "forward", work, groups=groups, restart=restart)
    return [Sums(hessian) for hessian in hessians.values()]


def collect_drift(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[Stage],
    hidden: Activations,
    token_importance: Mapping[str, Tensor],
    groups: list[slice],
    original: Original,
) -> list[Sums]:
    """Both models run up to the last of the stages; the original's output is kept if that is the end of the layer."""
    last = adapter.writers[-1]
    local = {linear: name for name, linear in layer.named_modules()}
    firsts = {name: (local[linear], linear) for name, linear in (next(iter(stage.items())) for stage in stages)}
    wanted = [own for own, _ in firsts.values()]
    sums: dict[str, Sums] = {}

    def restart() -> None:
        for name, (own, linear) in firsts.items():
            stream, device = linear.out_features if own in adapter.writers else None, linear.weight.device
            drift = Drift(linear.in_features, stream=stream, device=device)
            sums[name] = Sums(Hessian(linear.in_features, device=device), drift)

    def work(rows: slice) -> None:
        ours = look(adapter, layer, wanted, hidden.load(rows))
        theirs = look(adapter, original.layer, wanted, original.hidden.load(rows))
        if last in theirs.outputs:
            original.output.store(rows, theirs.outputs[last])
        with phase("hessian"):
            for name, (own, _) in firsts.items():
                weights = token_importance[name][rows] if token_importance else None
                drift = sums[name].drift
                assert drift
                sums[name].hessian.add(ours.inputs[own], weights)
                mine, whole = (ours.outputs, theirs.outputs) if drift.of_outputs else (ours.inputs, theirs.inputs)
                drift.add(ours.inputs[own], whole[own] - mine[own], weights)

    restart()
    each_batch(hidden, "forward", work, groups=groups, restart=restart)
    original.ran = last in wanted
    return list(sums.values())


class Seen(NamedTuple):
    """By name in the layer: inputs of linears, and what those that write to the residual stream leave in it."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def look(adapter: Adapter, layer: nn.Module, wanted: list[str], hidden: Tensor) -> Seen:
    """Of the wanted linears of the layer, named in the order they run."""
    first, last = adapter.writers
    names = {layer.get_submodule(name): name for name in wanted}
    seen = Seen({}, {})

    def observe(linear: nn.Module, x: Tensor) -> None:
        seen.inputs[names[linear]] = x
        if names[linear] == first:
            assert isinstance(linear, nn.Linear)
            seen.outputs[first] = hidden + F.linear(x, linear.weight, linear.bias)

    stop = None if last in wanted else layer.get_submodule(wanted[-1])
    output = observe_inputs(names, observe, stop, lambda: adapter.forward(layer, hidden))
    if output is not None:
        seen.outputs[last] = output
    return seen


def first_of(stage: Stage) -> nn.Linear:
    return next(iter(stage.values()))


def shape_of(stage: Stage) -> tuple[int, int]:
    """(d_out, d_in) of its linears one below the other."""
    return sum(linear.out_features for linear in stage.values()), first_of(stage).in_features
