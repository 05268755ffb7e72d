"""What the solve of a stage needs of the calibration tokens, from one pass of them through a layer."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ptq.activations import Activations, each_batch
from ptq.adapter import Adapter
from ptq.clock import phase
from ptq.distributed import Team, assign
from ptq.drift import Drift
from ptq.hessian import Hessian
from ptq.watch import watch_inputs, watch_linears

Stage = dict[str, nn.Linear]


@dataclass(frozen=True)
class Original:
    """The layer as it was, and what the original model puts into it."""

    layer: nn.Module
    hidden: Activations


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
    token_weights: Mapping[str, Tensor],
    team: Team,
    sequences: int,
    original: Original | None = None,
) -> list[Sums | None]:
    """The sums of each stage from one pass of `hidden` through the layer, added up over the team on the rank that solves it.

    `sequences`: of all ranks.  With `original`, of one stage, with what it is to make good.
    """
    if hidden is None or not stages:
        return [None] * len(stages)
    partial: list[tuple[int, list[Sums]]] = []  # a tree of sums: two of the same height become one of the next
    for groups in [[group] for group in hidden.groups] if team.deterministic else [hidden.groups]:
        if original:
            (stage,) = stages
            new = 0, [collect_drift(adapter, layer, stage, hidden, token_weights, groups, original)]
        else:
            new = 0, collect_hessians(adapter, layer, stages, hidden, token_weights, groups)
        while partial and partial[-1][0] == new[0]:
            height, before = partial.pop()
            new = height + 1, [a.merge(b) for a, b in zip(before, new[1], strict=True)]
        partial.append(new)
    ((_, whole),) = partial
    with phase("communicate"):
        for sums, owner in zip(whole, owners_of(stages, team), strict=True):
            for tensor in (sums.hessian.sum, sums.hessian.weight, *(sums.drift.sums() if sums.drift else ())):
                team.sum_to(tensor, owner)
            sums.hessian.tokens = sequences * hidden.data.shape[1]
    return list(whole)


def collect_hessians(
    adapter: Adapter,
    layer: nn.Module,
    stages: list[Stage],
    hidden: Activations,
    token_weights: Mapping[str, Tensor],
    groups: list[slice],
) -> list[Sums]:
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
    return [Sums(hessian) for hessian in hessians.values()]


def collect_drift(
    adapter: Adapter,
    layer: nn.Module,
    stage: Stage,
    hidden: Activations,
    token_weights: Mapping[str, Tensor],
    groups: list[slice],
    original: Original,
) -> Sums:
    """Both models run up to the stage; to the end of the layer where its stream is known only from there."""
    name, linear = next(iter(stage.items()))
    local = next(own for own, module in layer.named_modules() if module is linear)
    sums: list[Sums] = []

    def restart() -> None:
        stream = linear.out_features if local in adapter.writers else None
        device = linear.weight.device
        sums[:] = [Sums(Hessian(linear.in_features, device=device), Drift(linear.in_features, stream=stream, device=device))]

    def work(rows: slice) -> None:
        ours = look(adapter, layer, local, hidden.load(rows))
        theirs = look(adapter, original.layer, local, original.hidden.load(rows))
        weights = token_weights[name][rows] if token_weights else None
        gap = None if ours[1] is None or theirs[1] is None else theirs[1] - ours[1]
        with phase("hessian"):
            assert sums[0].drift
            sums[0].hessian.add(ours[0], weights)
            sums[0].drift.add(ours[0], theirs[0], gap, weights)

    restart()
    each_batch(hidden, "forward", work, groups=groups, restart=restart)
    return sums[0]


def look(adapter: Adapter, layer: nn.Module, local: str, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
    """The input of a linear of the layer, and the stream it adds its output to, if it does."""
    linear = layer.get_submodule(local)
    first, last = adapter.writers
    seen: list[Tensor] = []
    if local != last:
        with watch_inputs([linear], lambda _, x: seen.append(x), last=linear):
            adapter.forward(layer, hidden)
        return seen[0], hidden if local == first else None
    with watch_linears([linear], lambda _, x, y: seen.extend((x, y))):
        output = adapter.forward(layer, hidden)
    x, y = seen
    return x, output - y


def first_of(stage: Stage) -> nn.Linear:
    return next(iter(stage.values()))


def owners_of(stages: list[Stage], team: Team) -> list[int]:
    """The rank that solves each stage.  A factorization costs about as much as a sweep over as many rows as there are columns."""
    shapes = [(sum(linear.out_features for linear in stage.values()), first_of(stage).in_features) for stage in stages]
    return assign([(d_out + d_in) * d_in * d_in for d_out, d_in in shapes], team.size)
