"""How many threads of a CPU an operation is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

ROWS_PER_THREAD = 4096


@contextmanager
def threads_for(rows: int) -> Iterator[None]:
    """Inside the block torch takes no more threads than one for each `ROWS_PER_THREAD` of so many rows: the scale search is of many
    small operations, whose threads wait for each other longer than they work (docs/log.md)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, max(1, rows // ROWS_PER_THREAD)))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
