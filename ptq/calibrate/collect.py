"""What the solve of a group of linears needs of the calibration tokens, from one pass of them through a layer.

Observers see the input of each group of linears (those that share it) as the quantized model has it and, where drift is
made good, as the original has it; what they sum up is additive in the tokens, so batches, groups and ranks add up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ptq.calibrate.activations import Activations, each_batch
from ptq.calibrate.drift import Drift
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.observe import Observed, Observer, run_and_observe, token_weights
from ptq.runtime.adapter import Adapter, Group, Layer, LayerPlan
from ptq.runtime.clock import phase
from ptq.runtime.distributed import Ranks


@dataclass
class Original:
    """The layer as it was, what the original model puts into it, and a place for what comes out; `ran`: whether that is there."""

    layer: Layer
    hidden: Activations
    output: Activations
    ran: bool = False


@dataclass
class Stream:
    """The calibration tokens on their way through the model.  `importance`: what each counts for, by the full name of a
    group's first linear, (sequences, length); empty where all count the same.  `sequences`: of all `ranks`."""

    hidden: Activations
    ranks: Ranks
    sequences: int
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    original: Original | None = None

    @property
    def tokens(self) -> int:
        return self.sequences * self.hidden.data.shape[1]


@dataclass(frozen=True)
class Sums:
    """Of one group: H, and where drift is made good, what was lost before it."""

    hessian: Hessian
    drift: Drift | None = None

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


def collect(
    adapter: Adapter,
    layer: Layer,
    plan: LayerPlan,
    groups: Sequence[Group],
    owners: Sequence[Sequence[int]],
    stream: Stream,
) -> list[Sums]:
    """The sums of each group from one pass of the tokens through the layer, added up over the ranks on those that solve it,
    its `owners`."""
    ranks = stream.ranks
    partial: list[tuple[int, list[Sums]]] = []  # a tree of sums: two of the same height become one of the next
    for part in [[one] for one in stream.hidden.groups] if ranks.deterministic else [stream.hidden.groups]:
        new = 0, collect_part(adapter, layer, plan, groups, part, stream)
        while partial and partial[-1][0] == new[0]:
            height, before = partial.pop()
            new = height + 1, [merge(a, b) for a, b in zip(before, new[1], strict=True)]
        partial.append(new)
    ((_, whole),) = partial
    with phase("communicate"):
        for sums, solvers in zip(whole, owners, strict=True):
            for tensor in (tensor for observer in sums.observers for tensor in observer.sums()):
                if len(solvers) > 1:
                    ranks.all_reduce(tensor)
                else:
                    ranks.reduce(tensor, solvers[0])
            sums.hessian.tokens = stream.tokens
    return whole


def merge(sums: Sums, other: Sums) -> Sums:
    for ours, theirs in zip(sums.observers, other.observers, strict=True):
        ours.merge(theirs)
    return sums


def collect_part(
    adapter: Adapter, layer: Layer, plan: LayerPlan, groups: Sequence[Group], part: list[slice], stream: Stream
) -> list[Sums]:
    """The sums over some of the sequences.  The original, if it comes along, runs first; its output is kept if it ran to the
    end of the layer."""
    original = stream.original
    names = [group[0] for group in groups]
    sums: dict[str, Sums] = {}

    def restart() -> None:
        sums.update({group[0]: make_sums(layer, plan, group, drift=original is not None) for group in groups})

    def work(rows: slice) -> None:
        theirs: dict[str, Observed] = {}
        if original:
            states = original.hidden.load(rows)
            output = run_and_observe(
                adapter, original.layer, plan, names, states, lambda seen: theirs.update({seen.name: seen}), streams=True
            )
            if output is not None and plan.output in names:
                original.output.store(rows, output)

        def add(ours: Observed) -> None:
            with phase("hessian"):
                weights = token_weights(stream.importance, layer.full_name(ours.name), rows, ours.tokens)
                for observer in sums[ours.name].observers:
                    observer.observe(ours, theirs.get(ours.name), weights)

        run_and_observe(adapter, layer, plan, names, stream.hidden.load(rows), add, streams=original is not None)

    restart()
    each_batch(stream.hidden, "forward", work, groups=part, restart=restart)
    if original:
        original.ran = plan.output in names
    return list(sums.values())
