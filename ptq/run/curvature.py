"""The curvature of the loss in linears' outputs, for row feedback: written as the backward pass comes by, read layer by layer."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptq.calibrate.importance import KeepCurvature
from ptq.core.linalg import pack_symmetric
from ptq.export.files import save_tensors
from ptq.runtime.memory import free_share

WRITERS = 2
# The part of a device's memory that is free where matrices may wait there to be written.
ROOM_TO_WAIT = 0.5


class Curvature(Mapping[str, Tensor]):
    """G of each linear by full name, packed (ptq.core.linalg.pack_symmetric), a file each, read when it is asked for: a model's
    may be more than its weights."""

    def __init__(self, folder: Path):
        self._folder = folder

    @contextmanager
    def writer(self) -> Iterator[KeepCurvature]:
        """keep(name, G) writes G while more is worked on, and waits where what is not written fills the GPU; all is on the disk
        when the block is left."""
        waiting: deque[Future] = deque()

        def keep(name: str, G: Tensor) -> None:
            while waiting and (waiting[0].done() or free_share(G.device) < ROOM_TO_WAIT):
                waiting.popleft().result()
            self._folder.mkdir(exist_ok=True)
            write = partial(save_tensors, self._folder / f"{name}.safetensors", {"G": pack_symmetric(G)})
            waiting.append(pool.submit(beside(write, G.device)))

        with ThreadPoolExecutor(WRITERS) as pool:
            yield keep
            for written in waiting:
                written.result()

    def __getitem__(self, name: str) -> Tensor:
        return load_file(self._folder / f"{name}.safetensors")["G"]

    def __iter__(self) -> Iterator[str]:
        return (path.stem for path in sorted(self._folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Ahead(Mapping[str, Tensor]):
    """Of these `names`, read in another thread from now on, while the layer's inputs are collected: into pinned memory where a GPU
    is to have them."""

    def __init__(self, curvature: Mapping[str, Tensor], names: Sequence[str], device: torch.device):
        def read(name: str) -> Tensor:
            packed = curvature[name]
            if device.type != "cuda":
                return packed
            with torch.cuda.device(device):  # a thread begins on the first one
                return packed.pin_memory()

        pool = ThreadPoolExecutor(1)
        self._read = {name: pool.submit(read, name) for name in names}
        pool.shutdown(wait=False)

    def __getitem__(self, name: str) -> Tensor:
        return self._read[name].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def beside(write: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """write() for another thread: on a GPU on a stream of its own, once what is queued there now is done."""
    if device.type != "cuda":
        return write
    ready = torch.cuda.Event()
    ready.record()

    def run() -> None:
        stream = torch.cuda.Stream(device)
        stream.wait_event(ready)
        with torch.cuda.stream(stream):
            write()

    return run
