"""Draws docs/kernels.png: time against the width of W (4096 rows), ours beside qwantize, from benchmarks/kernels.csv.

python scripts/plot_kernels.py [--csv benchmarks/kernels.csv] [--output docs/kernels.png]
"""

import argparse
import csv
from pathlib import Path

import matplotlib.pyplot as plt

PANELS = {
    "search_local": "scale search, rᵀ H r",
    "search_mse": "scale search, r · r",
    "quantize_absmax": "absmax quantize and pack",
    "block_hessian": "block Hessians, 8192 tokens",
}


def times(rows: list[dict[str, str]], kernel: str, provider: str) -> list[tuple[int, float, float]]:
    """(width, median ms, floor ms) of the last row of each width, float32 for the searches."""
    dtype = "float32" if kernel.startswith("search") else "bfloat16"
    found = {}
    for row in rows:
        if (row["kernel"], row["provider"], row["dtype"]) == (kernel, provider, dtype):
            width = int(row["shape"].split("x")[1])
            found[width] = (width, float(row["median_ms"]), float(row["floor_ms"]))
    return sorted(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/kernels.csv"))
    parser.add_argument("--output", type=Path, default=Path("docs/kernels.png"))
    arguments = parser.parse_args()
    with arguments.csv.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(14, 3.4), sharex=True)
    for axis, (kernel, title) in zip(axes, PANELS.items(), strict=True):
        for provider, style in (("qwantize", "s-"), ("ptq", "o-")):
            points = times(rows, kernel, provider)
            axis.plot([p[0] for p in points], [p[1] for p in points], style, label=provider)
        floors = times(rows, kernel, "ptq")
        axis.plot([p[0] for p in floors], [p[2] for p in floors], "k:", label="floor")
        axis.set(title=title, xscale="log", yscale="log", xlabel="width of W (4096 rows)")
        axis.grid(alpha=0.3, which="both")
    axes[0].set_ylabel("median ms")
    axes[0].legend()
    figure.suptitle(f"{rows[-1]['gpu']}, commits {', '.join(sorted({row['commit'] for row in rows}))}")
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=110)


if __name__ == "__main__":
    main()
