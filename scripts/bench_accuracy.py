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

from ptq.calibration import all_windows, read_documents, sample_windows
from ptq.config import QuantConfig
from ptq.eval.perplexity import Score, evaluate
from ptq.formats import FORMATS, get_format
from ptq.models.llama import LlamaAdapter
from ptq.models.loading import load_model
from ptq.plan import with_block
from ptq.runner import quantize_model
from ptq.token_weights import TokenWeights, token_weights

FIELDS = (
    "model format method scales token_weights damp sequences length calibration seed "
    "test_text windows ppl kl seconds gpu commit"
)
# method, scale rule, token weights; the last is the default of quantize_llama.py
CASES = (
    ("rtn", "absmax", "none"),
    ("rtn", "mse", "none"),
    ("rtn", "local", "none"),
    ("gptq", "absmax", "none"),
    ("gptq", "mse", "none"),
    ("gptq", "local", "none"),
    ("gptq", "schur", "none"),
    ("gptq", "joint", "none"),
    ("gptq", "mse", "sampled"),
    ("gptq", "local", "sampled"),
    ("gptq", "schur", "sampled"),
    ("gptq", "joint", "text"),
    ("gptq", "joint", "sampled"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["nvfp4"])
    parser.add_argument("--block", type=int, help="for int4")
    parser.add_argument("--damp", type=float, nargs="+", default=[0.01])
    parser.add_argument("--cases", nargs="+", metavar="METHOD-SCALES-WEIGHTS", default=["-".join(case) for case in CASES])
    parser.add_argument("--calibration", nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--evaluate", required=True)
    parser.add_argument("--windows", type=int, default=120)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/accuracy.csv"))
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    return parser.parse_args()


def weights_of(
    model: transformers.PreTrainedModel, batches: tuple[Tensor, ...], seed: int, wanted: set[str]
) -> dict[str, TokenWeights | None]:
    """Token weights by name, of those wanted: each but `none` is a backward pass."""
    seeds = {"text": None, "sampled": seed}
    adapter = LlamaAdapter(model)
    return {name: None if name == "none" else token_weights(adapter, batches, seed=seeds[name]) for name in wanted}


def measure(args: argparse.Namespace) -> Iterator[tuple[dict, Score]]:
    """(the row's settings, score) of each run, the unquantized model first."""
    model, tokenizer = load_model(args.model, dtype=torch.float32, device=args.device)
    model.requires_grad_(False)

    def windows(sources: list[str]) -> Tensor:
        documents = [text for source in sources for text in read_documents(source)]
        return all_windows(lambda text: tokenizer(text, verbose=False)["input_ids"], documents, args.length, sources[0])

    calibration, test = windows(args.calibration), windows([args.evaluate])[: args.windows].to(args.device)
    yield {"method": "original"}, evaluate({"original": model}, test)["original"]
    for seed in args.seeds:
        batches = sample_windows(calibration, args.sequences, seed, args.calibration[0]).to(args.device).split(16)
        weights = weights_of(model, batches, seed, {case.split("-")[2] for case in args.cases})
        for format in args.formats:
            for case in args.cases:
                method, rule, weighing = case.split("-")
                for damp in args.damp if method == "gptq" else args.damp[:1]:
                    config = QuantConfig(with_block(get_format(format), args.block), method, rule, damp)
                    settings = {"format": format, "method": method, "scales": rule, "token_weights": weighing, "damp": damp}
                    score, seconds = run(model, config, batches, weights[weighing], test)
                    yield settings | {"seed": seed, "seconds": seconds}, score


def run(
    model: transformers.PreTrainedModel,
    config: QuantConfig,
    batches: tuple[Tensor, ...],
    weights: TokenWeights | None,
    test: Tensor,
) -> tuple[Score, float]:
    """The score of a quantized copy, and the seconds it took to quantize."""
    begin = time.perf_counter()
    quantized = copy.deepcopy(model)
    for _ in quantize_model(LlamaAdapter(quantized), batches, config, weights):
        pass
    seconds = round(time.perf_counter() - begin, 2)
    return evaluate({"original": model, "quantized": quantized}, test)["quantized"], seconds


def main() -> int:
    args = parse_arguments()
    transformers.utils.logging.set_verbosity_error()
    common = {
        "model": Path(args.model).name,
        "sequences": args.sequences,
        "length": args.length,
        "calibration": "+".join(Path(source).name for source in args.calibration),
        "test_text": Path(args.evaluate).name,
        "windows": args.windows,
        "gpu": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "commit": args.commit,
    }
    fresh = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS.split(), restval="")
        if fresh:
            writer.writeheader()
        for settings, score in measure(args):
            row: dict = common | settings | {"ppl": round(score.ppl, 4), "kl": round(score.kl, 6)}
            writer.writerow(row)
            file.flush()
            print(f"{' '.join(map(str, settings.values())):60} ppl {score.ppl:8.3f}  KL {score.kl:.5f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
