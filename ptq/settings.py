"""What a run is asked to do: one frozen record for the command and the library, and the names its fields may have.

Nothing here imports torch, so that --help and wrong arguments are answered at once.
"""

import re
import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

FORMAT_NAMES = ("nvfp4", "mxfp4", "mxfp4-round", "int4", "fp8")
ACTIVATION_NAMES = ("none", "nvfp4", "mxfp4", "fp8", "fp8-token")
METHOD_NAMES = ("rtn", "gptq")
RULE_NAMES = ("absmax", "mse", "local", "schur", "joint")
# What GPTQ does unless told otherwise: each lowers KL and takes longer (docs/accuracy.md has the numbers).
EFFORTS: dict[str, dict] = {
    "fast": {"rule": "local", "token_importance": "none", "drift": "none", "row_feedback": False},
    "default": {"rule": "joint", "token_importance": "none", "drift": "full", "row_feedback": False},
    "best": {"rule": "joint", "token_importance": "sampled", "drift": "full", "row_feedback": True},
}
# Rounded to so few bits, inputs are noisy: every effort scales channels for them, and drift is held by a larger ridge
# (docs/activations.md has the numbers).
NOISY = ("nvfp4", "mxfp4")
RIDGE, NOISY_RIDGE = 0.1, 1.0
RTN = {"rule": "local", "token_importance": "none", "drift": "none", "row_feedback": False, "smooth": False}
# How much of what earlier layers lost is made good, and from how many passes.
DRIFTS: dict[str, dict] = {
    "none": {"drift": 0.0},
    "half": {"drift": 0.5, "stagewise": False},
    "full": {"drift": 1.0, "stagewise": True},
}
# What a calibration token counts for in H (ptq.calibrate.importance).
IMPORTANCES = ("none", "text", "sampled")
PLACES = {"auto": None, "device": False, "host": True}
DTYPES = ("auto", "bfloat16", "float32")
# Calibration sequences unless told otherwise: of the builtin text, which has few, and of another by effort (docs/accuracy.md has
# what more of them bring).
BUILTIN_SEQUENCES = 64
SEQUENCES = {"fast": 128, "default": 128, "best": 256}
# Drawn beside the calibration sequences unless told otherwise, to measure every linear on.
VALIDATION_SEQUENCES = 4

CHOICES = {
    "format": FORMAT_NAMES,
    "method": METHOD_NAMES,
    "effort": EFFORTS,
    "rule": RULE_NAMES,
    "token_importance": IMPORTANCES,
    "drift": DRIFTS,
    "activations": ACTIVATION_NAMES,
    "hidden_states": PLACES,
    "dtype": DTYPES,
}
CASES = ("rtn-absmax-none", "rtn-local-none", "gptq-absmax-none", "gptq-mse-none", "gptq-local-none", "default")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OF_THE_MACHINE = ("device", "resume", "batch", "hidden_states")
# Fields that say nothing of the method: texts are known by their tokens, `recipe` by its rules, `block` by what comes of it.
OF_THE_TEXT = ("calibration", "sequences", "length", "validation", "evaluate", "windows")
LEAST = {"sequences": 1, "windows": 1, "length": 2, "batch": 1, "validation": 0}


def settings_of_effort(effort: str, activations: str = "none") -> dict[str, Any]:
    """What GPTQ does at that effort, with inputs rounded to those activations."""
    return EFFORTS[effort] | {"smooth": activations in NOISY}


def usual_ridge(activations: str) -> float:
    """Of drift, relative to mean(diag H)."""
    return NOISY_RIDGE if activations in NOISY else RIDGE


