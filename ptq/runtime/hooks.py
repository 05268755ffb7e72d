"""The only hooks in this library, and the forward pass that pauses at them."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TypeVar

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

T = TypeVar("T")
Observe = Callable[..., object]
"""observe(linear, x, tokens) with the input x of a linear, and which of the batch's tokens that is of (None: all)."""

_tokens: ContextVar[Tensor | None] = ContextVar("tokens", default=None)
_observed: ContextVar[bool] = ContextVar("observed", default=True)


@contextmanager
def routed(tokens: Tensor, *, observed: bool = True) -> Iterator[None]:
    """Inside the block a linear's input is of these tokens only: numbers (t,) into the batch's tokens, flattened; and if not
    `observed`, no observer is told of it."""
    before = _tokens.set(tokens), _observed.set(observed)
    try:
        yield
    finally:
        _tokens.reset(before[0])
        _observed.reset(before[1])


def observed_tokens() -> Tensor | None:
    """To be called by an observer: which of the batch's tokens a linear's input is of, None for all."""
    return _tokens.get()


class StopForward(Exception):
    """Ends a forward pass whose rest nobody needs."""


class Forward(greenlet):
    """A forward pass, run(), that pauses at a linear and goes on from there with the weights as they are then.

    It holds what its frames hold, until it has ended or is closed.  `frozen`: the weights will not change.  Then linears are
    observed with their outputs, and none runs twice.
    """

    def __init__(self, run: Callable[[], Tensor], *, frozen: bool = False):
        super().__init__(run)
        self.gr_context = copy_context()
        self.frozen = frozen
        self._observe: Observe | None = None
        self._last: Collection[nn.Module] = ()
        self._together = self._reached = False

    def observe(self, linears: Iterable[nn.Module], observe: Observe, last: Collection[nn.Module] = ()) -> Tensor | None:
        """Goes on, calling observe(linear, x, tokens) before each of the linears runs, or observe(linear, x, tokens, y) after it
        where the pass is frozen.

        Pauses and returns None when one of `last` has been observed, or all that run `together` with it; where none is, goes on
        to the end and returns what run() does.  No hook outlives the call, nor does the pass keep `observe`.
        """
        self._observe, self._last = observe, last
        register = [linear.register_forward_hook if self.frozen else linear.register_forward_pre_hook for linear in linears]
        handles = [one(self._hook) for one in register]
        self.parent = getcurrent()  # where a pause leads
        try:
            result = self.switch()
            return result if self.dead else None
        finally:
            self._observe, self._last = None, ()
            for handle in handles:
                handle.remove()

    def close(self) -> None:
        """Lets go of what a pass holds that will not go on.  Garbage may be collected while another pass runs: back to that."""
        if not self.dead:
            self.parent = getcurrent()
            self.throw()

    def _hook(self, module: nn.Module, args: tuple[Tensor, ...], *output: Tensor) -> None:
        if not _observed.get():
            return
        assert self._observe
        self._observe(module, args[0], _tokens.get(), *output)
        if module in self._last:
            self._reached = True
            if not self._together:
                self.pause()

    def pause(self) -> None:
        self._reached = False
        self.parent.switch()  # type: ignore[union-attr]


def together(run: Callable[[], T]) -> T:
    """run(), whose linears do not depend on each other: a pass that is to pause at one of them pauses when all have been
    observed, and runs them again when it goes on, if their weights may have changed."""
    forward = getcurrent()
    if not isinstance(forward, Forward):
        return run()
    forward._together = True
    result: T | None = run()
    forward._together = False
    if forward._reached and forward.frozen:
        forward.pause()
    elif forward._reached:
        result = None  # not to be held meanwhile
        forward.pause()
        return run()
    return result  # type: ignore[return-value]


def observe_inputs(
    linears: Iterable[nn.Module], observe: Observe, last: nn.Module | None, run: Callable[[], Tensor]
) -> Tensor | None:
    """run(), a forward pass during which observe(linear, x, tokens) is called before each linear runs.

    The pass ends when `last` has been observed, whose own product is not computed, and None is returned; without `last`,
    what run() returns.
    """
    forward = Forward(run)
    try:
        return forward.observe(linears, observe, () if last is None else (last,))
    finally:
        forward.close()


@contextmanager
def observe_outputs(linears: Iterable[nn.Module], observe: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls observe(linear, x, y) with input x and output y of each linear as it runs; no hook outlives the block."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if _observed.get():
            observe(module, args[0], output)

    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_product(linear: nn.Linear, note: Callable[[Tensor], object]) -> Iterator[None]:
    """Inside the block the linear adds nothing: note(x) is called with its input, and its output is -0, which added to any
    number gives that number, to the bit."""

    def forward(x: Tensor) -> Tensor:
        note(x)
        return x.new_full((), -0.0).expand(*x.shape[:-1], linear.out_features)

    linear.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del linear.forward


@contextmanager
def replace_inputs(replace: Mapping[nn.Module, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block each of these linears runs on replace[linear](x) instead of its input x, which is also what observers
    that come later see; no hook outlives the block."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return replace[module](args[0]), *args[1:]

    handles = [linear.register_forward_pre_hook(hook) for linear in replace]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
