"""What the solve of a group of linears needs of the calibration tokens, from their passes through a layer.

Observers see the input of each group of linears (those that share it) as the quantized model has it and, where drift is
made good, as the original has it; what they sum up is additive in the tokens, so batches, groups and ranks add up.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ptq.calibrate.activations import each_batch
from ptq.calibrate.drift import Drift
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.observe import Observed, Observer, token_weights
from ptq.calibrate.passes import Passes
from ptq.runtime.adapter import Group, Layer, LayerPlan
from ptq.runtime.clock import phase

# Tokens an expert must have, as a part of its input columns, or it is calibrated on all.
ENOUGH = 4


@dataclass(frozen=True)
class Sums:
    """Of one group: H, and where drift is made good, what was lost before it.  `routed`: of an expert, how many tokens came
    to it; its sums may be over all."""

    hessian: Hessian
    drift: Drift | None = None
    routed: int | None = None

    @property
    def observers(self) -> list[Observer]:
        return [self.hessian, *([self.drift] if self.drift else [])]


def make_sums(layer: Layer, plan: LayerPlan, group: Group, *, drift: bool) -> Sums:
    linear = layer.linear(group[0])
    device = linear.weight.device
    factor = plan.residual.get(group[0]) if len(group) == 1 else None
    stream = None if factor is None else linear.out_features
    lost = Drift(linear.in_features, stream=stream, factor=factor or 1.0, device=device) if drift else None
    return Sums(Hessian(linear.in_features, device=device), lost)


def collect(passes: Passes, groups: Sequence[Group], owners: Sequence[Sequence[int]]) -> list[Sums]:
    """The sums of each group, from the tokens on their way through the layer, added up over the ranks on those that solve it,
    its `owners`.

    An expert to which fewer tokens are routed than a quarter of its input columns is calibrated on all tokens instead, in
    passes of their own: H of so few says little, and nothing of most directions.
    """
    plan, stream = passes.plan, passes.stream
    experts = [group[0] for group in groups if group[0] in plan.experts]
    sums = collect_from(passes, groups, owners, experts if stream.all_tokens else [])
    starved = [i for i, one in enumerate(sums) if is_starved(one, plan, groups[i][0])] if not stream.all_tokens else []
    if starved:
        some = [groups[i] for i in starved]
        alone = Passes(passes.adapter, passes.layer, plan, stream)
        try:
            again = collect_from(alone, some, [owners[i] for i in starved], [group[0] for group in some])
        finally:
            alone.clear()
        for i, whole in zip(starved, again, strict=True):
            sums[i] = replace(whole, routed=sums[i].hessian.tokens)
    return sums


def is_starved(sums: Sums, plan: LayerPlan, name: str) -> bool:
    return name in plan.experts and sums.hessian.tokens < len(sums.hessian.sum) // ENOUGH


def collect_from(passes: Passes, groups: Sequence[Group], owners: Sequence[Sequence[int]], on_all: Sequence[str]) -> list[Sums]:
    """The same, with the experts `on_all` seeing all tokens."""
    plan, stream, ranks = passes.plan, passes.stream, passes.stream.ranks
    partial: list[tuple[int, list[Sums]]] = []  # a tree of sums: two of the same height become one of the next
    for part in [[one] for one in stream.hidden.groups] if ranks.deterministic else [stream.hidden.groups]:
        new = 0, collect_part(passes, groups, part, on_all)
        while partial and partial[-1][0] == new[0]:
            height, before = partial.pop()
            new = height + 1, [merge(a, b) for a, b in zip(before, new[1], strict=True)]
        partial.append(new)
    ((_, whole),) = partial
    with phase("communicate"):
        counts = [sums.hessian.tokens for sums in whole]
        if ranks.size > 1:
            counted = torch.tensor(counts, dtype=torch.float64, device=stream.hidden.device)
            counts = [int(count) for count in ranks.all_reduce(counted).tolist()]
        for sums, solvers, count in zip(whole, owners, counts, strict=True):
            for tensor in (tensor for observer in sums.observers for tensor in observer.sums()):
                if len(solvers) > 1:
                    ranks.all_reduce(tensor)
                else:
                    ranks.reduce(tensor, solvers[0])
            sums.hessian.tokens = count
    routed = [sums.hessian.tokens if group[0] in plan.experts else None for sums, group in zip(whole, groups, strict=True)]
    return [replace(sums, routed=count) for sums, count in zip(whole, routed, strict=True)]


def merge(sums: Sums, other: Sums) -> Sums:
    for ours, theirs in zip(sums.observers, other.observers, strict=True):
        ours.merge(theirs)
    return sums


def collect_part(passes: Passes, groups: Sequence[Group], part: list[slice], on_all: Sequence[str] = ()) -> list[Sums]:
    """The sums over some of the sequences.  The original, if it comes along, runs second, and its experts are asked for the
    same tokens as those of the quantized model."""
    adapter, layer, plan, stream = passes.adapter, passes.layer, passes.plan, passes.stream
    drift = stream.original is not None
    names = [group[0] for group in groups]
    mixture = any(name in plan.experts for name in names)
    sums: dict[str, Sums] = {}

    def begin() -> None:
        sums.update({group[0]: make_sums(layer, plan, group, drift=drift) for group in groups})

    def restart() -> None:
        passes.clear()
        begin()

    def add(ours: Observed, theirs: Observed | None, rows: slice) -> None:
        with phase("hessian"):
            importance = {} if ours.name in on_all else stream.importance
            weights = token_weights(importance, layer.full_name(ours.name), rows, ours.tokens)
            for observer in sums[ours.name].observers:
                observer.observe(ours, theirs, weights)

    def work(rows: slice) -> None:
        every = torch.arange((rows.stop - rows.start) * stream.hidden.length, device=stream.hidden.device)
        watched = {expert_number(name): every for name in on_all}
        adapter.watch(layer, watched or None)
        ours, *original = passes.take(rows)
        seen: dict[str, Observed] = {}
        keep, use = lambda one: seen.update({one.name: one}), lambda one: add(one, None, rows)
        ours.observe(names, keep if drift else use, streams=drift)
        for theirs in original:
            if mixture:
                adapter.watch(theirs.layer, watched or adapter.routing(layer))
            theirs.observe(names, lambda one: add(seen.pop(one.name), one, rows), streams=True)
        passes.put_back(rows, [ours, *original])

    begin()
    each_batch(stream.hidden, "forward", work, groups=part, restart=restart)
    adapter.watch(layer, None)
    if stream.original:
        adapter.watch(stream.original.layer, None)
    return list(sums.values())


def expert_number(name: str) -> int:
    """Of the expert that the linear is in."""
    found = re.search(r"\.(\d+)\.", name)
    assert found, name
    return int(found[1])
