"""Ctrl-C and SIGTERM end a run in one line that says how to go on."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stoppable() -> Iterator[None]:
    """Either signal raises KeyboardInterrupt with its number, so that what is open is closed; a second one ends the process at
    once, which loses nothing that has its name.  Only the main thread may enter."""

    def stop(number: int, _frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, lambda number, _frame: os._exit(128 + number))
        raise KeyboardInterrupt(number)

    before = {each: signal.signal(each, stop) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def say_stopped(stopped: KeyboardInterrupt, unfinished: Path | None) -> int:
    """Prints the line, and returns the exit code.  `unfinished`: where what is done is, if it is kept."""
    number = stopped.args[0] if stopped.args else signal.SIGINT
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    kept = unfinished is not None and unfinished.is_dir()
    after = f"{unfinished} keeps what is done, and the same command with --resume goes on" if kept else "nothing was kept"
    sys.stderr.write(f"stopped by {by}; {after}\n")
    sys.stderr.flush()
    return 128 + number
