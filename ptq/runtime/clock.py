"""Where the time goes: seconds by phase, measured on the GPU's own clock, so that nothing waits for anything to be timed."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch

Timestamp = torch.cuda.Event | float


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


class Clock:
    """Seconds by phase.  A phase inside a phase is not counted in the outer one."""

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._open: list[str] = []
        self._marks: list[tuple[str | None, Timestamp]] = []

    def mark(self) -> None:
        """From now on the time belongs to the innermost phase that is open."""
        self._marks.append((self._open[-1] if self._open else None, now(self._device)))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._open.append(name)
        self.mark()
        try:
            yield
        finally:
            self._open.pop()
            self.mark()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase so far; waits for the GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        totals: dict[str, float] = defaultdict(float)
        for (name, begin), (_, end) in pairwise(self._marks):
            if name is not None:
                totals[name] += seconds_between(begin, end)
        return dict(totals)


_running: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def timed(clock: Clock) -> Iterator[Clock]:
    """Phases entered inside the block are counted by `clock`."""
    token = _running.set(clock)
    try:
        yield clock
    finally:
        _running.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """The block's time counts as `name`, if anybody is counting."""
    clock = _running.get()
    if clock is None:
        yield
    else:
        with clock.phase(name):
            yield
