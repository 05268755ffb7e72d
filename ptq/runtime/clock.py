"""Phases of the work, and time on the GPU's own clock, so that nothing waits for anything to be timed."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

Timestamp = torch.cuda.Event | float
Phase = Callable[[str], AbstractContextManager[None]]


def now(device: torch.device | str) -> Timestamp:
    """This point in the device's work."""
    if torch.device(device).type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(begin: Timestamp, end: Timestamp) -> float:
    """Both of one device; the work up to `end` must be done."""
    if isinstance(begin, torch.cuda.Event):
        return begin.elapsed_time(end) / 1e3  # type: ignore[arg-type]
    return end - begin  # type: ignore[operator]


_count: ContextVar[Phase] = ContextVar("phase", default=lambda _name: nullcontext())


def phase(name: str) -> AbstractContextManager[None]:
    """The block's work counts as `name`, if anybody is counting."""
    return _count.get()(name)


@contextmanager
def timed(count: Phase) -> Iterator[None]:
    """Each phase entered inside the block enters count(name) too."""
    token = _count.set(count)
    try:
        yield
    finally:
        _count.reset(token)
