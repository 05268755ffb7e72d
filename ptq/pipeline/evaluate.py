"""Models side by side, one after the other in memory; what `ptq evaluate` does."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ptq.data.text import read_texts
from ptq.eval.checkpoint import Loaded, bits_per_weight, load_any, size_on_disk
from ptq.eval.harness import run_tasks, task_manager
from ptq.eval.logits import KeptLogits, Logits
from ptq.eval.logits import run as run_model
from ptq.eval.report import markdown, page
from ptq.eval.results import labels, provenance, stamp, surroundings, write
from ptq.eval.text import First, Text, measure_text, tokenize
from ptq.models.loading import quiet
from ptq.models.location import locate
from ptq.runtime.memory import out_of_memory_says
from ptq.settings import Evaluation


@out_of_memory_says("give a shorter --length, --dtype bfloat16 or --batch-size 1; --reuse takes the models that were done")
def run(args: Evaluation) -> list[dict]:
    """The whole job: one result a model, each written as soon as it is there."""
    for source in args.models:
        locate(source)
    paths = {label: Path(f"{args.output}.{label}.json") for label in labels(args.models)}
    check_outputs(args, list(paths.values()))
    documents = read_texts(args.text) if args.text else []
    first = Reference(args, next(iter(paths)))
    results = []
    with quiet(), task_manager(list(args.tasks), args.task_data, args.fewshot) if args.tasks else nullcontext() as manager:
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
                result["tasks"] = run_tasks(loaded.model, loaded.tokenizer, list(args.tasks), manager, **chosen)
            write(path, json.dumps(result, indent=1))
            results.append(result)
            first.release()
            del loaded  # before the next model needs the memory
    write(Path(f"{args.output}.md"), markdown(results))
    write(Path(f"{args.output}.html"), page(results))
    return results


class Reference:
    """The first model, loaded when it is needed, and its logits, which are computed once and kept in a file."""

    def __init__(self, args: Evaluation, label: str):
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


def load(source: str, args: Evaluation) -> Loaded:
    """Raises ValueError where the windows are longer than the model's context."""
    loaded = load_any(source, dtype=None if args.dtype == "auto" else getattr(torch, args.dtype), device=args.device)
    context = getattr(loaded.model.config, "max_position_embeddings", None)
    for name in ("length",) * bool(args.text) + ("max_length",) * bool(args.max_length):
        if context and getattr(args, name) > context:
            raise ValueError(f"{source} has a context of {context} tokens; give --{name.replace('_', '-')} {context} or less")
    return loaded


def check_outputs(args: Evaluation, paths: Sequence[Path]) -> None:
    """Raises ValueError where results would be overwritten, or cannot be written."""
    present = [path for path in paths if path.exists()]
    if present and not args.reuse:
        raise ValueError(f"{present[0]} is there already; --reuse takes it, or give another --output")
    parent = next(path for path in args.output.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {args.output} cannot be made: {parent} is not a folder one may write to")


def settings(args: Evaluation, source: str) -> dict[str, Any]:
    """What a result depends on: a result is reused only where this is the same."""
    chosen = ("text", "length", "windows", "tasks", "limit", "fewshot", "batch_size", "max_length", "device", "dtype")
    data = str(args.task_data) if args.task_data else None
    files = {str(model): stamp(model) for model in (source, args.models[0], *filter(None, (args.text, data)))}
    return {name: getattr(args, name) for name in chosen} | {
        "tasks": list(args.tasks),
        "task_data": data,
        "model": source,
        "files": files,
    }


def describe(label: str, source: str, loaded: Loaded, args: Evaluation) -> dict[str, Any]:
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
    label: str, loaded: Loaded, documents: list[str], args: Evaluation, first: Reference, earlier: dict | None
) -> dict[str, Any]:
    """The text's part of a result, with a progress bar.  earlier: the first model's; None for that model itself."""
    assert args.text is not None
    text = Text(args.text, documents, args.length, args.windows)
    tokens = tokenize(label, loaded, text)
    kept = first.logits(len(tokens.windows))
    logits, other = run_model(loaded.model, label), None
    if earlier is None:
        logits = kept
    else:
        other = First(kept, earlier["fingerprint"], earlier["vocabulary"])
    return measure_text(label, loaded, logits, text, tokens, other, lambda w: tqdm(w, label, unit="window", disable=None))
