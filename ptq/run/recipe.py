"""What to do to a linear: one frozen record, checked when it is made, and the rules that give each linear its own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ptq.core.formats import NVFP4, Format
from ptq.core.scales import RULES
from ptq.methods import METHODS


@dataclass(frozen=True)
class Recipe:
    """`format` of the weights, `activation` of the inputs (None: as they are; there is no other yet).  `rule`: how block
    scales are chosen.  `damp`: relative to mean(diag H).

    `drift` (GPTAQ, Qronos): how much of what earlier layers lost the linear makes good (ptq.calibrate.drift), 0 to 1,
    against a ridge of `ridge` · mean(diag H); `stagewise`: each wave of linears after those before it in the layer are
    quantized, else all from one pass, which diverges beyond one half.  `row_feedback` (YAQA): errors are fed forward over
    rows too, for which gptq needs the curvature of the loss (ptq.calibrate.importance).  `frozen`: gptq's scales are
    chosen before its loop, for comparison.  Raises ValueError for settings that do not fit.
    """

    format: Format = NVFP4
    method: str = "gptq"
    rule: str = "local"
    damp: float = 0.01
    activation: Format | None = None
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
        if self.activation is not None:
            raise ValueError(f"activations in {self.activation.name} are not implemented; leave activation out")
        for name in ("damp", "ridge"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        if not 0 <= self.drift <= 1:
            raise ValueError(f"drift is the share of the loss that is made good, 0 to 1, not {self.drift}")
        if self.drift > 0.5 and not self.stagewise:
            raise ValueError(f"drift {self.drift} from one pass a layer diverges; take at most 0.5, or go stage by stage")
        if self.row_feedback and self.method != "gptq":
            raise ValueError(f"row feedback is part of method gptq; {self.method} feeds no error forward")
        if self.frozen and self.method != "gptq":
            raise ValueError(f"frozen scales are a variant of method gptq; {self.method} has no loop to choose them in")

    @property
    def needs_calibration(self) -> bool:
        return self.method == "gptq" or self.rule == "local" or self.drift > 0

    def __str__(self) -> str:
        return f"{self.format.name} by {self.method} with {self.rule}"


Rules = Sequence[tuple[str, Recipe | None]]
"""(pattern, recipe) in order: of those that match a linear's full name the last one holds; None leaves the linear alone."""


def as_rules(recipe: Recipe | Rules, ignore: Iterable[str] = ()) -> Rules:
    """One recipe for all linears, or rules, and after them what to ignore."""
    rules = [("re:.*", recipe)] if isinstance(recipe, Recipe) else list(recipe)
    return [*rules, *((pattern, None) for pattern in ignore)]


def matches(name: str, pattern: str) -> bool:
    """True where `name` equals the pattern or a `re:` pattern matches it from its start (the rule of compressed-tensors).

    Raises ValueError for a pattern that is no regular expression.
    """
    if not pattern.startswith("re:"):
        return name == pattern
    try:
        return re.match(pattern[3:], name) is not None
    except (re.error, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"ignore pattern {pattern[:200]!r} is no regular expression: {reason}") from None


def recipe_of(name: str, rules: Rules) -> Recipe | None:
    """What the last rule that matches says; None, to leave it alone, where none does."""
    return next((recipe for pattern, recipe in reversed(rules) if matches(name, pattern)), None)
