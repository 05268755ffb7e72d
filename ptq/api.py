"""The Python API: one call from a model to a checkpoint, with the defaults and the bytes of `ptq quantize`."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ptq.export.files import check_output
from ptq.pipeline.calibration import Given
from ptq.pipeline.run import run
from ptq.run.rules import GivenRules
from ptq.run.summary import scores_of, summary
from ptq.settings import Settings


@dataclass(frozen=True)
class Report:
    """What is known of a run.  `linears`: a dict each, which pandas takes; `scores`: by model, where a text was evaluated on;
    `content`: everything, as report.json has it.  As text: the lines that the command prints."""

    content: dict[str, Any] = field(repr=False)

    @property
    def linears(self) -> list[dict[str, Any]]:
        return self.content["linears"]

    @property
    def settings(self) -> dict[str, Any]:
        return self.content["settings"]

    @property
    def scores(self) -> dict[str, dict[str, Any]]:
        return scores_of(self.content)

    def to_pandas(self) -> Any:
        """`linears` as a DataFrame, a row a linear.  Raises ImportError without pandas."""
        import pandas

        return pandas.DataFrame.from_records(self.linears, index="name")

    def __str__(self) -> str:
        return summary(self.content)


@dataclass(frozen=True)
class Result:
    """A checkpoint in `folder`, where it stays: the `output` that was given, or one that goes with this object."""

    folder: Path
    report: Report = field(repr=False)
    _temporary: tempfile.TemporaryDirectory | None = field(default=None, repr=False)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The quantized model as transformers loads it, in bfloat16 on the CPU."""
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype="bfloat16").eval()

    def save(self, folder: str | Path) -> Path:
        """A copy of the checkpoint in `folder`.  Raises ValueError where that exists already or does not fit on its disk."""
        target = Path(folder).expanduser()
        check_output(target, sum(path.stat().st_size for path in self.folder.rglob("*")))
        partial = target.with_name(f"{target.name}.partial")
        shutil.copytree(self.folder, partial, dirs_exist_ok=True)
        partial.rename(target)
        return target

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Uploads the checkpoint to a repository, which is made where it is not there; returns its URL."""
        from huggingface_hub import HfApi

        hub = HfApi(token=token)
        url = hub.create_repo(repo_id, private=private, exist_ok=True)
        hub.upload_folder(repo_id=url.repo_id, folder_path=self.folder, commit_message="Quantized by ptq")
        return str(url)


def quantize(
    model: str | Path | PreTrainedModel,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    format: str = "nvfp4",
    effort: str = "default",
    calibration: Given = "builtin",
    sequences: int | None = None,
    length: int = 1024,
    ignore: Sequence[str] = (),
    rules: GivenRules | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool = True,
    **more: Any,
) -> Result:
    """The model in 4 bits, as a checkpoint that vLLM and transformers load.

    model:       a folder, a hub id, a .gguf file (read layer by layer), or a transformers model, which is not changed.
    tokenizer:   of a model in memory; without, it is looked for where the model came from.
    calibration: a source as for `ptq quantize --calibration`, texts, conversations (lists of messages), or token ids
                 (sequences, length) int64.
    rules:       (pattern, format | ptq.run.recipe.Recipe | None) for linears of their own, the last that matches holds;
                 None leaves a linear alone, as `ignore` does.
    output:      where the checkpoint goes; it must not exist.  Without, it goes with the result: `save` it.
    more:        any other field of ptq.Settings.

    Raises ValueError for whatever is wrong with what is given, with the remedy; ReadBackError where the checkpoint does not
    read back.
    """
    settings = Settings(
        format=format, effort=effort, sequences=sequences, length=length, ignore=listed(ignore), device=device, seed=seed, **more
    )  # fmt: skip
    temporary = tempfile.TemporaryDirectory(prefix="ptq-") if output is None else None
    folder = Path(temporary.name) / "checkpoint" if temporary else Path(output or "").expanduser().absolute()
    report = run(
        model, settings, folder, tokenizer=tokenizer, calibration=calibration, rules=tuple(rules or ()), hidden=not progress
    )
    return Result(folder, Report(report or {}), temporary)


def listed(ignore: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError for one pattern that is not in a list."""
    if isinstance(ignore, str):
        raise ValueError(f"ignore is the text {ignore!r}; give a list: [{ignore!r}]")
    return tuple(ignore)
