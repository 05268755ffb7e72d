"""The hidden states between two layers, for all calibration sequences: on the device, or in pinned host memory.

Work goes over them batch by batch.  From host memory the next batch is copied while the present one is worked on.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ptq.runtime.adapter import Adapter, Layer

# Of the device's memory, what may be taken by hidden states before they go to host memory.
DEVICE_SHARE = 1 / 8


# Elements of the hidden states that are worked on at once.  On a GPU, where a layer of 4096 takes 16384 tokens, a larger batch is
# no faster; half of it is slower by the time it takes to launch kernels.
ELEMENTS_AT_ONCE = {"cuda": 2**26, "cpu": 2**23}


def default_batch(width: int, length: int, device: torch.device, *, experts: bool = False) -> int:
    """Sequences of `length` tokens to work on at once; of a mixture four times as many, since each expert sees a few of them."""
    return max(1, ELEMENTS_AT_ONCE[device.type] * (4 if experts else 1) // (width * length))


def belongs_on_host(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of activations are too many for the device."""
    return device.type == "cuda" and size > DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory


class Activations:
    """Hidden states (sequences, length, d), overwritten in place layer after layer.  `batch`: sequences worked on at once.

    `on_host`: in pinned host memory; None: where there are too many for the device.  `groups`: sequences that no batch mixes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        batch: int,
        on_host: bool | None = None,
        groups: Sequence[slice] | None = None,
    ):
        self.groups = [slice(0, shape[0])] if groups is None else list(groups)
        size = shape[0] * shape[1] * shape[2] * dtype.itemsize
        self.on_host = device.type == "cuda" and (belongs_on_host(size, device) if on_host is None else on_host)
        try:
            self.data = torch.empty(shape, dtype=dtype, device="cpu" if self.on_host else device, pin_memory=self.on_host)
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"out of memory for the hidden states of {shape[0]} sequences of {shape[1]} tokens, {size / 1e9:.1f} GB; set "
                f"--hidden-states host, or give fewer or shorter sequences ({str(error).splitlines()[0]})"
            ) from error
        self.device, self.batch, self.halved = device, batch, False
        self._ahead: dict[tuple[int, int], tuple[Tensor, torch.cuda.Event]] = {}
        self._copies = torch.cuda.Stream(device) if self.on_host else None
        self._stored = torch.cuda.Event() if self.on_host else None

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def length(self) -> int:
        """Of each sequence."""
        return self.data.shape[1]

    def load(self, rows: slice) -> Tensor:
        """Sequences `rows` on the device."""
        if self._copies is None:
            return self.data[rows]
        x, arrived = self._ahead.pop((rows.start, rows.stop), None) or self._fetch(rows)
        self._ahead.clear()
        after = slice(rows.stop, min(2 * rows.stop - rows.start, len(self)))
        if after.start < after.stop:
            self._ahead[after.start, after.stop] = self._fetch(after)
        torch.cuda.current_stream(self.device).wait_event(arrived)
        x.record_stream(torch.cuda.current_stream(self.device))
        return x

    def store(self, rows: slice, x: Tensor) -> None:
        self.data[rows].copy_(x, non_blocking=True)
        if self._stored is not None:
            self._stored.record(torch.cuda.current_stream(self.device))

    def empty_like(self, on_host: bool | None = None) -> "Activations":
        """Uninitialized activations of the same shape and place."""
        return Activations(self.data.shape, self.data.dtype, self.device, self.batch, on_host, self.groups)

    def copy(self, on_host: bool | None = None) -> "Activations":
        """A copy of the present state."""
        other = self.empty_like(on_host)
        other.data.copy_(self.data, non_blocking=True)
        if other._stored is not None:
            other._stored.record(torch.cuda.current_stream(self.device))
        return other

    def _fetch(self, rows: slice) -> tuple[Tensor, torch.cuda.Event]:
        assert self._copies is not None and self._stored is not None
        self._copies.wait_event(self._stored)
        arrived = torch.cuda.Event()
        with torch.cuda.stream(self._copies):
            x = self.data[rows].to(self.device, non_blocking=True)
            arrived.record(self._copies)
        return x, arrived

    def at_once(self, groups: Sequence[slice], divisor: int = 1) -> int:
        """Sequences that run at once: a `divisor`-th of the batch, no more than the largest of the `groups` has, one at least."""
        return max(1, min(self.batch // divisor, max(group.stop - group.start for group in groups)))

    def halve(self, phase: str, error: torch.OutOfMemoryError, at_once: int, divisor: int) -> None:
        """Half of the sequences that ran `at_once`, saying so.  Raises OutOfMemoryError with what to set where it was one."""
        if at_once == 1:
            place = "" if self.on_host or self.device.type != "cuda" else "set --hidden-states host, or "
            raise torch.OutOfMemoryError(
                f"out of memory in phase {phase!r} with one sequence at a time; {place}give fewer or shorter sequences "
                f"({str(error).splitlines()[0]})"
            ) from error
        self.batch, self.halved = at_once // 2 * divisor, True
        self._ahead.clear()
        left = f"{at_once // 2} sequences at once" if at_once > 3 else "one sequence at a time"
        warnings.warn(f"out of memory in phase {phase!r}: going on with {left}", stacklevel=2)


def embed_all(
    adapter: Adapter,
    batches: Sequence[Tensor],
    on_host: bool | None = None,
    groups: Sequence[slice] | None = None,
    *,
    embedding: Layer | None = None,
    hidden: Activations | None = None,
) -> Activations:
    """The first layer's input for all sequences, by `embedding` in the place of the model's own; a batch is as many of them as
    the first of `batches` has.  `hidden`: what is overwritten with it."""
    start = 0
    for tokens in batches:
        x = adapter.embed(tokens, embedding)
        if hidden is None:
            shape = (sum(len(part) for part in batches), *x.shape[1:])
            hidden = Activations(shape, x.dtype, x.device, len(batches[0]), on_host, groups)
        rows = slice(start, start + len(x))
        hidden.store(rows, x)
        start = rows.stop
    assert hidden is not None and hidden.groups[-1].stop == start
    return hidden


def each_batch(
    hidden: Activations,
    phase: str,
    work: Callable[[slice], None],
    *,
    groups: Sequence[slice] | None = None,
    divisor: int = 1,
    restart: Callable[[], None] | None = None,
) -> None:
    """work(rows) for the batches of `groups` (all without), in order, each of a `divisor`-th of the usual size at most.

    Out of memory halves the batch and goes on with the batch that failed, or, with `restart`, calls it and begins again.
    """
    groups = hidden.groups if groups is None else groups
    first = start = groups[0].start
    while start < groups[-1].stop:
        end = next(group.stop for group in groups if start < group.stop)
        at_once = hidden.at_once(groups, divisor)
        rows = slice(start, min(start + at_once, end))
        try:
            work(rows)
        except torch.OutOfMemoryError as error:
            hidden.halve(phase, error, at_once, divisor)
        else:
            start = rows.stop
            continue
        # Outside of the handler, whose traceback keeps the tensors of the failed batch alive.
        torch.cuda.empty_cache()
        if restart is not None:
            restart()
            start = first


def propagate(adapter: Adapter, layer: Layer, hidden: Activations, phase: str) -> None:
    """Turns the layer's input into its output."""

    def work(rows: slice) -> None:
        hidden.store(rows, adapter.forward(layer, hidden.load(rows)))

    each_batch(hidden, phase, work)
