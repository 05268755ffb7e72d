#!/usr/bin/env python
"""How long `ptq plan` takes for a small model of each family, beside `import torch`, in CPU seconds (least of --repeats).

python scripts/bench_plan.py [FAMILY…] [--gguf FILE]
"""

import argparse
import resource
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from ptq.models.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent


def seconds(*command: str) -> float:
    """User and system time of a process and what it started."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="default: all that are supported")
    parser.add_argument("--gguf", type=Path, help="a GGUF file too")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    save_tiny = runpy.run_module("tests.tiny")["save_tiny"]
    floor = min(seconds("-c", "import torch") for _ in range(args.repeats))
    print(f"| model | `ptq plan`, s | of `import torch` ({floor:.1f} s) |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        models = {family: Path(temporary, family) for family in args.families or FAMILIES}
        for family, folder in models.items():
            save_tiny(folder, family)
        for name, path in (models | ({args.gguf.name: args.gguf.resolve()} if args.gguf else {})).items():
            took = min(seconds("-m", "ptq.cli", "plan", str(path)) for _ in range(args.repeats))
            print(f"| {name} | {took:.1f} | {took / floor:.2f} × |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
