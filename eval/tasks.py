"""Task data in local files, for lm-eval's own definitions of nine tasks; nothing here needs lm-eval.

A file is NAME.SPLIT.jsonl or .jsonl.gz, one item a line with the field names of the dataset that lm-eval's definition reads.
"""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ptq.data.text import read_text

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class LocalTask:
    """`config`: lm-eval's definition, relative to its tasks.  `stem`, `split`: the file that is evaluated.

    `fields`: what the definition reads, a dot for an object inside, each with the JSON types it may have.
    """

    config: str
    stem: str
    split: str
    fields: dict[str, tuple[type, ...]]


TEXT, LIST, NUMBER = (str,), (list,), (int,)
ANSWERS = {"choices.text": LIST, "choices.label": LIST, "answerKey": TEXT}
LOCAL = {
    "arc_easy": LocalTask("arc/arc_easy.yaml", "arc_easy", "test", {"question": TEXT} | ANSWERS),
    "arc_challenge": LocalTask("arc/arc_challenge.yaml", "arc_challenge", "test", {"question": TEXT} | ANSWERS),
    "boolq": LocalTask(
        "super_glue/boolq/default.yaml", "boolq", "validation", {"question": TEXT, "passage": TEXT, "label": NUMBER}
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        "hellaswag",
        "validation",
        {"activity_label": TEXT, "ctx_a": TEXT, "ctx_b": TEXT, "endings": LIST, "label": (str, int)},
    ),
    "lambada_openai": LocalTask("lambada/lambada_openai.yaml", "lambada_openai", "test", {"text": TEXT}),
    "openbookqa": LocalTask("openbookqa/openbookqa.yaml", "openbookqa", "test", {"question_stem": TEXT} | ANSWERS),
    "piqa": LocalTask("piqa/piqa.yaml", "piqa", "validation", {"goal": TEXT, "sol1": TEXT, "sol2": TEXT, "label": NUMBER}),
    "wikitext": LocalTask("wikitext/wikitext.yaml", "wikitext", "test", {"page": TEXT}),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        "winogrande_xl",
        "validation",
        {"sentence": TEXT, "option1": TEXT, "option2": TEXT, "answer": TEXT},
    ),
}


def check_names(names: Sequence[str], known: Iterable[str], where: str) -> None:
    """Raises ValueError that lists the nearest known names for a name that is not among them."""
    known = sorted(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:20]
            raise ValueError(f"task {name!r} is not known to {where}; nearest: {', '.join(near)}")


def task_files(name: str, folder: Path) -> dict[str, Path]:
    """The evaluated split's file and those of the splits before it that are in the folder, for few-shot examples.

    Raises ValueError where the evaluated one is not there.
    """
    task = LOCAL[name]
    splits = SPLITS[: SPLITS.index(task.split) + 1]
    candidates = {split: [folder / f"{task.stem}.{split}.jsonl{end}" for end in ("", ".gz")] for split in splits}
    found = {split: next((path for path in paths if path.is_file()), None) for split, paths in candidates.items()}
    if found[task.split] is None:
        raise ValueError(f"task {name!r} needs {candidates[task.split][0]} or .jsonl.gz, which is not there")
    return {split: path.absolute() for split, path in found.items() if path}


def check_file(path: Path, fields: dict[str, tuple[type, ...]]) -> None:
    """Raises ValueError that names file, line and field for an item that a task's definition could not read."""
    lines = 0
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        lines += 1
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        for field, types in fields.items():
            value = row
            for part in field.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if not isinstance(value, types):
                wanted = " or ".join({str: "a string", list: "a list", int: "an integer"}[kind] for kind in types)
                raise ValueError(f'{path}, line {number}: field "{field}" is {"missing" if value is None else "not " + wanted}')
    if not lines:
        raise ValueError(f"{path} is empty")


def check_tasks(names: Sequence[str], folder: Path, fewshot: int | None) -> dict[str, dict[str, Path]]:
    """For each task the files of its splits, all items looked at.  Raises ValueError that says what to change."""
    if not folder.is_dir():
        raise ValueError(f"task data {folder} is no folder; give one with files such as arc_easy.test.jsonl.gz")
    check_names(names, LOCAL, "the offline tasks (with --task-data)")
    files = {name: task_files(name, folder) for name in names}
    for name, splits in files.items():
        if fewshot and len(splits) == 1:
            task = LOCAL[name]
            raise ValueError(f"task {name!r}: few-shot examples need {task.stem}.train.jsonl[.gz] in {folder}")
        for path in splits.values():
            check_file(path, LOCAL[name].fields)
    return files
