"""The only hooks in this library."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class StopForward(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def observe_outputs(linears: Iterable[nn.Module], observe: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls observe(linear, x, y) with input x and output y of each linear as it runs; no hook outlives the block."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        observe(module, args[0], output)

    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def observe_inputs(
    linears: Iterable[nn.Module],
    observe: Callable[[nn.Module, Tensor], None],
    last: nn.Module | None,
    run: Callable[[], Tensor],
) -> Tensor | None:
    """run(), a forward pass during which observe(linear, x) is called with the input x of each linear before it runs.

    The pass ends when `last` has been seen, whose own product is not computed, and None is returned; without `last`, what run()
    returns.  (No context manager: from Python 3.12 on, one that swallows an exception leaves a cycle of references to all
    that the forward pass held, which is gigabytes until the garbage collector comes by.)
    """

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        observe(module, args[0])
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
