"""What observers of a layer's linears are told, and the pass through the layer that tells them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import torch.nn.functional as F
from torch import Tensor, nn

from ptq.runtime.adapter import Adapter, Layer, LayerPlan
from ptq.runtime.hooks import Forward, without_product


@dataclass(frozen=True)
class Observed:
    """Input x (..., d_in) of the linear `name` and, if it writes to the residual stream and that was asked for, the stream
    (..., d): after it in a pass that is frozen, else without W x.  `tokens`: which of the batch's tokens, None for all."""

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


class LayerPass:
    """Some sequences on their way through a layer: a pass that pauses when it has told what it was asked for, and goes on later.

    `frozen`: the layer's weights will not change.  Those of linears that have been observed may, otherwise.
    """

    def __init__(self, adapter: Adapter, layer: Layer, plan: LayerPlan, hidden: Tensor, *, frozen: bool = False):
        self.layer, self._plan, self._hidden = layer, plan, hidden
        self._forward = Forward(partial(adapter.forward, layer, hidden), frozen=frozen)
        self._before_last: tuple[Tensor, Tensor] | None = None
        self._output: Tensor | None = None

    @property
    def can_finish(self) -> bool:
        """Whether what has run so far is part of the layer's output: not where it ran to the end without a pause."""
        return self._output is not None or self._before_last is not None or not self._forward.dead

    def observe(self, names: Sequence[str], observe: Callable[[Observed], object], *, streams: bool) -> None:
        """Goes on and calls observe for each of the linears `names`, which are in the order they run; with `streams` those that
        write to the residual stream tell what is in it.

        The linear that makes the layer's output is run by itself: without it the layer gives the stream before it.
        """
        linears: dict[nn.Module, str] = {self.layer.linear(name): name for name in names}
        output = self._plan.output if streams and self._plan.output in names else None
        inputs: list[Tensor] = []

        def see(linear: nn.Module, x: Tensor, tokens: Tensor | None, y: Tensor | None = None) -> None:
            if linears[linear] == output:
                inputs.append(x)
                return
            stream = (
                self._stream(self._hidden, linears[linear], y) if streams and linears[linear] in self._plan.residual else None
            )
            observe(Observed(linears[linear], x, stream, tokens))

        last = [] if output else [self.layer.linear(name) for name in self._last_wave(names)]
        skipped = None if output is None or self._forward.frozen else self.layer.linear(output)
        with without_product(skipped, inputs.append) if skipped else nullcontext():
            end = self._forward.observe([linear for linear in linears if linear is not skipped], see, last)
        if skipped:
            assert end is not None and output
            self._before_last = end, inputs[0]
            observe(Observed(output, inputs[0], self._stream(end, output, None)))
            return
        if output:
            assert end is not None
            observe(Observed(output, inputs[0], end))
        if self._forward.frozen:
            self._output = end

    def finish(self) -> Tensor:
        """The layer's output."""
        assert self.can_finish
        if self._output is not None:
            return self._output
        if self._before_last is None:
            output = self._forward.observe((), lambda *_: None)
            assert output is not None
            return output
        assert self._plan.output
        stream, x = self._before_last
        linear = self.layer.linear(self._plan.output)
        return self._stream(stream, self._plan.output, F.linear(x, linear.weight, linear.bias))

    def close(self) -> None:
        """Lets go of what it holds."""
        self._forward.close()
        self._output = self._before_last = None

    def _stream(self, before: Tensor, name: str, y: Tensor | None) -> Tensor:
        """The residual stream after the linear, whose output is y; without y, what it is with the linear's bias alone."""
        y, factor = self.layer.linear(name).bias if y is None else y, self._plan.residual[name]
        if y is None:
            return before
        return before + (y if factor == 1 else factor * y)

    def _last_wave(self, names: Sequence[str]) -> list[str]:
        """Those of the names that run last, which may be a mixture's experts."""
        wave = next(wave for wave in self._plan.waves if any(names[-1] in group for group in wave))
        return [name for name in names if any(name in group for group in wave)]
