"""Quantize a Llama-family model to 4 bits and say how much was lost.

    ptq quantize MODEL --output DIR
    ptq quantize meta-llama/Llama-3.2-1B --calibration wiki.jsonl.gz --evaluate test.txt --output out

MODEL is a local folder, a hub id or a .gguf file.  DIR gets a compressed-tensors checkpoint that vLLM and transformers load, a
model card and report.json.  With --evaluate, the original, RTN with absmax scales and the result are compared on that text.
"""

import argparse
import os
import sys
import tempfile
import warnings
from dataclasses import fields
from pathlib import Path

from ptq.cli.arguments import answered, as_record, quiet_transformers
from ptq.settings import (
    ACTIVATION_NAMES,
    BUILTIN_SEQUENCES,
    DRIFTS,
    DTYPES,
    EFFORTS,
    FORMAT_NAMES,
    IMPORTANCES,
    METHOD_NAMES,
    PLACES,
    RULE_NAMES,
    SEQUENCES,
    Settings,
)


def make_parser(prog: str | None) -> argparse.ArgumentParser:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=how)
    parser.add_argument("model", metavar="MODEL", help="local folder, hub id or .gguf file")
    add_method(parser.add_argument_group("method"))
    add_calibration(parser.add_argument_group("calibration"))
    result = parser.add_argument_group("result")
    result.add_argument("--output", type=Path, metavar="DIR", help="write a checkpoint there; it must not exist")
    result.add_argument("--plan", action="store_true", help="only say what would be done, what it takes, and what cannot work")
    result.add_argument("--evaluate", metavar="TEXT", help="perplexity and KL on this text, a source as for --calibration")
    result.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows only")
    add_machine(parser.add_argument_group("machine"))
    defaults = {field.name: field.default for field in fields(Settings)}
    parser.set_defaults(**defaults)
    return parser


def add_method(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--format", choices=FORMAT_NAMES, help="4-bit format (default: %(default)s)")
    about = "round inputs too, as engines do: nvfp4 is W4A4 (default: %(default)s)"
    group.add_argument("--activations", choices=ACTIVATION_NAMES, help=about)
    group.add_argument("--recipe", metavar="FILE", help="YAML with a recipe by linear, instead of what is said here")
    about = "bits a weight on average: each linear in --format, fp8 or bfloat16, by what it costs in KL"
    group.add_argument("--target-bits", type=float, metavar="BITS", help=about)
    group.add_argument("--method", choices=METHOD_NAMES, help="rounding method (default: %(default)s)")
    group.add_argument(
        "--effort",
        choices=EFFORTS,
        help="what gptq does where the next four do not say: fast, default or best (README has a table)",
    )
    group.add_argument("--rule", choices=RULE_NAMES, help="how block scales are chosen (rtn: local)")
    group.add_argument(
        "--token-importance",
        choices=IMPORTANCES,
        help="what tokens count for: all the same, or by the loss gradient, of the text or of labels the model draws",
    )
    group.add_argument("--drift", choices=DRIFTS, help="how much of what earlier layers lost each linear makes good")
    about = "feed rounding errors forward over rows too"
    group.add_argument("--row-feedback", action=argparse.BooleanOptionalAction, help=about)
    about = "scale channels before inputs are rounded, exactly (default: where inputs have four bits)"
    group.add_argument("--smooth", action=argparse.BooleanOptionalAction, help=about)
    group.add_argument("--block", type=int, help="weights per scale, for int4: 32, 64, 128 (default) or 256")
    group.add_argument("--damp", type=float, help="added to diag(H), relative to its mean (default: %(default)s)")
    group.add_argument("--ignore", nargs="+", metavar="NAME", help="linears to leave alone: a full name or re:PATTERN")


def add_calibration(group: argparse._ArgumentGroup) -> None:
    about = ".txt, .jsonl[.gz] (text or messages), dataset id or builtin (default)"
    group.add_argument("--calibration", metavar="TEXT", help=about)
    about = (
        f"calibration sequences (default: {SEQUENCES['default']}, at best {SEQUENCES['best']}; of builtin, {BUILTIN_SEQUENCES})"
    )
    group.add_argument("--sequences", type=int, metavar="N", help=about)
    group.add_argument("--length", type=int, metavar="N", help="tokens a sequence or window (default: %(default)s)")
    about = "more sequences, to measure every linear on (default: %(default)s)"
    group.add_argument("--validation", type=int, metavar="N", help=about)
    group.add_argument("--seed", type=int, help="which sequences are drawn (default: %(default)s)")


def add_machine(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    group.add_argument("--resume", action="store_true", help="go on with an unfinished run into --output, if there is one")
    group.add_argument("--batch", type=int, metavar="N", help="sequences that run at once (default: by the model's width)")
    group.add_argument("--hidden-states", choices=PLACES, help="where hidden states are (default: by their size)")
    about = "the same bits on 1, 2, 4 or 8 ranks (torchrun): one sequence at a time, all of a matrix on one rank"
    group.add_argument("--deterministic", action="store_true", help=about)
    group.add_argument("--dtype", choices=DTYPES, help="to run in (default: as stored)")


def parse_arguments(argv: list[str] | None, prog: str | None = None) -> tuple[argparse.Namespace, Settings]:
    """(model, output and plan; everything else)."""
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    try:
        settings = as_record(Settings, args)
    except ValueError as error:  # begins with the field's name
        name, space, rest = str(error).partition(" ")
        parser.error(f"--{name.replace('_', '-')}{space}{rest}")
    if args.output is None and args.evaluate is None and not args.plan:
        parser.error("nothing to do: give --output, --evaluate or both, or --plan")
    return args, settings


def quantize(args: argparse.Namespace, settings: Settings) -> str | None:
    """The report in short; on ranks other than 0 None."""
    from ptq.pipeline.run import run
    from ptq.run.summary import summary

    with tempfile.TemporaryDirectory() as temporary:
        output = args.output or Path(temporary) / "checkpoint"
        report = run(args.model, settings, output.absolute())
    return None if report is None else summary(report)


def tell_plan(args: argparse.Namespace, settings: Settings) -> int:
    from ptq.pipeline.preview import preview

    print(preview(args.model, settings, args.output).text())
    return 0


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    args, settings = parse_arguments(argv, prog)
    if args.plan:
        return answered(lambda: tell_plan(args, settings))
    import torch
    from safetensors import SafetensorError

    from ptq.export.checkpoint import ReadBackError
    from ptq.run.record import CertificateError
    from ptq.run.resume import unfinished_folder
    from ptq.runtime.stop import say_stopped, stoppable

    quiet_transformers()
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # said of every first backward pass on a GPU
    rank = os.environ.get("RANK", "0")
    try:
        with stoppable():
            text = quantize(args, settings)
        if text is not None:
            print(text)
    except (
        ValueError,
        OSError,
        SafetensorError,
        CertificateError,
        ReadBackError,
        MemoryError,
        torch.OutOfMemoryError,
    ) as error:
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        return say_stopped(stopped, args.output and unfinished_folder(args.output))
    return 0
