"""Runs of scripts/quantize_llama.py on a tiny model, in forks that share what is imported; for scripts/torture.py."""

import os
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__
from tqdm import tqdm

TRACEBACK = 99  # exit code of a run that ended in one
TESTS = Path(__file__).resolve().parent


def remove(output: Path) -> None:
    for path in (output, output.with_name(f"{output.name}.unfinished")):
        shutil.rmtree(path, ignore_errors=True)


def one_line(said: str) -> bool:
    return said.count("\n") == 1 and said.startswith(("error: ", "error on rank ", "stopped by "))


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

    def start(self, arguments: list[str], name: str = "said.txt", **environment: str) -> tuple[int, Path]:
        """(process, file of what it says)."""
        said = self.folder / name
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
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

    def start_ranks(self, arguments: list[str], size: int) -> list[tuple[int, Path]]:
        """The same for each rank; alone without a group.  They meet at a store of this process, as at torchrun's."""
        if size == 1:
            return [self.start(arguments)]
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)} for rank in range(size)]
        return [self.start(arguments, f"said.{rank['RANK']}.txt", **meet, **rank) for rank in ranks]

    def wait(self, children: Sequence[int]) -> list[int]:
        """Their exit codes.  As torchrun does, once one has failed the others are asked to end, and 30 s later killed."""
        codes: dict[int, int] = {}
        asked = None
        while len(codes) < len(children):
            for child in (child for child in children if child not in codes):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif asked is None and any(codes.values()):
                    os.kill(child, signal.SIGTERM)
                    asked = time.monotonic()
                elif asked is not None and time.monotonic() - asked > 30:
                    os.kill(child, signal.SIGKILL)
            time.sleep(0.005)
        return [codes[child] for child in children]

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
