"""Kills scripts/quantize_llama.py again and again and goes on with --resume; prints a JSON line with what happened.

    PYTHONPATH=. python tests/kill_and_resume.py KILLS SEED OUTPUT MODEL [arguments of quantize_llama.py]

OUTPUT/reference is written without interruption, OUTPUT/killed with SIGKILLs at moments drawn uniformly from the time that took.
Whenever a run ends before its kill, its files are compared and it begins anew.  Children are forked, so that only their work, not
the start of Python, is interrupted.
"""

import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import compressed_tensors.compressors  # noqa: F401  # else each fork would import it again
import torch
from tqdm import tqdm

import ptq.pipeline.run  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent


def script():
    spec = importlib.util.spec_from_file_location("quantize_llama", ROOT / "scripts" / "quantize_llama.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def start(main, arguments: list[str]) -> int:
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr
        tqdm.set_lock(threading.RLock())  # its own is shared with all forks, and one may be killed while it has it
        os._exit(main(arguments))
    return child


def digest(folder: Path) -> dict[str, bytes]:
    """All files but the report, which holds times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


def main() -> int:
    kills, seed, output, rest = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]
    torch.set_num_threads(1)
    run, draw = script(), random.Random(seed)
    begin = time.monotonic()
    assert os.waitpid(start(run, [*rest, "--output", str(output / "reference")]), 0)[1] == 0
    whole = time.monotonic() - begin
    expected, killed = digest(output / "reference"), output / "killed"
    found: list[int] = []
    ended = 0
    while len(found) < kills or not killed.exists():
        child = start(run, [*rest, "--output", str(killed), "--resume"])
        if len(found) < kills:
            time.sleep(draw.uniform(0, whole))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            found.append(len(list(killed.with_name("killed.unfinished").glob("layers/*.json"))))
        else:
            assert status == 0, status
        if killed.exists():  # also where the kill came after the last rename
            assert digest(killed) == expected
            ended += 1
            shutil.rmtree(killed)
            shutil.rmtree(killed.with_name("killed.unfinished"), ignore_errors=True)
            if len(found) >= kills:
                break
    result = {"kills": len(found), "layers finished at each": found, "finished and equal": ended, "seconds": whole}
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
