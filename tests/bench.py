"""Runs of scripts/quantize_llama.py on a tiny model, in forks that share what is imported; for scripts/torture.py."""

import os
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

from tqdm import tqdm

TRACEBACK = 99  # exit code of a run that ended in one
TESTS = Path(__file__).resolve().parent


class Bench:
    """The tiny model, its text, and runs on them."""

    def __init__(self, folder: Path, layers: int = 3, family: str = "llama"):
        tiny = runpy.run_path(str(TESTS / "tiny.py"))
        forks = runpy.run_path(str(TESTS / "kill_and_resume.py"))
        self.main, self.contents, self.folder = forks["script"](), forks["digest"], folder
        self.model = folder / "model"
        tiny["save_tiny"](self.model, family, num_hidden_layers=layers)
        (folder / "text.txt").write_text(tiny["TEXT"])
        about = ["--calibration", str(folder / "text.txt"), "--sequences", "8", "--length", "32", "--device", "cpu"]
        self.arguments = [str(self.model), *about]

    def command(self, output: Path, *options: str) -> list[str]:
        return [*self.arguments, *options, "--output", str(output)]

    def start(self, arguments: list[str]) -> tuple[int, Path]:
        """(process, file of what it says)."""
        said = self.folder / "said.txt"
        child = os.fork()
        if child == 0:
            descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the run has its own
            tqdm.set_lock(threading.RLock())  # its own is shared with all forks, and one may be killed while it has it
            code = TRACEBACK
            try:
                code = self.main(arguments)
            finally:  # whatever it raises must not go on in the parent's code
                if code == TRACEBACK:
                    traceback.print_exc()
                os._exit(code)
        return child, said

    def run(self, arguments: list[str]) -> tuple[int, str]:
        """(exit code, what it said)."""
        child, said = self.start(arguments)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, said.read_text()

    def reference(self, *options: str) -> tuple[dict[str, bytes], float]:
        """(bytes of an undisturbed run, its seconds)."""
        output = self.folder / "reference"
        shutil.rmtree(output, ignore_errors=True)
        begin = time.monotonic()
        code, said = self.run(self.command(output, *options))
        assert code == 0, said
        return self.contents(output), time.monotonic() - begin