@dataclass(frozen=True)
class Settings:
    """`ptq quantize --help` says what each is.  None: what effort, method and text make of it, see `complete`.

    `calibration` and `evaluate`: sources of text (ptq.data.text); other calibration is given beside the settings.
    Raises ValueError that begins with the field's name for a value it cannot have.
    """

    format: str = "nvfp4"
    activations: str = "none"
    recipe: str | None = None
    target_bits: float | None = None
    method: str = "gptq"
    effort: str = "default"
    rule: str | None = None
    token_importance: str | None = None
    drift: str | None = None
    row_feedback: bool | None = None
    smooth: bool | None = None
    block: int | None = None
    damp: float = 0.01
    ignore: tuple[str, ...] = ()
    calibration: str = "builtin"
    sequences: int | None = None
    length: int = 1024
    validation: int = VALIDATION_SEQUENCES
    seed: int = 0
    evaluate: str | None = None
    windows: int | None = None
    device: str | None = None
    resume: bool = False
    batch: int | None = None
    hidden_states: str = "auto"
    deterministic: bool = False
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise ValueError(f"{name} {value!r}: there are {', '.join(choices)}")
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} {value}: too few, give {least} or more")
        if self.deterministic and self.batch not in (None, 1):
            raise ValueError(
                f"batch {self.batch}: --deterministic runs one sequence at a time, so that no bytes depend on it; leave one of the "
                "two out"
            )
        if self.recipe and (self.format, self.activations, self.block) != ("nvfp4", "none", None):
            raise ValueError("recipe says formats and activations by linear; leave out format, block and activations")
        if self.recipe and self.target_bits is not None:
            raise ValueError(
                "target_bits is of the settings' own format; beside a recipe, write target_bits in one of its rules"
            )

    def but(self, *left_out: str) -> dict[str, Any]:
        """By name, the fields that are not left out."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}

    def complete(self) -> "Settings":
        """The same with every choice made that effort, method and text leave open."""
        chosen = settings_of_effort(self.effort, self.activations) if self.method == "gptq" else RTN
        filled: dict[str, Any] = {name: value for name, value in chosen.items() if getattr(self, name) is None}
        if self.sequences is None:
            filled["sequences"] = BUILTIN_SEQUENCES if self.calibration == "builtin" else SEQUENCES[self.effort]
        if self.deterministic:
            filled["batch"] = 1
        return replace(self, **filled)


@dataclass(frozen=True)
class Evaluation:
    """`ptq evaluate --help` says what each is.  `models`: the first is what the others are compared with."""

    models: tuple[str, ...]
    output: Path
    text: str | None = None
    length: int = 2048
    windows: int | None = None
    logits: str | None = None
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    limit: int | None = None
    fewshot: int | None = None
    batch_size: int | str = 8
    max_length: int | None = None
    reuse: bool = False
    device: str = "cpu"
    dtype: str = "auto"


@dataclass(frozen=True)
class Comparison:
    """`ptq compare --help` says what each is."""

    model: str
    text: str
    output: Path
    formats: tuple[str, ...] = ("nvfp4", "mxfp4", "int4")
    cases: tuple[str, ...] = CASES
    block: int | None = None
    damp: float = 0.01
    calibration: str = "builtin"
    sequences: int = BUILTIN_SEQUENCES
    length: int = 1024
    seed: int = 0
    windows: int | None = None
    sequential: bool = False
    device: str = "cpu"


def command(model: str, settings: Settings) -> str:
    """What gives a checkpoint these complete settings, with what differs from what is done unasked, and no folders."""
    alike = {name: getattr(settings, name) for name in ("method", "effort", "calibration", "activations")}
    usual = replace(Settings(**alike).complete(), method="gptq", effort="default", calibration="builtin", activations="none")
    words = ["ptq", "quantize", short_name(model)]
    for field in fields(settings):
        name, value = field.name, getattr(settings, field.name)
        if name in OF_THE_MACHINE or value == getattr(usual, name):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else [value]
            words += [f"--{flag}", *(short_name(one) if isinstance(one, str) else f"{one:g}" for one in values)]
    return f"{shlex.join(words)} --output DIR"


def short_name(source: str) -> str:
    """The last part of a path; an id of the hub as it is."""
    return source if is_hub_id(source) or not Path(source).exists() else Path(source).resolve().name


def is_hub_id(source: str) -> bool:
    return bool(HUB_ID.fullmatch(source)) and not source.endswith(".gguf") and not Path(source).exists()
