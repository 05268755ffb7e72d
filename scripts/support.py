#!/usr/bin/env python
"""Make README's table of families from what the tests say.

python scripts/support.py           # runs the tests of every family, writes docs/support.csv, then the table
python scripts/support.py --table   # the table alone, from docs/support.csv and benchmarks/serving.csv
"""

import argparse
import csv
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import torch
import transformers

from ptq.models.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- made by scripts/support.py -->\n", "<!-- end -->\n"
FIELDS = ["family", "check", "outcome", "torch", "transformers"]
CHECKS = {
    "test_replaying_the_layers_gives_the_models_logits": "replayed",
    "test_a_streamed_model_is_the_one_in_memory": "streamed",
    "test_transformers_reads_it_back_bit_for_bit": "read back",
}
FORMATS = ("nvfp4", "mxfp4", "int4")
NAMES = {
    "llama": "Llama 2 and 3.x, SmolLM2",
    "smollm3": "SmolLM3",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2 and 2.5",
    "qwen3": "Qwen3",
    "phi3": "Phi-3 and 4",
    "granite": "Granite",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 (text)",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "cohere2": "Cohere 2",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2-MoE",
    "qwen3_moe": "Qwen3-MoE",
    "olmoe": "OLMoE",
    "llama4_text": "Llama 4 (text, dense layers)",
    "granitemoe": "Granite-MoE",
    "gpt_oss": "gpt-oss (not its MXFP4 release: dequantize that first)",
}


def run_tests() -> list[dict[str, str]]:
    """A row for each family and check."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = ["tests/test_models.py", "tests/test_export.py", "-k", " or ".join(CHECKS)]
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests, f"--junitxml={report}"], cwd=ROOT, check=False)
        cases = ElementTree.parse(report).iter("testcase")
        outcomes: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for case in cases:
            test, ids = re.fullmatch(r"(\w+)\[(.*)\]", case.attrib["name"]).groups()  # type: ignore[union-attr]
            words = ids.split("-")
            family = next(word for word in words if word in FAMILIES)
            format = next((word for word in words if word in FORMATS), "")
            passed = case.find("failure") is None and case.find("error") is None and case.find("skipped") is None
            outcomes[family, f"{CHECKS[test]} {format}".strip()].append(passed)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return [
        {"family": family, "check": check, "outcome": "equal" if all(found) else "differs", **versions}
        for (family, check), found in sorted(outcomes.items(), key=lambda item: (list(FAMILIES).index(item[0][0]), item[0][1]))
    ]


def engine_differences(rows: list[dict[str, str]]) -> dict[str, dict[str, float]]:
    """Of each family and format, the largest |NLL in the engine - NLL in transformers|."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        name = row["model"].removesuffix("-tiny")
        family = name if name in FAMILIES else "llama"
        worst = found[family].get(row["format"], 0.0)
        found[family][row["format"]] = max(worst, abs(float(row["difference"])))
    return found


def make_table(support: list[dict[str, str]], serving: list[dict[str, str]]) -> str:
    """Families with the same cells share a line."""
    versions = sorted({f"transformers {row['transformers']}" for row in support})
    serving = [row for row in serving if row["engine"].startswith("vllm") and row["layout"] == "compressed-tensors"]
    engines = sorted({row["engine"] for row in serving})
    differences = engine_differences(serving)
    lines: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for family, about in FAMILIES.items():
        outcomes = {row["check"]: row["outcome"] for row in support if row["family"] == family}
        layers = "equal" if outcomes["replayed"] == outcomes["streamed"] == "equal" else "differs"
        equal = [format.upper() for format in FORMATS if outcomes[f"read back {format}"] == "equal"]
        engine = ", ".join(f"{format.upper()} {worst:.4f}" for format, worst in differences[family].items())
        read = ", ".join(equal) + (" ¹" if about.experts else "")
        lines[layers, read, engine.replace(" 0.", " .") or "not run"].append(NAMES[family])
    read_by, served_by = f"read back by {', '.join(versions)}", f"{', '.join(engines)}: NLL off by"
    table = [f"| families | layers replayed, streamed | {read_by}: equal logits | {served_by} |", "|---|---|---|---|"]
    table += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in lines.items()]
    return "\n".join(table) + "\n"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def current_table(root: Path = ROOT) -> str:
    return make_table(read(root / "docs" / "support.csv"), read(root / "benchmarks" / "serving.csv"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="run no tests")
    if not parser.parse_args().table:
        rows = run_tests()
        with (ROOT / "docs" / "support.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(f"{before}{BEGIN}{current_table()}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
