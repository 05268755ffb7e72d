"""Draws docs/accuracy.png: KL by method and model from benchmarks/accuracy.csv, error by layer from benchmarks/linears.csv.

python scripts/plot_accuracy.py [--csv benchmarks/accuracy.csv] [--output docs/accuracy.png]
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]


def method(row: Row) -> str:
    """What was done, in words."""
    words = [row["method"].upper(), row["rule"]] + ["frozen"] * (row.get("frozen") == "True")
    words += ["weighted"] * (row["token_importance"] != "none")
    words += [f"drift {row['drift']}"] * (row["drift"] != "none")
    return " ".join(words + ["rows"] * (row["row_feedback"] == "True"))


def draw_kl(axis: Axes, rows: list[Row], model: str, text: str) -> None:
    """A bar for each NVFP4 method, the mean over seeds, and a mark for each seed."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if (row["model"], row["format"], row["test_text"]) == (model, "nvfp4", text):
            found[method(row)].append(float(row["kl"]))
    names = sorted(found, key=lambda name: -sum(found[name]) / len(found[name]))
    axis.barh(names, [sum(found[name]) / len(found[name]) for name in names], color="#8fb4d9")
    for name in names:
        axis.plot(found[name], [name] * len(found[name]), "k|")
    axis.set(title=f"{model}, NVFP4, {text}", xlabel="KL(original ‖ quantized), nats a token")


def draw_layers(axis: Axes, rows: list[Row], model: str) -> None:
    """The held-out error of the last linear of each layer, which shows how the loss builds up."""
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        last = row["name"].endswith("down_proj")
        if last and (row["model"], row["format"], row["seed"]) == (model, "nvfp4", "0"):
            found[method(row)].append(float(row["validation_error"]))
    for name, errors in found.items():
        axis.plot(errors, "o-", markersize=3, label=name)
    axis.set(ylim=(0, None), title=f"{model}: down_proj, held out", xlabel="layer", ylabel="‖ŷ - y‖ / ‖y‖")
    axis.legend(loc="upper left", fontsize="small")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/accuracy.csv"))
    parser.add_argument("--models", nargs="+", default=["SmolLM2-135M-offgrid", "babyllama-tok105"])
    parser.add_argument("--output", type=Path, default=Path("docs/accuracy.png"))
    arguments = parser.parse_args()
    with arguments.csv.open() as file:
        usual = {"damp": "0.01", "ridge": "0.1", "activations": "none"}
        rows = [row for row in csv.DictReader(file) if row["format"] and usual.items() <= row.items()]
    with arguments.csv.with_name("linears.csv").open() as file:
        linears = [row for row in csv.DictReader(file) if row["activations"] == "none"]
    figure, axes = plt.subplots(1, len(arguments.models) + 1, figsize=(8 * len(arguments.models) + 7, 5))
    for axis, model in zip(axes, arguments.models, strict=False):
        draw_kl(axis, rows, model, "wiki.test.raw.gz")
    draw_layers(axes[-1], linears, arguments.models[0])
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
