"""Standard errors of metrics, and of differences between two models on the same items.

An item is (value, weight): a metric is a function of Σ value / Σ weight.  Accuracies have weight 1, word perplexity has the log
likelihood of a page and its words.  Standard errors of the ratio are by linearization (Cochran, Sampling Techniques, 6.4); with
all weights 1 that is the sample deviation / √n, which is lm-eval's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

Item = tuple[float, float]

AGGREGATIONS = {
    "mean": lambda ratio: ratio,
    "perplexity": lambda ratio: math.exp(-ratio),
    "bits": lambda ratio: -ratio / math.log(2),
}


@dataclass(frozen=True)
class Difference:
    """other - first; for perplexities ln(other / first).  `stderr` is of the difference, paired over `items` items."""

    value: float
    stderr: float
    items: int

    @property
    def conclusive(self) -> bool:
        """Whether it is more than two standard errors from zero; False where there is no standard error."""
        return abs(self.value) > 2 * self.stderr

    @property
    def items_needed(self) -> int | None:
        """How many items would tell a difference of this size from none; None where no number would, or none is known."""
        if not self.value or math.isnan(self.stderr):
            return None
        return math.ceil(self.items * (2 * self.stderr / self.value) ** 2)


def ratio(items: Sequence[Item]) -> float:
    return sum(value for value, _ in items) / sum(weight for _, weight in items)


def ratio_stderr(items: Sequence[Item]) -> float:
    """Standard error of `ratio`; NaN for fewer than two items."""
    n, mean = len(items), ratio(items)
    if n < 2:
        return math.nan
    squares = sum((value - mean * weight) ** 2 for value, weight in items)
    return math.sqrt(n / (n - 1) * squares) / sum(weight for _, weight in items)


def aggregation_of(items: Sequence[Item], reported: float) -> str | None:
    """The aggregation that makes the reported number of these items, or None if none of ours does."""
    if not sum(weight for _, weight in items):
        return None
    mean = ratio(items)
    for name, function in AGGREGATIONS.items():
        # exp overflows where a mean of large values is no log likelihood
        if (name != "perplexity" or mean > -700) and math.isclose(function(mean), reported, rel_tol=1e-9, abs_tol=1e-12):
            return name
    return None


def standard_error(items: Sequence[Item], aggregation: str) -> float:
    """Standard error of the aggregated number."""
    slope = {
        "mean": 1.0,
        "perplexity": math.exp(-ratio(items)) if aggregation == "perplexity" else 0.0,
        "bits": 1 / math.log(2),
    }
    return slope[aggregation] * ratio_stderr(items)


def difference(first: Sequence[Item], other: Sequence[Item], aggregation: str) -> Difference:
    """How `other` differs from `first` over the same items.  Raises ValueError where they are not the same."""
    if [weight for _, weight in first] != [weight for _, weight in other]:
        raise ValueError("a paired difference needs the same items; evaluate both models with the same settings")
    changes = [(b - a, weight) for (a, weight), (b, _) in zip(first, other, strict=True)]
    slope = {"mean": 1.0, "perplexity": -1.0, "bits": -1 / math.log(2)}[aggregation]
    return Difference(slope * ratio(changes), abs(slope) * ratio_stderr(changes), len(changes))
