"""Ranks that hear of each other: one that is dead, stopped or cut off is named long before a collective gives up on it."""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event, Thread

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

INTERVAL, SILENCE = 2.0, 30.0  # seconds
DONE = "done"


@contextmanager
def heartbeat(rank: int, size: int, *, interval: float = INTERVAL, silence: float = SILENCE) -> Iterator[None]:
    """While the block runs, this rank says every `interval` that it lives, and listens to the next one.

    Where that one is silent for `silence`, its number is printed and the process ends with 1: torchrun ends the others.  A thread
    does it, so a rank whose work takes long is not silent; one that hangs in its work is, by the collectives' own timeout.
    """
    ended = Event()
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=silence)
    )
    thread = Thread(target=beat_and_listen, args=(store, rank, (rank + 1) % size, ended, interval, silence), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def beat_and_listen(store: TCPStore, rank: int, other: int, ended: Event, interval: float, silence: float) -> None:
    heard, last, count = time.monotonic(), "", 0
    while not ended.wait(interval):
        count += 1
        try:
            store.set(f"heartbeat {rank}", str(count))
            found = store.get(f"heartbeat {other}").decode() if store.check([f"heartbeat {other}"]) else ""
        except DistError:
            return  # the store is gone, and with it whoever ends the job
        if found not in (last, DONE):
            heard, last = time.monotonic(), found
        if found != DONE and time.monotonic() - heard > silence:
            sys.stderr.write(
                f"error on rank {rank}: rank {other} has been silent for {silence:.0f} s; it is dead, stopped or cut off\n"
            )
            sys.stderr.flush()
            os._exit(1)
    try:
        store.set(f"heartbeat {rank}", DONE)
    except DistError:
        return
