"""What to do to a linear: one frozen record, checked when it is made, and the rules that give each linear its own."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

from ptq.core.activations import ActivationFormat
from ptq.core.formats import NVFP4, Format
from ptq.core.scales import RULES
from ptq.methods import METHODS
from ptq.settings import RIDGE


@dataclass(frozen=True)
class Recipe:
    """`format` of the weights, `activation` of the inputs (None: as they are).  `rule`: how block scales are chosen.
    `damp`: relative to mean(diag H).

    `drift` (GPTAQ, Qronos): how much of what earlier layers lost the linear makes good (ptq.calibrate.drift), 0 to 1,
    against a ridge of `ridge` · mean(diag H); `stagewise`: each wave of linears after those before it in the layer are
    quantized, else all from one pass, which diverges beyond one half.  `row_feedback` (YAQA): errors are fed forward over
    rows too, for which gptq needs the curvature of the loss (ptq.calibrate.importance).  `frozen`: gptq's scales are
    chosen before its loop, for comparison.  `smooth`: channels are scaled before inputs are rounded, where the model has a
    place for it (ptq.run.smoothing).  Raises ValueError for settings that do not fit.
    """

    format: Format = NVFP4
    method: str = "gptq"
    rule: str = "local"
    damp: float = 0.01
    activation: ActivationFormat | None = None
    drift: float = 0.0
    stagewise: bool = True
    ridge: float = RIDGE
    row_feedback: bool = False
    frozen: bool = False
    smooth: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; there are {', '.join(METHODS)}")
        if self.rule not in RULES:
            raise ValueError(f"unknown scale rule {self.rule!r}; there are {', '.join(RULES)}")
        if self.method == "rtn" and self.rule in ("schur", "joint"):
            raise ValueError(f"scale rule {self.rule!r} follows GPTQ's error feedback, which method rtn has none of; try local")
        if self.activation is not None and self.format.scheme not in self.activation.schemes:
            raise ValueError(
                f"no engine runs {self.format.name} weights on activations in {self.activation.name}, which go with "
                f"{', '.join(self.activation.schemes)}; choose another pair, or no activations"
            )
        if not self.format.block and self.rule not in ("absmax", "mse"):
            raise ValueError(
                f"scale rule {self.rule!r} is about blocks, and {self.format.name} has one scale a row; take absmax or mse"
            )
        if self.smooth and (self.activation is None or not self.activation.block):
            raise ValueError(
                "smooth is for inputs that share a scale in blocks; give activations nvfp4 or mxfp4, or leave it out"
            )
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
        scaled = self.activation is not None and self.activation.calibrated
        return self.method == "gptq" or self.rule == "local" or self.drift > 0 or scaled or self.smooth

    @property
    def stored(self) -> Format:
        """The format with that of the activations, which a checkpoint tells of too."""
        return replace(self.format, activation=self.activation)

    @property
    def about(self) -> dict[str, object]:
        """All of it in JSON's types."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        activation = self.activation.name if self.activation else None
        return known | {"format": self.format.name, "block": self.format.block, "activation": activation}

    def __str__(self) -> str:
        inputs = f" on activations in {self.activation.name}" if self.activation else ""
        return f"{self.format.name}{inputs} by {self.method} with {self.rule}"


def bits_of(recipe: Recipe | None) -> float:
    """A weight; of a linear that is kept, those of bfloat16."""
    return recipe.format.bits_per_weight if recipe else 16.0


@dataclass(frozen=True)
class Choice:
    """One of `recipes` (None: keep) for each linear, so that they take at most `bits` a weight on average (ptq.run.allocate).

    Raises ValueError for fewer bits than the smallest takes.
    """

    recipes: tuple[Recipe | None, ...]
    bits: float

    def __post_init__(self) -> None:
        least = min(map(bits_of, self.recipes))
        if not self.bits >= least:
            raise ValueError(f"target bits {self.bits:g}: no format here has fewer than {least:g} a weight; give that or more")

    @property
    def about(self) -> dict[str, object]:
        return {"bits": self.bits, "recipes": [recipe and recipe.about for recipe in self.recipes]}

    def __str__(self) -> str:
        return f"{' or '.join(str(recipe or 'kept') for recipe in self.recipes)} at {self.bits:g} bits a weight"


Rules = Sequence[tuple[str, Recipe | None]]
"""(pattern, recipe) in order: of those that match a linear's full name the last one holds; None leaves the linear alone."""
OpenRules = Sequence[tuple[str, Recipe | Choice | None]]
"""The same, some of them yet to be chosen by what is measured."""


def open_choices(rules: OpenRules) -> list[Choice]:
    return [recipe for _, recipe in rules if isinstance(recipe, Choice)]


def settled(rules: OpenRules) -> Rules:
    """The same with the first recipe of each choice: a plan of them knows all that may be wrong with names and shapes."""
    return [(pattern, recipe.recipes[0] if isinstance(recipe, Choice) else recipe) for pattern, recipe in rules]


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
