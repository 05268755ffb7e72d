#!/usr/bin/env python
"""Draw benchmarks/models.csv: how the time to quantize grows with tokens, layers, and width.

python scripts/plot_models.py benchmarks/models.csv docs/performance.png
"""

import csv
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

PHASES = ("forward", "hessian", "drift", "factorization", "sweep", "report")
SHAPES = ("Llama-3.2-1B", "Llama-3.1-8B", "Llama-3.1-70B")


def main() -> int:
    source, target = sys.argv[1:]
    with open(source, newline="") as file:
        rows = list(csv.DictReader(file))
    kept = {"format": "nvfp4", "drift": "full", "token_importance": "none", "deterministic": "False"}  # --effort default
    rows = [row for row in rows if all(row[name] == value for name, value in kept.items())]
    rows = list(
        {tuple(row[name] for name in ("shape", "gpus", "layers", "sequences")): row for row in rows}.values()
    )  # the last
    figure, (by_tokens, by_layers, by_width) = plt.subplots(1, 3, figsize=(12, 3.6))
    eight = [row for row in rows if row["shape"] == "Llama-3.1-8B" and row["gpus"] == "1"]
    lines(by_tokens, [row for row in eight if row["layers"] == "8"], "sequences", "8 layers of 8B: sequences of 2048")
    lines(by_layers, [row for row in eight if row["sequences"] == "128"], "layers", "8B, 128 × 2048 tokens: layers")
    whole = [row for row in rows if row["gpus"] == "1" and row["sequences"] == "128"]
    widest = [max((row for row in whole if row["shape"] == shape), key=lambda row: int(row["layers"])) for shape in SHAPES]
    bars(
        by_width,
        [row["shape"].split("-")[-1] for row in widest],
        widest,
        "seconds a layer",
        [int(row["layers"]) for row in widest],
    )
    by_width.legend(fontsize=7)
    by_tokens.set_ylabel("seconds")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    return 0


def lines(axes: Axes, rows: list[dict], x: str, title: str) -> None:
    rows = sorted(rows, key=lambda row: int(row[x]))
    values = [int(row[x]) for row in rows]
    axes.plot(values, [float(row["seconds_total"]) for row in rows], "o-", color="black", label="total")
    for phase in PHASES:
        axes.plot(values, [float(row[f"{phase}_s"]) for row in rows], ".-", label=phase)
    axes.set(title=title, xlim=0, ylim=0)
    axes.legend(fontsize=7)


def bars(axes: Axes, names: list[str], rows: list[dict], title: str, divisors: list[int]) -> None:
    bottom = [0.0] * len(rows)
    for phase in PHASES:
        heights = [float(row[f"{phase}_s"]) / divisor for row, divisor in zip(rows, divisors, strict=True)]
        axes.bar(names, heights, bottom=bottom, label=phase)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set(title=title)


if __name__ == "__main__":
    sys.exit(main())
