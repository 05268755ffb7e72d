"""The only hooks in this library."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

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


def observe_inputs(
    linears: Iterable[nn.Module],
    observe: Callable[[nn.Module, Tensor, Tensor | None], None],
    last: nn.Module | None,
    run: Callable[[], Tensor],
) -> Tensor | None:
    """run(), a forward pass during which observe(linear, x, tokens) is called with the input x of each linear before it
    runs, and which of the batch's tokens those are (None: all).

    The pass ends when `last` has been observed, whose own product is not computed, and None is returned; without `last`,
    what run() returns.  (No context manager: from Python 3.12 on, one that swallows an exception leaves a cycle of
    references to all that the forward pass held, which is gigabytes until the garbage collector comes by.)
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not _observed.get():
            return
        observe(module, args[0], _tokens.get())
        if module is last:
            raise StopForward

    handles = [linear.register_forward_pre_hook(hook) for linear in linears]
    try:
        return run()
    except StopForward:
        return None
    finally:
        for handle in handles:
            handle.remove()


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
