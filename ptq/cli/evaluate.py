"""Evaluate models side by side: token perplexity, KL to the first, bits per byte, lm-eval tasks, size, bits per weight.

    ptq evaluate ORIGINAL QUANTIZED --text wiki.test.txt --tasks arc_easy,piqa --output results/llama
    ptq evaluate ORIGINAL QUANTIZED --tasks arc_easy,wikitext --task-data DIR --limit 200 --output results/quick

A MODEL is a local folder, a hub id or a .gguf file, quantized by whomever, if transformers loads it.  With --task-data the tasks
are lm-eval's own on local files, without network.  Writes PREFIX.md, PREFIX.html and PREFIX.NAME.json for each model.
docs/evaluation.md says what the numbers mean.
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from ptq.cli.arguments import answered, as_record, check_least, quiet_transformers
from ptq.settings import Evaluation


def parse_arguments(argv: list[str] | None, prog: str | None = None) -> Evaluation:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=how, allow_abbrev=False)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the first is what the others are compared with")
    text = parser.add_argument_group("text")
    text.add_argument(
        "--text", metavar="TEXT", help="for perplexity and KL: .txt, .jsonl[.gz], or a name as in docs/evaluation.md"
    )
    text.add_argument("--length", type=int, default=2048, metavar="N", help="tokens a window (default: %(default)s)")
    text.add_argument("--windows", type=int, metavar="N", help="the first N windows only")
    text.add_argument(
        "--logits",
        metavar="DIR",
        help="keep the first model's logits in a temporary file there (default: beside the output); or `again`: run it anew "
        "beside every other model, which is faster where it is small and the disk slow",
    )
    tasks = parser.add_argument_group("lm-eval")
    tasks.add_argument("--tasks", metavar="A,B", help="names that lm-eval knows")
    tasks.add_argument("--task-data", type=Path, metavar="DIR", help="take the items from NAME.SPLIT.jsonl[.gz] there, offline")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N items of each task only")
    tasks.add_argument("--fewshot", type=int, metavar="N", help="examples in the prompt (default: as each task defines)")
    tasks.add_argument("--batch-size", default="8", metavar="N", help="a number or auto (default: %(default)s)")
    tasks.add_argument("--max-length", type=int, metavar="N", help="longest sequence (default: as the model's config)")
    result = parser.add_argument_group("result")
    result.add_argument("--output", type=Path, required=True, metavar="PREFIX", help="files get names that begin so")
    result.add_argument("--reuse", action="store_true", help="take the results of an earlier run with the same settings")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    machine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="to run unquantized models in (default: as stored)",
    )
    args = parser.parse_args(argv)
    check_least(parser, args, {"length": 2, "windows": 1, "limit": 1, "fewshot": 0, "max_length": 2})
    if args.batch_size != "auto":
        if not args.batch_size.isdecimal() or int(args.batch_size) < 1:
            parser.error(f"--batch-size {args.batch_size}: must be a positive number or auto")
        args.batch_size = int(args.batch_size)
    args.tasks = list(dict.fromkeys(name for name in (args.tasks or "").split(",") if name))
    if args.task_data and not args.tasks:
        parser.error("--task-data needs --tasks")
    return as_record(Evaluation, args)


def evaluate(settings: Evaluation) -> int:
    from ptq.eval.report import markdown
    from ptq.pipeline.evaluate import run
    from ptq.runtime.distributed import local_device

    quiet_transformers()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    print(markdown(run(replace(settings, device=local_device(settings.device)))), end="")
    return 0


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    settings = parse_arguments(argv, prog)
    return answered(lambda: evaluate(settings), f"{settings.output}.*.json holds the models that were done, --reuse takes them")
