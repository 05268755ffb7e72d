#!/usr/bin/env python
"""Evaluate models side by side: token perplexity, KL to the first, bits per byte, lm-eval tasks, size, bits per weight.

    python scripts/evaluate.py ORIGINAL QUANTIZED --text wiki.test.txt --tasks arc_easy,piqa --output results/llama
    python scripts/evaluate.py ORIGINAL QUANTIZED --tasks arc_easy,wikitext --task-data DIR --limit 200 --output results/quick

A MODEL is a local folder, a hub id or a .gguf file, quantized by whomever, if transformers loads it.  With --task-data the tasks
are lm-eval's own on local files, without network.  Writes PREFIX.md, PREFIX.html and PREFIX.NAME.json for each model.
docs/evaluation.md says what the numbers mean.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm

from ptq.data.text import read_documents
from ptq.eval.checkpoint import Loaded, bits_per_weight, load_any, size_on_disk
from ptq.eval.harness import run_tasks, task_manager
from ptq.eval.logits import KeptLogits, Logits
from ptq.eval.logits import run as run_model
from ptq.eval.report import markdown, page
from ptq.eval.results import labels, provenance, stamp, surroundings, write
from ptq.eval.text import First, Text, measure_text, tokenize
from ptq.models.loading import locate, quiet


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how, allow_abbrev=False)
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
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    machine.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="to run unquantized models in (default: as stored)",
    )
    args = parser.parse_args(argv)
    for name, least in {"length": 2, "windows": 1, "limit": 1, "fewshot": 0, "max_length": 2}.items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.batch_size != "auto":
        if not args.batch_size.isdecimal() or int(args.batch_size) < 1:
            parser.error(f"--batch-size {args.batch_size}: must be a positive number or auto")
        args.batch_size = int(args.batch_size)
    args.tasks = list(dict.fromkeys(name for name in (args.tasks or "").split(",") if name))
    if args.task_data and not args.tasks:
        parser.error("--task-data needs --tasks")
    return args


def run(args: argparse.Namespace) -> list[dict]:
    """The whole job: one result a model, each written as soon as it is there."""
    for source in args.models:
        locate(source)
    paths = {label: Path(f"{args.output}.{label}.json") for label in labels(args.models)}
    check_outputs(args, list(paths.values()))
    documents = read_documents(args.text) if args.text else []
    first = Reference(args, next(iter(paths)))
    results = []
    with quiet(), task_manager(args.tasks, args.task_data, args.fewshot) if args.tasks else nullcontext() as manager:
        for (label, path), source in zip(paths.items(), args.models, strict=True):
            wanted = settings(args, source)
            earlier = json.loads(path.read_text()) if args.reuse and path.is_file() else {}
            if earlier.get("settings") == wanted:
                results.append(earlier)
                continue
            loaded = first.load() if not results else load(source, args)
            result = describe(label, source, loaded, args) | {"settings": wanted, "text": None, "tasks": {}}
            if args.text:
                result["text"] = measure(label, loaded, documents, args, first, results[0]["text"] if results else None)
            if manager is not None:
                chosen = {name: getattr(args, name) for name in ("limit", "fewshot", "batch_size", "max_length")}
                result["tasks"] = run_tasks(loaded.model, loaded.tokenizer, args.tasks, manager, **chosen)
            write(path, json.dumps(result, indent=1))
            results.append(result)
            first.release()
            del loaded  # before the next model needs the memory
    write(Path(f"{args.output}.md"), markdown(results))
    write(Path(f"{args.output}.html"), page(results))
    return results


class Reference:
    """The first model, loaded when it is needed, and its logits, which are computed once and kept in a file."""

    def __init__(self, args: argparse.Namespace, label: str):
        self._args, self._label = args, label
        self._loaded: Loaded | None = None
        self._kept: KeptLogits | None = None

    def load(self) -> Loaded:
        self._loaded = self._loaded or load(self._args.models[0], self._args)
        return self._loaded

    def logits(self, windows: int) -> Logits:
        """Those of the first `windows` windows, for which they are kept unless `--logits again` or nothing else needs them."""
        if self._args.logits == "again" or len(self._args.models) == 1:
            return self._compute
        folder = Path(self._args.logits) if self._args.logits else self._args.output.absolute().parent
        folder.mkdir(parents=True, exist_ok=True)
        self._kept = self._kept or KeptLogits(self._compute, folder, windows)
        return self._kept

    def _compute(self, index: int, window: Tensor) -> Tensor:
        return run_model(self.load().model, self._label)(index, window)

    def release(self) -> None:
        """Drops the model where its logits are all there."""
        if self._kept and self._kept.complete:
            self._loaded = None


def load(source: str, args: argparse.Namespace) -> Loaded:
    """Raises ValueError where the windows are longer than the model's context."""
    loaded = load_any(source, dtype=None if args.dtype == "auto" else getattr(torch, args.dtype), device=args.device)
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    for name in ("length",) * bool(args.text) + ("max_length",) * bool(args.max_length):
        if context and getattr(args, name) > context:
            raise ValueError(f"{source} has a context of {context} tokens; give --{name.replace('_', '-')} {context} or less")
    return loaded


def check_outputs(args: argparse.Namespace, paths: Sequence[Path]) -> None:
    """Raises ValueError where results would be overwritten, or cannot be written."""
    present = [path for path in paths if path.exists()]
    if present and not args.reuse:
        raise ValueError(f"{present[0]} is there already; --reuse takes it, or give another --output")
    parent = next(path for path in args.output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {args.output} cannot be made: {parent} is not a folder one may write to")


def settings(args: argparse.Namespace, source: str) -> dict[str, Any]:
    """What a result depends on: a result is reused only where this is the same."""
    chosen = ("text", "length", "windows", "tasks", "limit", "fewshot", "batch_size", "max_length", "device", "dtype")
    data = str(args.task_data) if args.task_data else None
    files = {str(model): stamp(model) for model in (source, args.models[0], *filter(None, (args.text, data)))}
    return {name: getattr(args, name) for name in chosen} | {"task_data": data, "model": source, "files": files}


def describe(label: str, source: str, loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    return {
        "label": label,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "bytes": size_on_disk(loaded.files),
        "bits_per_weight": bits_per_weight(loaded.model, loaded.files),
        "load_seconds": loaded.seconds,
        **provenance(source),
        **surroundings(args.device),
    }


def measure(
    label: str, loaded: Loaded, documents: list[str], args: argparse.Namespace, first: Reference, earlier: dict | None
) -> dict[str, Any]:
    """The text's part of a result, with a progress bar.  earlier: the first model's; None for that model itself."""
    text = Text(args.text, documents, args.length, args.windows)
    tokens = tokenize(label, loaded, text)
    kept = first.logits(len(tokens.windows))
    logits, other = run_model(loaded.model, label), None
    if earlier is None:
        logits = kept
    else:
        other = First(kept, earlier["fingerprint"], earlier["vocabulary"])
    return measure_text(label, loaded, logits, text, tokens, other, lambda w: tqdm(w, label, unit="window", disable=None))


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        print(markdown(run(args)), end="")
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {args.output}.*.json holds the models that were done, --reuse takes them", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
