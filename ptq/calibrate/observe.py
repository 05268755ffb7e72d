"""What observers of a layer's linears are told, and the pass that tells them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.hooks import observe_inputs


@dataclass(frozen=True)
class Observed:
    """Input x (..., d_in) of the linear `name`, and what it leaves in the residual stream (..., d), if it writes to it and
    that was asked for.  `tokens`: which of the batch's tokens these are, None for all."""

    name: str
    x: Tensor
    stream: Tensor | None = None
    tokens: Tensor | None = None


class Observer(Protocol):
    def observe(self, ours: Observed, theirs: Observed | None, weights: Tensor | None) -> None:
        """Takes in tokens as the quantized model has them, and as the original has the same; `weights`: what each counts for."""
        ...

    def merge(self, other: Self) -> Self:
        """Takes the other's tokens in, and returns itself."""
        ...

    def sums(self) -> list[Tensor]:
        """What is added up over ranks, in place."""
        ...


def token_weights(importance: Mapping[str, Tensor], name: str, rows: slice, tokens: Tensor | None) -> Tensor | None:
    """What the tokens that a linear sees count for; None where all count the same."""
    if not importance:
        return None
    weights = importance[name][rows]
    return weights if tokens is None else weights.flatten()[tokens.to(weights.device)]


def run_and_observe(
    adapter: Adapter,
    layer: Layer,
    plan: LayerPlan,
    names: Sequence[str],
    hidden: Tensor,
    observe: Callable[[Observed], object],
    *,
    streams: bool,
) -> Tensor | None:
    """Runs the layer and calls observe for each of the linears `names`, which are in the order they run; with `streams`
    those that write to the residual stream tell what is in it then.

    Returns the layer's output, or None where the run ended with the last of them, whose product nobody needs.
    """
    linears: dict[nn.Module, str] = {layer.linear(name): name for name in names}
    at_the_end = plan.output if streams and plan.output in names else None
    waiting: list[Tensor] = []

    def see(linear: nn.Module, x: Tensor, tokens: Tensor | None) -> None:
        name = linears[linear]
        if name == at_the_end:
            waiting.append(x)
            return
        stream = None
        if streams and name in plan.residual:
            assert isinstance(linear, nn.Linear)
            y, factor = F.linear(x, linear.weight, linear.bias), plan.residual[name]
            stream = hidden + (y if factor == 1 else factor * y)
        observe(Observed(name, x, stream, tokens))

    last = None if at_the_end else layer.linear(names[-1])
    output = observe_inputs(linears, see, last, lambda: adapter.forward(layer, hidden))
    if at_the_end:
        observe(Observed(at_the_end, waiting.pop(), output))
    return output
