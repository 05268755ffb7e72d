#!/usr/bin/env python
"""Perplexity and KL of many methods on one model, one row each in a CSV.

    python scripts/bench_accuracy.py MODEL --calibration c4.jsonl.gz wiki.jsonl.gz --evaluate test.raw.gz --commit abc1234

Every method sees the same calibration sequences, drawn anew for each seed; rows are appended as they are measured.
"""

import argparse
import copy
import csv
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

from ptq.calibrate.importance import TokenImportance, keep_in, token_importance
from ptq.calibrate.inputs import inputs_of, quantized_inputs
from ptq.core.activations import ACTIVATIONS, get_activation
from ptq.core.formats import FORMATS
from ptq.core.scales import RULES
from ptq.data.chat import encoder
from ptq.data.text import all_windows, read_documents, sample_windows
from ptq.eval.perplexity import Score, evaluate
from ptq.models.adapter import ModelAdapter
from ptq.models.loading import load_model
from ptq.run.loop import Calibration, quantize_model
from ptq.run.plan import named_format
from ptq.run.recipe import Recipe
from ptq.run.record import Record
from ptq.run.settings import make_recipe, settings_of
from ptq.settings import VALIDATION_SEQUENCES

FIELDS = (
    "model format method rule frozen token_importance drift row_feedback effort damp ridge sequences length calibration seed "
    "test_text windows ppl kl seconds gpu commit activations smooth"
)
CASES = (
    *("rtn-absmax-none", "rtn-mse-none", "rtn-local-none", "rtn-local-none-full"),
    *(f"gptq-{rule}-none" for rule in RULES),
    *(f"gptq-{rule}-none-frozen" for rule in RULES),
    *(f"gptq-{rule}-sampled" for rule in ("local", "schur", "joint")),
    *("gptq-local-none-full", "gptq-joint-none-half", "gptq-joint-none-full"),
    *("gptq-joint-sampled-rows", "gptq-joint-sampled-full", "gptq-joint-sampled-full-rows"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nvfp4"])
    about = "what inputs are rounded to, one for all formats or one each"
    parser.add_argument("--activations", nargs="+", choices=("none", *ACTIVATIONS), default=["none"], help=about)
    parser.add_argument("--block", type=int, help="for int4")
    parser.add_argument("--damp", type=float, nargs="+", default=[0.01])
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="EFFORT|METHOD-RULE-IMPORTANCE[-half|-full][-rows][-smooth][-frozen]",
        default=CASES,
        help="(default: all)",
    )
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ridge", type=float, help="for drift (default: what is usual with the activations)")
    parser.add_argument("--evaluate", nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--test-length", type=int, help="tokens a window to evaluate on (default: --length)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/accuracy.csv"))
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    return parser.parse_args()


def weights_of(
    model: transformers.PreTrainedModel, batches: tuple[Tensor, ...], seed: int, cases: list[dict]
) -> tuple[dict[str, TokenImportance | None], dict[str, dict[str, Tensor]]]:
    """By name, token weights and curvature of what the cases want, each but `none` a backward pass."""
    adapter = ModelAdapter(model)
    curvatures: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, TokenImportance | None] = {"none": None}
    for name in {case["token_importance"] for case in cases} - {"none"}:
        rows = any(case["row_feedback"] and case["token_importance"] == name for case in cases)
        keep = keep_in(curvatures.setdefault(name, {})) if rows else None
        weights[name] = token_importance(adapter, batches, seed=seed if name == "sampled" else None, curvature=keep)
    return weights, curvatures


def runs_of(args: argparse.Namespace) -> list[tuple[dict, Recipe]]:
    """(the row's settings, what to do) of every run of one seed.  Raises ValueError for a case that there is not."""
    if len(args.activations) not in (1, len(args.formats)):
        raise ValueError(f"{len(args.activations)} activations for {len(args.formats)} formats; give one, or one for each")
    runs = []
    for name, inputs in zip(args.formats, args.activations * (len(args.formats) // len(args.activations)), strict=True):
        format, activation = named_format(name, args.block), get_activation(inputs)
        label = name if name != "int4" else f"{name}_g{format.block}"
        for case in (settings_of(case, inputs) for case in args.cases):
            for damp in args.damp if case["method"] == "gptq" else args.damp[:1]:
                recipe = make_recipe(format, case, damp, ridge=args.ridge, activation=activation)
                runs.append(({"format": label, "activations": inputs, **case, "damp": damp, "ridge": recipe.ridge}, recipe))
    return runs


def measure(args: argparse.Namespace, runs: list[tuple[dict, Recipe]]) -> Iterator[tuple[dict, dict[str, Score], list[Record]]]:
    """(the row's settings, score by text, records) of each run, the unquantized model first."""
    model, tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
    model.requires_grad_(False)

    def windows(sources: list[str], length: int) -> Tensor:
        documents = [document for source in sources for document in read_documents(source)]
        return all_windows(encoder(tokenizer), documents, length, sources[0])

    drawn_from, test_length = windows(args.calibration, args.length), args.test_length or args.length
    tests = {Path(source).name: windows([source], test_length)[: args.windows].to(args.device) for source in args.evaluate}
    yield {"method": "original"}, scores(model, model, tests), []
    for seed in args.seeds:
        drawn = sample_windows(drawn_from, args.sequences, seed, args.calibration[0], validation=VALIDATION_SEQUENCES)
        batches, validation = drawn[: args.sequences].to(args.device).split(16), drawn[args.sequences :]
        weights, curvatures = weights_of(model, batches, seed, [settings for settings, _ in runs])
        for settings, recipe in runs:
            begin = time.perf_counter()
            quantized = copy.deepcopy(model)
            kind = settings["token_importance"]
            calibration = Calibration(batches, weights[kind], curvatures.get(kind), validation.to(args.device))
            results = list(quantize_model(ModelAdapter(quantized), recipe, calibration))
            seconds = round(time.perf_counter() - begin, 2)
            with quantized_inputs(quantized, inputs_of({record.name: weight for record, weight in results})):
                found = scores(model, quantized, tests)
            yield settings | {"seed": seed, "seconds": seconds}, found, [record for record, _ in results]


def scores(model: torch.nn.Module, other: torch.nn.Module, tests: dict[str, Tensor]) -> dict[str, Score]:
    return {text: evaluate({"original": model, "other": other}, windows)["other"] for text, windows in tests.items()}


def write_linears(path: Path, settings: dict, records: list[Record]) -> None:
    """Appends what is known of every linear."""
    names = ["model", "format", "method", "rule", "token_importance", "drift", "row_feedback", "seed"]
    numbers = ["name", "error", "rtn_error", "validation_error", "certificate", "moved_scales"]
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow([*names, *numbers, "activations"])
        for record in records:
            known = [settings.get(name, "") for name in names]
            found = [getattr(record, number) for number in numbers]
            rounded = [f"{value:.5g}" if isinstance(value, float) else value for value in found]
            writer.writerow([*known, *rounded, settings["activations"]])


def main() -> int:
    args = parse_arguments()
    try:
        runs = runs_of(args)
    except ValueError as error:
        sys.exit(f"error: {error}")
    transformers.utils.logging.set_verbosity_error()
    common = {
        "model": Path(args.model).name,
        "sequences": args.sequences,
        "length": args.length,
        "calibration": "+".join(Path(source).name for source in args.calibration),
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "commit": args.commit,
    }
    fresh = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS.split(), restval="")
        if fresh:
            writer.writeheader()
        for settings, found, records in measure(args, runs):
            write_linears(args.csv.with_name("linears.csv"), common | settings, records)
            for text, score in found.items():
                windows = score.tokens // (score.window - 1)
                row: dict = common | settings | {"test_text": text, "windows": windows}
                row |= {"ppl": round(score.ppl, 4), "kl": round(score.kl, 6)}
                writer.writerow(row)
                print(
                    f"{' '.join(map(str, settings.values())):60} {text:18} ppl {score.ppl:8.3f}  KL {score.kl:.5f}", flush=True
                )
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
