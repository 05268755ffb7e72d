"""Ranks that hear of each other: one that is dead, stopped, cut off or hangs is named long before a collective gives up on it."""

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

INTERVAL, SILENCE, PATIENCE = 2.0, 30.0, 45.0  # seconds
IDLE = 0.01  # of a core: who uses less does nothing.  Threads of torch and NCCL that only look around use less.
DONE = "done"
_waits: list[None] = []  # of the main thread: not empty inside `may_wait`
_meetings: list[float] = []  # of the main thread: since when it is in a collective, if it is


@contextmanager
def may_wait() -> Iterator[None]:
    """The main thread's block may wait for other ranks or for the disk, as long as that takes: it does not hang there."""
    _waits.append(None)
    try:
        yield
    finally:
        _waits.pop()


@contextmanager
def meeting() -> Iterator[None]:
    """The main thread's block needs the other ranks to come to the same place."""
    _meetings.append(time.monotonic())
    try:
        with may_wait():
            yield
    finally:
        _meetings.pop()


def waited() -> float:
    """How many seconds this rank has been in a collective; 0 where it is not."""
    return time.monotonic() - _meetings[0] if _meetings else 0.0


@contextmanager
def heartbeat(
    rank: int, size: int, *, interval: float = INTERVAL, silence: float = SILENCE, patience: float = PATIENCE
) -> Iterator[None]:
    """While the block runs, this rank says every `interval` that it lives, listens to the next one, and watches itself.

    Where the next one is silent for `silence`, or this process does nothing for as long outside of `may_wait`, its number is
    printed and the process ends with 1: torchrun ends the others.  A thread does it, so a rank whose work takes long is neither.
    A loop without end, a disk that does not answer and a collective that does not end cannot be told from work that takes long: a
    rank for which the next one has waited `patience` says where it is, and so does one that has been in a collective with it for
    as long.  Nothing is ended for that; the collectives' own timeout does.
    """
    ended = threading.Event()
    store = TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=silence)
    )
    arguments = (store, rank, (rank + 1) % size, ended, interval, silence, patience)
    thread = threading.Thread(target=beat_and_listen, args=arguments, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def beat_and_listen(
    store: TCPStore, rank: int, other: int, ended: threading.Event, interval: float, silence: float, patience: float
) -> None:
    heard, last, count, work, said = time.monotonic(), "", 0, Work(silence), set[str]()
    while not ended.wait(interval):
        count += 1
        try:
            store.set(f"heartbeat {rank}", f"{count} {waited():.0f}")
            found = store.get(f"heartbeat {other}").decode() if store.check([f"heartbeat {other}"]) else ""
        except DistError:
            return  # the store is gone, and with it whoever ends the job
        if found not in (last, DONE):
            heard, last = time.monotonic(), found
        if found != DONE and time.monotonic() - heard > silence:
            end(f"error on rank {rank}: rank {other} has been silent for {silence:.0f} s; it is dead, stopped or cut off\n")
        if work.has_ended():
            stack = "".join(traceback.format_stack(main_frame()))
            end(f"error on rank {rank}: rank {rank} has done nothing for {silence:.0f} s; it hangs here:\n{stack}")
        theirs, mine = float(found.partition(" ")[2] or 0), waited()
        if theirs > patience and (mine > patience or not mine) and (place := where()) not in said:
            if ended.is_set():  # the main thread may be on its way out of the block by now
                break
            said.add(place)
            whom = f"both it and rank {other} have been in a collective" if mine else f"rank {other} has waited for this one"
            tell(f"rank {rank}: {whom} for {theirs:.0f} s; it is at {place}\n")
    try:
        store.set(f"heartbeat {rank}", DONE)
    except DistError:
        return


class Work:
    """This process's, by the time its threads but the calling one spend on a core."""

    def __init__(self, silence: float):
        self._silence = silence
        self._seen, self._used = time.monotonic(), self._now()

    def has_ended(self) -> bool:
        """Whether there has been next to none for `silence`, no waiting, and no process that this one started, as Triton's
        compiler is."""
        if _waits or self._now() - self._used > IDLE * self._silence or psutil.Process().children():
            self._seen, self._used = time.monotonic(), self._now()
        return time.monotonic() - self._seen > self._silence

    def _now(self) -> float:
        return time.process_time() - time.thread_time()


def main_frame() -> FrameType:
    return sys._current_frames()[threading.main_thread().ident or 0]


def where() -> str:
    """File and function of the innermost frame of this package that the main thread is in; of any frame where it is in none."""
    frames = [frame for frame, _ in traceback.walk_stack(main_frame())]
    ours = [
        frame
        for frame in frames
        if str(frame.f_globals.get("__name__")).startswith("ptq.") and frame.f_code.co_filename != __file__
    ]
    code = (ours or frames)[0].f_code
    return f"{'/'.join(Path(code.co_filename).parts[-3:])}, {code.co_name}"


def tell(message: str) -> None:
    sys.stderr.write(message)
    sys.stderr.flush()


def end(message: str) -> None:
    tell(message)
    os._exit(1)
