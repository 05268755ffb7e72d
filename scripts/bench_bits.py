#!/usr/bin/env python
"""KL of formats chosen by measured cost (`--target-bits`) beside one format for all and rules of thumb at equal bits.

    python scripts/bench_bits.py MODEL --calibration c4.jsonl.gz wiki.jsonl.gz --evaluate test.raw.gz --commit abc1234

A rule of thumb gives FP8 to one unit after the other in its order, as long as the bits last.  Rows are appended as they come.
"""

import argparse
import copy
import csv
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from bench_accuracy import scores

from ptq.calibrate.inputs import inputs_of, quantized_inputs
from ptq.core.activations import ACTIVATIONS, get_activation
from ptq.data.chat import encoder
from ptq.data.text import all_windows, read_documents, sample_windows
from ptq.models.adapter import ModelAdapter
from ptq.models.loading import load_model
from ptq.run.allocate import SEQUENCES, Unit, measure, solve, written
from ptq.run.loop import Calibration, quantize_model
from ptq.run.plan import named_format
from ptq.run.recipe import Choice, bits_of
from ptq.run.recipe_file import choice_of
from ptq.run.settings import make_recipe, settings_of
from ptq.settings import VALIDATION_SEQUENCES

FIELDS = (
    "model format activations effort how target bits predicted_kl units_fp8 units_kept sequences length seed "
    "test_text windows ppl kl seconds gpu commit"
)
Order = Callable[[int, Sequence[Unit]], float]
RULES_OF_THUMB: dict[str, Order] = {
    "first layers": lambda n, units: n,
    "last layers": lambda n, units: -n,
    "both ends": lambda n, units: min(n, len(units) - n),
    "smallest": lambda n, units: units[n].weights,
    "down_proj": lambda n, units: 0 if units[n].names[0].endswith("down_proj") else 1,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--format", default="nvfp4")
    parser.add_argument("--activations", nargs="+", choices=("none", *ACTIVATIONS), default=["none"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--targets", type=float, nargs="+", default=[5.0], metavar="BITS")
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/bits.csv"))
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    return parser.parse_args()


def thumb(units: Sequence[Unit], order: Order, choice: Choice) -> np.ndarray:
    """The second recipe for units in their order, as long as the bits last, the first for all others."""
    left = (choice.bits - bits_of(choice.recipes[0])) * sum(unit.weights for unit in units)
    picks = np.zeros(len(units), dtype=int)
    for n in sorted(range(len(units)), key=lambda n: order(n, units)):
        takes = (bits_of(choice.recipes[1]) - bits_of(choice.recipes[0])) * units[n].weights
        if takes <= left:
            picks[n], left = 1, left - takes
    return picks


def plans(units: list[Unit], costs: np.ndarray, choices: Sequence[Choice]) -> Iterator[tuple[str, Choice, np.ndarray]]:
    """(how, choice, number of the recipe by unit)"""
    yield "all alike", choices[0], np.zeros(len(units), dtype=int)
    for choice in choices:
        bits = [bits_of(recipe) for recipe in choice.recipes]
        yield "chosen", choice, solve(costs, [unit.weights for unit in units], bits, choice.bits)
        for how, order in RULES_OF_THUMB.items():
            yield how, choice, thumb(units, order, choice)


def measure_all(args: argparse.Namespace) -> Iterator[dict]:
    model, tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
    model.requires_grad_(False)

    def windows(sources: list[str]) -> torch.Tensor:
        documents = [document for source in sources for document in read_documents(source)]
        return all_windows(encoder(tokenizer), documents, args.length, sources[0])

    drawn_from = windows(args.calibration)
    tests = {Path(source).name: windows([source])[: args.windows].to(args.device) for source in args.evaluate}
    for seed in args.seeds:
        drawn = sample_windows(drawn_from, args.sequences, seed, args.calibration[0], validation=VALIDATION_SEQUENCES)
        tokens = drawn[: args.sequences].to(args.device)
        for name in args.activations:
            base = make_recipe(named_format(args.format, None), settings_of(args.effort, name), activation=get_activation(name))
            choices = [choice_of(base, target) for target in args.targets]
            begin = time.perf_counter()
            units, costs = measure(ModelAdapter(model), [("re:.*", choices[0])], tokens[:SEQUENCES], 16, seed)
            print(f"{len(units)} units measured in {time.perf_counter() - begin:.1f} s", flush=True)
            weights = np.array([unit.weights for unit in units]) / sum(unit.weights for unit in units)
            for how, choice, picks in plans(units, costs, choices):
                bits = float(weights @ np.array([bits_of(choice.recipes[k]) for k in picks]))
                rules = written([("re:.*", choice)], {unit: choice.recipes[k] for unit, k in zip(units, picks, strict=True)})
                begin = time.perf_counter()
                quantized = copy.deepcopy(model)
                done = list(quantize_model(ModelAdapter(quantized), rules, Calibration(tokens.split(16))))
                row = {"seconds": round(time.perf_counter() - begin, 2), "activations": name, "seed": seed, "how": how}
                row |= {"bits": round(bits, 4), "predicted_kl": round(float(costs[np.arange(len(units)), picks].sum()), 6)}
                row |= {"target": "" if how == "all alike" else choice.bits, "units_fp8": int((picks == 1).sum())}
                row |= {"units_kept": int((picks == 2).sum())}
                with quantized_inputs(quantized, inputs_of({record.name: weight for record, weight in done})):
                    for text, score in scores(model, quantized, tests).items():
                        measured = {"ppl": round(score.ppl, 4), "kl": round(score.kl, 6)}
                        yield row | measured | {"test_text": text, "windows": score.tokens // (score.window - 1)}


def main() -> int:
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    common: dict = {"model": Path(args.model).name, "format": args.format, "effort": args.effort, "sequences": args.sequences}
    common |= {"length": args.length, "commit": args.commit}
    common |= {"gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu"}
    fresh = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS.split(), restval="")
        if fresh:
            writer.writeheader()
        for row in measure_all(args):
            writer.writerow(common | row)
            file.flush()
            names = (
                "seed",
                "activations",
                "how",
                "target",
                "bits",
                "units_fp8",
                "units_kept",
                "predicted_kl",
                "test_text",
                "kl",
            )
            print(*(row[name] for name in names), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
