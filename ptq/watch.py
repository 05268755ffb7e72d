"""The only hooks in this library."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from torch import Tensor, nn


class SeenEnough(Exception):
    """Ends a forward pass whose rest nobody needs."""


@contextmanager
def watch_linears(linears: Iterable[nn.Module], see: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls see(linear, x, y) with input x and output y of each linear as it runs; the hooks are gone when the block is left."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        see(module, args[0], output)

    handles = [linear.register_forward_hook(hook) for linear in linears]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_inputs(
    linears: Iterable[nn.Module], see: Callable[[nn.Module, Tensor], None], last: nn.Module | None
) -> Iterator[None]:
    """Calls see(linear, x) with the input x of each linear before it runs.  The forward pass ends, and the block is left, when
    `last` has been seen, whose own product is not computed; it runs to its end if that is None."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        see(module, args[0])
        if module is last:
            raise SeenEnough

    handles = [linear.register_forward_pre_hook(hook) for linear in linears]
    try:
        with suppress(SeenEnough):
            yield
    finally:
        for handle in handles:
            handle.remove()
