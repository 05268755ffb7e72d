"""Signals at random moments to one process and to ranks, for scripts/torture.py."""

import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
BENCH = runpy.run_path(str(TESTS / "bench.py"))
remove, one_line = BENCH["remove"], BENCH["one_line"]
process_of_rank = runpy.run_path(str(TESTS / "processes.py"))["process_of_rank"]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
WAYS = {  # by kind: family, options of the run, ranks
    "dense": ("llama", [], 1),
    "mixture": ("qwen3_moe", [], 1),
    "row feedback": ("llama", ["--effort", "best"], 1),
    "mixture, row feedback": ("qwen3_moe", ["--effort", "best"], 1),
    "two ranks": ("llama", ["--deterministic"], 2),
    "mixture, two ranks": ("qwen3_moe", ["--deterministic"], 2),
}


def kills(bench: Any, faults: int, draw: random.Random, way: str) -> Counter:
    """Signals at moments drawn from the time a run takes, one after the other in the same work, until it is finished.  Of two
    ranks one gets it or both do, as by Ctrl-C in a terminal."""
    _, options, size = WAYS[way]
    output, found = bench.folder / "killed", Counter()
    command = bench.command(output, *options, "--resume")
    expected, whole = bench.reference(*options)
    while found["tried"] < faults:
        number, struck = draw.choice(SIGNALS), draw.choice([[rank] for rank in range(size)] + [[*range(size)]])
        children, said = zip(*bench.start_ranks(command, size), strict=True)
        time.sleep(draw.uniform(0, whole))
        begin = time.monotonic()
        for rank in struck:
            os.kill(children[rank], number)
        codes, told = bench.wait(children), [path.read_text() for path in said]
        found.update({"tried": 1, signal.Signals(number).name: 1})
        found["slowest end in seconds"] = max(found["slowest end in seconds"], round(time.monotonic() - begin))
        for rank, code in enumerate(codes):
            outcome = of_signal(code, told[rank], number if rank in struck else None, size)
            found[outcome] += 1
            if outcome == "lost":
                sys.stderr.write(f"{way}, {signal.Signals(number).name} to {struck}: exits {codes}, {told[rank][-1500:]}\n")
        if output.exists():
            found["finished and equal"] += bench.contents(output) == expected
            found["lost"] += bench.contents(output) != expected
            remove(output)
    children, _ = zip(*bench.start_ranks(command, size), strict=True)
    found["lost"] += any(bench.wait(children)) or bench.contents(output) != expected
    remove(output)
    return found


def of_signal(code: int, said: str, number: int | None, size: int) -> str:
    """What became of a process that got the signal, or of one whose other rank did and that was then asked to end."""
    if code == 0:
        return "ended before"
    if -code in SIGNALS or (size > 1 and not said and code == 128 + signal.SIGTERM):
        return "ended at once"  # before the run began, when the fork has no handler yet; or by a second signal
    if number != signal.SIGKILL and code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        return "stopped in one line" if one_line(said) and ("--resume" in said or "nothing was kept" in said) else "lost"
    # Python may say before that a signal came while a generator was closed.
    last = said.splitlines(keepends=True)[-1:]
    return "other rank gone, said in one line" if size > 1 and code == 1 and last and one_line(last[0]) else "lost"


def ranks(bench: Any, faults: int, draw: random.Random) -> Counter:
    """One of two ranks is killed or stopped, or torchrun gets Ctrl-C; --deterministic, so that resumed bytes are comparable."""
    output, options, found = bench.folder / "ranks", ["--deterministic"], Counter()
    expected, _ = bench.reference(*options)
    script = [*TORCHRUN, str(ROOT / "scripts" / "quantize_llama.py"), *bench.command(output, *options, "--resume")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for fault in range(faults):
        kind = ("killed", "stopped", "Ctrl-C")[fault % 3]
        job = subprocess.Popen(script, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        while job.poll() is None and not (output.with_name("ranks.unfinished") / "layers").is_dir():
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        begin, rank = time.monotonic(), draw.randrange(2)
        process = process_of_rank(rank, job.pid)
        if process is not None:
            os.kill(job.pid if kind == "Ctrl-C" else process, {"killed": 9, "stopped": 19, "Ctrl-C": 2}[kind])
        said = job.communicate(timeout=120)[0]
        found["tried"] += 1
        found[kind] += 1
        found["slowest end in seconds"] = max(found["slowest end in seconds"], round(time.monotonic() - begin))
        named = (
            f"rank {rank} has been silent" in said or f"rank      : {rank}" in said or kind == "Ctrl-C" or job.returncode == 0
        )
        found["lost"] += not named
        if not named:
            sys.stderr.write(said[-2000:])
    if not output.exists():
        found["lost"] += subprocess.run(script, env=environment, capture_output=True).returncode != 0
    found["finished and equal"] += bench.contents(output) == expected
    found["lost"] += bench.contents(output) != expected
    remove(output)
    return found
