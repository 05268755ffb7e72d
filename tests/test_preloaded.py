"""The Python that tests start scripts with is one from the outside."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .preloaded import preloaded

PROGRAM = """
import os, signal, sys, time
def stop(number, _):
    sys.exit(f"stopped by {number}")
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    print(os.getpid(), os.getcwd(), os.environ["SAID"], *sys.argv, sys.stdin.read(), flush=True)
    {do}
"""
WAITS = "while True: time.sleep(0.01)"  # a signal that comes just before signal.pause() would be waited for


@pytest.fixture(scope="module", params=["fresh", "preloaded"])
def either(request):
    if request.param == "fresh":
        yield sys.executable
        return
    with preloaded() as python:
        yield python


@pytest.fixture
def start(either, tmp_path):
    """start(what a program does) is its process, and the line that it printed first."""

    def begin(do: str) -> tuple[subprocess.Popen, list[str]]:
        (tmp_path / "program.py").write_text(PROGRAM.replace("{do}", do))
        command, environment = [either, "program.py", "an argument"], os.environ | {"SAID": "something"}
        streams = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **streams)
        assert running.stdin and running.stdout
        running.stdin.write("given")
        running.stdin.close()
        running.stdin = None
        return running, running.stdout.readline().split()

    return begin


def test_it_has_its_surroundings_and_says_how_it_ended(start, tmp_path):
    for do, code, said in (
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('why')", 1, "why\n"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, ""),
    ):
        running, line = start(do)
        assert line[1:] == [str(tmp_path), "something", "program.py", "an", "argument", "given"]
        assert (*running.communicate(), running.returncode) == ("", said, code)
    running, _ = start("1 / 0")
    assert running.communicate()[1].endswith("ZeroDivisionError: division by zero\n") and running.returncode == 1


def test_signals_reach_it(start):
    running, _ = start(WAITS)
    running.terminate()
    assert running.communicate() == ("", "stopped by 15\n") and running.returncode == 1
    running, line = start(WAITS)
    running.kill()
    assert running.wait() == -signal.SIGKILL
    until = time.monotonic() + 10
    while Path("/proc", line[0]).exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    running.communicate()
