#!/usr/bin/env python
"""README's commands and its Python, from a wheel of this tree in a fresh environment, offline but for the installation.

    python scripts/readme_check.py --work build/readme

A tiny random model stands for those of the hub, a file for the text; what needs a GPU, an engine or the hub (vllm, push_to_hub)
and the clone's own `make` and `pip` are named and left out.  Prints a line a command, and ends with 1 where one fails.
"""

import argparse
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = re.compile(r"^(vllm|make|git|pip) ")
NAMES = {"meta-llama/Llama-3.2-1B": "stand-in", "HuggingFaceTB/SmolLM2-135M": "stand-in", "wikitext:test": "text.txt"}


def blocks(language: str) -> list[str]:
    """Of README.md, those in this language, with what stands for models and texts."""
    found = re.findall(rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    for name, here in NAMES.items():
        found = [block.replace(name, here) for block in found]
    return found


def install(work: Path) -> Path:
    """The bin folder of a fresh environment with the wheel and what it needs."""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # where a tree would pass for installed
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", work, ROOT], check=True, env=clean
    )
    subprocess.run([sys.executable, "-m", "venv", work / "venv"], check=True)
    pip = [work / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*pip, next(work.glob("*.whl"))], check=True, env=clean)
    return work / "venv" / "bin"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="it must not exist")
    work = parser.parse_args().work.resolve()
    work.mkdir(parents=True)
    tiny, binaries, failed = runpy.run_path(str(ROOT / "tests" / "tiny.py")), install(work), 0
    tiny["save_tiny"](work / "stand-in", max_position_embeddings=4096)
    (work / "text.txt").write_text(tiny["TEXT"] * 3)
    lines = [line.split("  #")[0].strip() for block in blocks("") for line in block.splitlines()]
    commands = [line for line in lines if re.match(r"(ptq|vllm|make|git|pip) ", line)]
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "HOME": str(work), "HF_HUB_OFFLINE": "1"}
    scripts = {"README's Python": "\n".join(blocks("python"))}
    for what in (*commands, *scripts):
        if LEFT_OUT.match(what):
            print(f"not run  {what}")
            continue
        code = re.sub(r"^.*push_to_hub.*\n", "", scripts.get(what, ""), flags=re.M)
        command = [binaries / "python", "-c", code] if code else ["bash", "-c", what]
        begin = time.monotonic()
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        failed += done.returncode != 0
        print(f"{'failed' if done.returncode else 'ran':8} {what} ({time.monotonic() - begin:.0f} s)", flush=True)
        if done.returncode:
            print(done.stderr[-2000:], flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
