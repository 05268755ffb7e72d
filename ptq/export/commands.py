"""`convert` and `check` for a command line: what they take, and what they print.

Each run_* returns the exit status: 0, or 1 where `check` found an error.  ValueError is the caller's to print.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ptq.export.check import check
from ptq.export.convert import convert
from ptq.export.finding import ERROR, NOTE
from ptq.export.layouts import LAYOUTS


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes a 4-bit checkpoint in another layout: the same codes and scales, bit for bit, or a refusal by name."
    )
    parser.add_argument(
        "source", type=Path, metavar="CHECKPOINT", help="a folder in compressed-tensors, ModelOpt or GPTQ layout"
    )
    parser.add_argument("target", type=Path, metavar="TARGET", help="a folder that does not exist yet")
    parser.add_argument("--layout", required=True, choices=list(LAYOUTS), help="what TARGET is to be")


def run_convert(args: argparse.Namespace) -> int:
    done = convert(args.source, args.target, args.layout)
    linears = ", ".join(f"{count} {name}" for name, count in done.linears.items())
    print(f"{done.target}: {linears} linears, {done.from_layout} to {done.to_layout}, codes and scales unchanged")
    return 0


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = "Checks a 4-bit checkpoint, anyone's, against what readers and serving engines impose."
    parser.add_argument(
        "checkpoint", type=Path, metavar="CHECKPOINT", help="a folder in compressed-tensors, ModelOpt or GPTQ layout"
    )
    parser.add_argument("--json", action="store_true", help="findings as JSON")


def run_check(args: argparse.Namespace) -> int:
    findings = check(args.checkpoint)
    if args.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    for finding in [] if args.json else findings:
        print(f"{finding.severity}: {finding.place}: {finding.sentence}\n    {finding.remedy}")
    serious = sum(finding.severity != NOTE for finding in findings)
    if not args.json:
        print(f"{args.checkpoint}: {serious} errors and warnings, {len(findings) - serious} notes")
    return int(any(finding.severity == ERROR for finding in findings))
