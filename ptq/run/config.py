"""What to do to a model: one frozen record, checked when it is made."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ptq.core.formats import NVFP4, Format
from ptq.core.scales import RULES
from ptq.methods import METHODS

# What GPTQ does unless told otherwise: each lowers KL and takes longer (docs/accuracy.md has the numbers).
EFFORTS: dict[str, dict] = {
    "fast": {"rule": "local", "token_importance": "none", "drift": "none", "row_feedback": False},
    "default": {"rule": "joint", "token_importance": "none", "drift": "full", "row_feedback": False},
    "best": {"rule": "joint", "token_importance": "sampled", "drift": "full", "row_feedback": True},
}
# How much of what earlier layers lost is made good, and from how many passes.
DRIFTS: dict[str, dict] = {
    "none": {"drift": 0.0},
    "half": {"drift": 0.5, "stagewise": False},
    "full": {"drift": 1.0, "stagewise": True},
}
# What a calibration token counts for in H (ptq.calibrate.importance).
IMPORTANCES = ("none", "text", "sampled")


def settings_of(case: str) -> dict:
    """What an effort sets, or a case METHOD-RULE-IMPORTANCE[-half|-full][-rows][-frozen]: method, what `EFFORTS` names, frozen, and
    `effort`, "" where the case is none.  Raises ValueError for neither."""
    if case in EFFORTS:
        return {"method": "gptq", **EFFORTS[case], "frozen": False, "effort": case}
    method, rule, importance, *more = [*case.split("-"), "", ""]
    drift = next((word for word in more if word in DRIFTS), "none")
    fits = method in METHODS and rule in RULES and importance in IMPORTANCES
    if not fits or set(more) - {"", "rows", "frozen", *DRIFTS}:
        raise ValueError(
            f"no such case: {case!r}; write {' | '.join(EFFORTS)}, or METHOD-RULE-IMPORTANCE[-half|-full][-rows][-frozen] with "
            f"METHOD {' | '.join(METHODS)}, RULE {' | '.join(RULES)} and IMPORTANCE {' | '.join(IMPORTANCES)}"
        )
    chosen = {"rule": rule, "token_importance": importance, "drift": drift, "row_feedback": "rows" in more}
    frozen = "frozen" in more
    known = method == "gptq" and not frozen
    effort = next((name for name, settings in EFFORTS.items() if known and settings == chosen), "")
    return {"method": method, **chosen, "frozen": frozen, "effort": effort}


@dataclass(frozen=True)
class QuantConfig:
    """`rule`: how block scales are chosen.  `damp`: relative to mean(diag H).  `ignore`: linears left alone, by full name or by
    `re:PATTERN` matched from the start of the name.  `drift`: how much of what earlier layers lost each linear makes good
    (see drift), 0 to 1, against a ridge of `ridge` · mean(diag H); `stagewise`: each stage after those before it in the layer are
    quantized, else all from one pass, which diverges beyond one half.  `row_feedback`: rounding errors are fed forward over rows
    too, for which gptq needs the curvature of the loss (ptq.calibrate.importance).  `frozen`: gptq's scales are chosen before its
    loop, for comparison.  Raises ValueError for settings that do not fit."""

    format: Format = NVFP4
    method: str = "gptq"
    rule: str = "local"
    damp: float = 0.01
    ignore: tuple[str, ...] = field(default=())
    drift: float = 0.0
    stagewise: bool = True
    ridge: float = 0.1
    row_feedback: bool = False
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; there are {', '.join(METHODS)}")
        if self.rule not in RULES:
            raise ValueError(f"unknown scale rule {self.rule!r}; there are {', '.join(RULES)}")
        if self.method == "rtn" and self.rule in ("schur", "joint"):
            raise ValueError(f"scale rule {self.rule!r} follows GPTQ's error feedback, which method rtn has none of; try local")
        for pattern in self.ignore:
            try:
                re.compile(pattern.removeprefix("re:"))
            except re.error as error:
                raise ValueError(f"ignore pattern {pattern!r} is no regular expression: {error}") from None
        if not self.damp > 0:
            raise ValueError(f"damp must be positive, not {self.damp}")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift is the share of the loss that is made good, 0 to 1, not {self.drift}")
        if self.drift > 0.5 and not self.stagewise:
            raise ValueError(f"drift {self.drift} from one pass a layer diverges; take at most 0.5, or go stage by stage")
        if self.row_feedback and self.method != "gptq":
            raise ValueError(f"row feedback is part of method gptq; {self.method} feeds no error forward")
        if self.frozen and self.method != "gptq":
            raise ValueError(f"frozen scales are a variant of method gptq; {self.method} has no loop to choose them in")
        if not self.ridge > 0:
            raise ValueError(f"ridge must be positive, not {self.ridge}")

    @property
    def needs_calibration(self) -> bool:
        return self.method == "gptq" or self.rule == "local" or self.drift > 0


def make_config(format: Format, settings: Mapping[str, Any], damp: float = 0.01, **more: Any) -> QuantConfig:
    """What `settings` say by the names of `settings_of`: method, rule, token_importance, drift, row_feedback, frozen.

    `more`: other fields of QuantConfig.  Raises ValueError where they do not fit each other.
    """
    if settings["row_feedback"] and settings["token_importance"] == "none":
        raise ValueError("row feedback needs the backward pass of token weights text or sampled, and they are none")
    more = (
        DRIFTS[settings["drift"]] | {"row_feedback": settings["row_feedback"], "frozen": settings.get("frozen", False)} | more
    )
    return QuantConfig(format, settings["method"], settings["rule"], damp, **more)
