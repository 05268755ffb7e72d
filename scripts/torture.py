#!/usr/bin/env python
"""Faults at random moments, and what became of the work; prints a JSON line a kind of fault, and fails where anything was lost.

    python scripts/torture.py all --work build/torture
    python scripts/torture.py dense ranks --work DIR --faults 60 --seed 1

Every run quantizes a tiny model on the CPU.  A fault is survived where the same command with --resume then gives the bytes of a run
that nothing disturbed, and where a run that cannot go on says so in one line.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import ptq.pipeline.run

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
BENCH, SIGNALS = (runpy.run_path(str(TESTS / name)) for name in ("bench.py", "signals.py"))
Bench, remove, one_line = (BENCH[name] for name in ("Bench", "remove", "one_line"))
LONG = {"long": ["--effort", "fast"], "long, drift": ["--rule", "local"]}
WAYS, kills, ranks = (SIGNALS[name] for name in ("WAYS", "kills", "ranks"))


def disk(bench: Any, faults: int, draw: random.Random) -> Counter:
    """A file system that is full after so many bytes, from none to all that a run writes; then larger, and the run goes on."""
    place, found = bench.folder / "disk", Counter()
    place.mkdir(exist_ok=True)
    expected, _ = bench.reference("--effort", "best")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True).returncode:
        return Counter({"not allowed to mount": 1})
    ptq.pipeline.run.check_output = lambda *_: None  # it would refuse a disk that is too small at once
    output = place / "out"
    command = bench.command(output, "--effort", "best")
    try:
        for fault in range(faults):
            size = 16 + 4 * round(fault * 160 / faults)
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(place)], check=True)
            code, said = bench.run([*command, "--resume"])
            found["tried"] += 1
            found["full, said in one line"] += code == 1 and one_line(said) and "No space left" in said
            found["lost"] += code not in (0, 1) or (code == 1 and not one_line(said))
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            code = code and bench.run([*command, "--resume"])[0]
            found["finished and equal"] += code == 0 and bench.contents(output) == expected
            found["lost"] += code != 0 or bench.contents(output) != expected
            remove(output)
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    return found


def vanished(bench: Any, faults: int, draw: random.Random) -> Counter:
    """The unfinished folder is removed, or its checkpoint is, while the run goes on; and one output is given to two runs."""
    output, found = bench.folder / "vanished", Counter()
    expected, whole = bench.reference()
    folder = output.with_name("vanished.unfinished")
    for fault in range(faults):
        child, said = bench.start(bench.command(output))
        time.sleep(draw.uniform(0.3, 0.9) * whole)
        if fault % 3 == 0:
            told = bench.folder / "first.txt"
            said.rename(told)
            code, second = bench.run(bench.command(output, "--resume"))
            fine = (code == 1 and one_line(second)) or code == 0
        else:
            told, fine = said, True
            shutil.rmtree(folder if fault % 3 == 1 else folder / "checkpoint", ignore_errors=True)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        whole_there = output.exists() and bench.contents(output) == expected
        fine = fine and ((code == 0 and whole_there) or (code == 1 and one_line(told.read_text()) and not output.exists()))
        found["tried"] += 1
        found["refused in one line" if code else "finished and equal"] += fine
        found["lost"] += not fine
        if not fine:
            sys.stderr.write(f"vanished {fault}: exit {code}, {told.read_text()[-500:]}\n")
        remove(output)
    return found


def damaged(good: bytes, draw: random.Random, *, cut: bool) -> tuple[bytes, int]:
    """A model's file cut short, or with a bit of it turned; and where."""
    at = draw.randrange(len(good))
    return (good[:at] if cut else good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :]), at


def shards(bench: Any, faults: int, draw: random.Random) -> Counter:
    """The model's file is cut short, or a bit of it turned, before a run or before its --resume: refused, or another model."""
    output, found, path = bench.folder / "shards", Counter(), bench.model / "model.safetensors"
    good = path.read_bytes()
    _, whole = bench.reference()
    for fault in range(faults):
        bad, at = damaged(good, draw, cut=not fault % 2)
        if fault % 4 > 1:  # a run is killed, and the model is another when it is gone on with
            child, _ = bench.start(bench.command(output))
            time.sleep(0.7 * whole)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        begun = (output.with_name("shards.unfinished") / "fingerprint.json").is_file()
        path.write_bytes(bad)
        code, said = bench.run(bench.command(output, "--resume")) if not output.exists() else (1, "error: \n")
        path.write_bytes(good)
        refused = code == 1 and one_line(said)
        changed = fault % 2 and not begun and code == 0  # a bit of a weight: another model, as good as any
        found["tried"] += 1
        found["refused in one line"] += refused
        found["another model from the start"] += bool(changed)
        found["lost"] += not refused and not changed
        if not refused and not changed:
            sys.stderr.write(f"shards {fault}, byte {at}: exit {code}, {said[-500:]}\n")
        remove(output)
    return found


