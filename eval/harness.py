"""lm-eval on a model in memory: its own task definitions, prompts, metrics and numbers.

lm-eval is imported where it is used, since that takes seconds.  Offline, a definition is included unchanged from the installed
package and only its dataset is replaced by local files (ptq.eval.tasks).
"""

import hashlib
import importlib.util
import math
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq.eval.paired import Item, aggregation_of, standard_error
from ptq.eval.tasks import LOCAL, SPLITS, check_names, check_tasks

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # lm-eval's own
BOOTSTRAP = 1000  # draws for the few metrics that have no closed form


@contextmanager
def task_manager(names: Sequence[str], data: Path | None, fewshot: int | None = None) -> "Iterator[TaskManager]":
    """lm-eval's registry that holds these tasks; with `data`, a folder of task files, it never asks the network.

    Raises ValueError for unknown names and for unusable task files, before anything is evaluated.
    """
    if data is None:
        from lm_eval.tasks import TaskManager

        manager = TaskManager()
        check_names(names, manager.all_tasks, "lm-eval")
        yield manager
        return
    files = check_tasks(names, data, fewshot)
    with tempfile.TemporaryDirectory() as folder, offline():
        from lm_eval.tasks import TaskManager

        for name in names:
            definition = local_definition(name, files[name], Path(folder) / "cache")
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(definition))
        yield TaskManager(include_path=folder, include_defaults=False)


def local_definition(name: str, files: Mapping[str, Path], cache: Path) -> dict[str, Any]:
    """A task's YAML: lm-eval's, included, with `files` (split to path) for its dataset."""
    spec = importlib.util.find_spec("lm_eval")
    assert spec and spec.origin
    used = {"train": "training_split", "validation": "validation_split", "test": "test_split"}
    splits = {used[split]: split if split in files else None for split in SPLITS}
    source = {"data_files": {split: str(path) for split, path in files.items()}, "cache_dir": str(cache)}
    include = Path(spec.origin).parent / "tasks" / LOCAL[name].config
    return {
        "include": str(include),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": source,
    } | splits


@contextmanager
def offline() -> Iterator[None]:
    """Requests to the Hugging Face hub fail inside."""
    import datasets
    import huggingface_hub

    with (
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_DATASETS_OFFLINE", True),
    ):
        yield


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    manager: "TaskManager",
    *,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int | str = 8,
    max_length: int | None = None,
) -> dict[str, dict[str, Any]]:
    """For each task (and group) {fewshot, samples, fingerprint, metrics}.

    A metric, named as lm-eval does ("acc,none"), has `value`, `stderr` (lm-eval's, else by linearization, else None),
    `higher_is_better`, and where its value is a function of one ratio of sums also `aggregation` and `items`
    (ptq.eval.paired).  fingerprint: a hash of the evaluated items.  limit: items a task; max_length: None as the model's config.
    Raises ValueError where lm-eval cannot load a task's data, and for logits that are not finite, naming the layer.
    """
    from lm_eval.evaluator import evaluate

    from ptq.eval.checked import Checked

    # Its prints belong to a log.
    with redirect_stdout(sys.stderr), patch.dict(os.environ, DISABLE_MULTIPROC="1"), compiled_once():
        lm = Checked(
            pretrained=model,
            tokenizer=tokenizer,  # type: ignore[arg-type]
            batch_size=batch_size,
            max_length=max_length,
        )
        results = evaluate(lm, load(names, manager, fewshot), limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True)
    assert results is not None
    return {name: task_result(name, results) for name in results["results"]}


@contextmanager
def compiled_once() -> Iterator[None]:
    """lm-eval compiles a task's templates anew for every item, which takes half of the time of a small model on a GPU."""
    from lm_eval.utils import env

    with patch.object(env, "from_string", lru_cache(env.from_string)):
        yield


def load(names: Sequence[str], manager: "TaskManager", fewshot: int | None) -> Any:
    """The tasks with lm-eval's seeds; `fewshot` overrides a definition unless that says 0, as in lm-eval's simple_evaluate."""
    try:
        loaded = manager.load(list(names))
    except (OSError, ValueError) as error:
        raise ValueError(f"lm-eval cannot load the data of {', '.join(names)}: {str(error).splitlines()[0]}") from None
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    torch.manual_seed(SEEDS["torch"])
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")  # type: ignore[attr-defined]
        if default is None or (fewshot is not None and default != 0):
            task.set_config(key="num_fewshot", value=fewshot or 0)  # type: ignore[attr-defined]
        task.set_fewshot_seed(seed=SEEDS["fewshot"])  # type: ignore[attr-defined]
    return loaded


def task_result(name: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """One entry of `run_tasks` from what lm-eval returns."""
    samples = (results.get("samples") or {}).get(name, [])
    better = results.get("higher_is_better", {}).get(name) or {}
    metrics = {}
    for key, value in results["results"][name].items():
        metric, _, filter = key.partition(",")
        if not filter or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        theirs = results["results"][name].get(f"{metric}_stderr,{filter}")
        items = items_of(samples, metric, filter)
        aggregation = aggregation_of(items, value) if items else None
        stderr = theirs if isinstance(theirs, float) else standard_error(items, aggregation) if aggregation else math.nan
        metrics[key] = {
            "value": float(value),
            "stderr": stderr if math.isfinite(stderr) else None,
            "higher_is_better": better.get(metric),
        }
        if aggregation:
            metrics[key] |= {"aggregation": aggregation, "items": items}
    hashes = "".join(sample["doc_hash"] for sample in samples)
    return {
        "fewshot": results.get("n-shot", {}).get(name),
        "samples": len({sample["doc_id"] for sample in samples}),
        "fingerprint": hashlib.sha256(hashes.encode()).hexdigest()[:16],
        "metrics": metrics,
    }


def items_of(samples: Sequence[Mapping[str, Any]], metric: str, filter: str) -> list[Item]:
    """The metric's (value, weight) of every item, or nothing where items are neither numbers nor such pairs."""
    values = [sample[metric] for sample in samples if sample["filter"] == filter and metric in sample]
    pairs = [value if isinstance(value, (tuple, list)) else (value, 1) for value in values]
    if not all(len(pair) == 2 and all(isinstance(x, (int, float, np.number, np.bool_)) for x in pair) for pair in pairs):
        return []
    return [(float(value), float(weight)) for value, weight in pairs]
