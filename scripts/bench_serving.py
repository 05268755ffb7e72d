#!/usr/bin/env python
"""Tokens a second in vLLM of a model in 4 bits and in bfloat16, with random weights of a given shape.

    python scripts/bench_serving.py --shape Llama-3.1-8B --formats nvfp4 --commit abc1234

The 4-bit checkpoints are made on the GPU by RTN; the bfloat16 model's weights vLLM makes itself.  `decode`: tokens a second of
all sequences while they are written, from the times of answers of two lengths; `prefill`: tokens of the prompts a second.
Medians over --repeats.  Rows are appended to benchmarks/throughput.csv.
"""

import argparse
import csv
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from random_model import SHAPES, random_adapter, shape_config
from torch import nn

FIELDS: tuple[str, ...] = (
    *("shape", "layers", "format", "kernel", "gb", "batch", "prompt", "decode", "prefill"),
    *("engine", "gpu", "torch", "commit"),
)

BASELINE = "bfloat16"


def make_checkpoint(folder: Path, shape: str, layers: int | None, format: str) -> None:
    """A folder that vLLM loads; of bfloat16 the config alone, for which it makes weights itself."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from ptq.core.formats import get_format
    from ptq.export.checkpoint import layer_tensors, shard_name, write_rest
    from ptq.export.compressed_tensors import CompressedTensors
    from ptq.export.files import save_tensors
    from ptq.run.loop import Calibration, quantize_layers
    from ptq.run.plan import make_plan
    from ptq.run.recipe import Recipe

    config = shape_config(shape, layers)
    adapter, layout = random_adapter(config, torch.device("cuda" if torch.cuda.is_available() else "cpu")), CompressedTensors()
    if format == BASELINE:
        config.architectures, config.dtype = [type(adapter.model).__name__], torch.bfloat16
        config.save_pretrained(folder)
        return
    plan = make_plan(adapter, Recipe(get_format(format), "rtn", "absmax"))
    for done in quantize_layers(adapter, plan, Calibration()):
        path = folder / shard_name(done.layer.index, len(adapter.names))
        save_tensors(path, layer_tensors(done.layer, done.quantized, layout))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, "<unk>")))
    write_rest(folder, adapter, tokenizer, plan.formats, layout, plan.ignored)


def measure(folder: Path, format: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What vLLM does with the checkpoint, by batch."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is then in this process, to be looked at
    from vllm import LLM, SamplingParams, __version__  # type: ignore[import-not-found]

    about = {"dtype": "bfloat16", "max_model_len": args.prompt + args.tokens + 1, "max_num_seqs": max(args.batches)}
    about |= {"skip_tokenizer_init": True, "enable_prefix_caching": False, "generation_config": "vllm"}
    llm = LLM(str(folder), load_format="dummy" if format == BASELINE else "auto", **{**about, **args.options})
    kernels, size = llm.apply_model(describe)[0]
    prompt = list(range(10, 10 + args.prompt))

    def seconds(batch: int, tokens: int) -> float:
        ask = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt}] * batch, ask, use_tqdm=False)
        return time.perf_counter() - begin

    found = []
    for batch in args.batches:
        seconds(batch, 8)  # kernels are compiled
        short, long = (
            statistics.median(seconds(batch, tokens) for _ in range(args.repeats)) for tokens in (1, args.tokens + 1)
        )
        rates = {"decode": round(batch * args.tokens / (long - short), 1), "prefill": round(batch * args.prompt / short)}
        found.append({"batch": batch, "kernel": kernels, "gb": round(size / 1e9, 2), "engine": f"vllm {__version__}"} | rates)
    return found


def describe(model: nn.Module) -> tuple[str, int]:
    """(vLLM's names of the code that multiplies, bytes of the parameters)."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    schemes = [getattr(module, "scheme", None) for module in model.modules()]
    kernels = {type(found).__name__ for part in (*schemes, *methods) if (found := getattr(part, "kernel", None))}
    return ", ".join(sorted(kernels)), sum(parameter.nbytes for parameter in model.parameters())


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each checkpoint is made and served in processes of their own, which give the GPU back."""
    context = multiprocessing.get_context("spawn")
    for format in (BASELINE, *args.formats):
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
            pool.submit(make_checkpoint, Path(folder), args.shape, args.layers, format).result()
            for row in pool.submit(measure, Path(folder), format, args).result():
                yield {"format": format} | row


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--formats", nargs="+", default=["nvfp4"], help="beside bfloat16 (default: nvfp4)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64], help="default: 1 64")
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="that are written (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="more arguments for the engine")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/throughput.csv"))
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    about = {"shape": args.shape, "layers": args.layers or "", "prompt": args.prompt, "torch": torch.__version__}
    about |= {"gpu": torch.cuda.get_device_name(), "commit": args.commit}
    for row in rows(args):
        fresh = not args.csv.exists()
        with args.csv.open("a", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            if fresh:
                writer.writeheader()
            writer.writerow(about | row)
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