def changed(bench: Any, faults: int, draw: random.Random) -> Counter:
    """The model's file is written to while a run reads it, a bit of it turned or its end cut off: refused, or all of one model."""
    output, found, path = bench.folder / "changed", Counter(), bench.model / "model.safetensors"
    good = path.read_bytes()
    expected, whole = bench.reference()
    for fault in range(faults):
        bad, at = damaged(good, draw, cut=fault % 2 == 1)
        child, told = bench.start(bench.command(output))
        time.sleep(draw.uniform(0, whole))
        path.write_bytes(bad)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        outcome = "lost"
        if code == 1 and one_line(told.read_text()):
            outcome = "refused in one line"
        elif code == -signal.SIGBUS:  # the file was mapped when it was cut: the kernel's answer
            outcome = "ended by SIGBUS"
        elif code == 0 and bench.contents(output) == expected:
            outcome = "finished and equal"
        elif code == 0:
            clean = bench.folder / "clean"
            again, _ = bench.run(bench.command(clean))
            outcome = "all of the other model" if again == 0 and bench.contents(clean) == bench.contents(output) else "lost"
            remove(clean)
        path.write_bytes(good)
        found.update({"tried": 1, outcome: 1})
        if outcome == "lost":
            sys.stderr.write(f"changed {fault}, byte {at}: exit {code}, {told.read_text()[-500:]}\n")
        remove(output)
    return found


def long_run(bench: Any, layers: int, options: list[str]) -> Counter:
    """Memory, open files and time a layer of a model of so many layers, from the tenth on: flat."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    deep, seen = Bench(folder, layers), []
    child, said = deep.start(deep.command(folder / "out", *options))
    layers_done = folder / "out.unfinished" / "layers"
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        done = len(list(layers_done.glob("*.json"))) if layers_done.is_dir() else 0
        if done and (not seen or done >= seen[-1][0] + 10):
            pages = int(Path(f"/proc/{child}/statm").read_text().split()[1])
            seen.append((done, time.monotonic(), pages * 4096 / 2**20, len(os.listdir(f"/proc/{child}/fd"))))
        time.sleep(0.02)
    assert (folder / "out").is_dir(), said.read_text()
    (first, t0, memory, files), (middle, t1, _, _), (last, t2, memory2, files2) = seen[1], seen[len(seen) // 2], seen[-1]
    found = Counter({"layers": layers, "MB grown": round(memory2 - memory), "files grown": files2 - files})
    early, late = (t1 - t0) / (middle - first), (t2 - t1) / (last - middle)
    found |= Counter({"ms a layer, first half": round(1000 * early), "ms a layer, second half": round(1000 * late)})
    found["lost"] = int(memory2 - memory > 0.05 * layers or files2 > files + 2 or late > 1.5 * early)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = [*WAYS, "ranks", "disk", "vanished", "shards", "changed", *LONG, "fuzz", "numerics"]
    parser.add_argument("kinds", nargs="+", choices=["all", *kinds])
    parser.add_argument("--work", type=Path, required=True, help="a folder for all that is written; it is made")
    parser.add_argument("--faults", type=int, default=60, help="of each kind (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=100_000, help="of each parser that is fuzzed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    lost = 0
    for kind in kinds if "all" in args.kinds else args.kinds:
        begin = time.monotonic()
        if kind in ("fuzz", "numerics"):
            found = Counter(
                {"lost": subprocess.run(outside(kind, args), cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode}
            )
        else:
            family = WAYS[kind][0] if kind in WAYS else "llama"
            bench, draw = (
                Bench(Path(tempfile.mkdtemp(dir=args.work.resolve())), family=family),
                random.Random(f"{kind} {args.seed}"),
            )
            others = {"ranks": ranks, "disk": disk, "vanished": vanished, "shards": shards, "changed": changed}
            if kind in WAYS:
                found = kills(bench, args.faults, draw, kind)
            else:
                found = long_run(bench, 200, LONG[kind]) if kind in LONG else others[kind](bench, args.faults, draw)
            shutil.rmtree(bench.folder)
        lost += found["lost"]
        print(json.dumps({"kind": kind, **found, "seconds": round(time.monotonic() - begin)}), flush=True)
    return lost > 0


def outside(kind: str, args: argparse.Namespace) -> list[str]:
    if kind == "fuzz":
        return [sys.executable, str(TESTS / "fuzz.py"), str(args.cases), str(args.seed)]
    profile = ["--hypothesis-profile", "long", "--hypothesis-seed", str(args.seed)]
    return [sys.executable, "-m", "pytest", str(TESTS / "test_numerics.py"), *profile]


if __name__ == "__main__":
    sys.exit(main())
