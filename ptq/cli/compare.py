"""Many methods and formats on one model, from one calibration pass: accuracy against bits per weight, with time.

    ptq compare MODEL --calibration c4.jsonl.gz --text wiki.test.raw --output results/llama
    ptq compare MODEL --formats nvfp4 --cases rtn-absmax-none gptq-joint-sampled --text test.txt --output DIR

The Hessians of the unquantized model are collected once and kept in DIR/hessians; every case solves all linears against them, and
its result is written to DIR as soon as it is there.  The same command again goes on where it stopped.  --sequential calibrates each
case by itself on the layers quantized before, as `ptq quantize` does: slower, and what a checkpoint would have.  Cases that end
in -half, -full (drift) or -rows (row feedback) are always run so; the table says which were.
"""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from ptq.cli.arguments import answered, as_record, check_least, quiet_transformers
from ptq.settings import CASES, FORMAT_NAMES, Comparison


def parse_arguments(argv: list[str] | None, prog: str | None = None) -> Comparison:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="local folder, hub id or .gguf file, not quantized")
    parser.add_argument("--formats", nargs="+", choices=FORMAT_NAMES, help="default: all but one")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="EFFORT|METHOD-RULE-IMPORTANCE[-half|-full][-rows][-frozen]",
        help=f"default: {' '.join(CASES)}",
    )
    parser.add_argument("--block", type=int, metavar="N", help="weights a scale of int4")
    parser.add_argument("--damp", type=float, help="default: %(default)s")
    parser.add_argument("--calibration", metavar="TEXT", help="as `ptq quantize` (default: %(default)s)")
    parser.add_argument("--sequences", type=int, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, metavar="N", help="tokens a sequence or window (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="which sequences are drawn (default: %(default)s)")
    parser.add_argument("--text", required=True, metavar="TEXT", help="for perplexity and KL")
    parser.add_argument("--windows", type=int, metavar="N", help="the first N windows only")
    parser.add_argument("--sequential", action="store_true", help="calibrate each case by itself")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="results, report and Hessians")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    required = ("model", "text", "output", "device")
    parser.set_defaults(**{field.name: field.default for field in fields(Comparison) if field.name not in required})
    args = parser.parse_args(argv)
    check_least(parser, args, {"sequences": 1, "length": 2, "windows": 1})
    return as_record(Comparison, args)


def compare(settings: Comparison) -> int:
    from ptq.eval.report import markdown
    from ptq.pipeline.compare import run
    from ptq.runtime.distributed import local_device

    quiet_transformers()
    print(markdown(run(replace(settings, device=local_device(settings.device)))), end="")
    return 0


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    settings = parse_arguments(argv, prog)
    return answered(lambda: compare(settings), f"{settings.output} holds the cases that were done, the same command goes on")
