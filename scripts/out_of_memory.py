#!/usr/bin/env python
"""Quantizes a model again and again with less of the GPU's memory, until there is none; prints a JSON line a run.

    python scripts/out_of_memory.py
    python scripts/out_of_memory.py --width 1024 --inner 8192 --effort fast

Its forward passes take most of the memory.  Ends with 1 where a run neither finished, with the errors that it has with all the
memory, nor said in its error what to set, or where it left memory taken.
"""

import argparse
import gc
import json
import math
import re
import sys
import warnings

import torch
from random_model import random_adapter
from transformers import AutoConfig, PretrainedConfig

from ptq.core.formats import get_format
from ptq.run.loop import Calibration, quantize_layers
from ptq.run.plan import make_plan
from ptq.run.settings import make_recipe, settings_of
from ptq.runtime.memory import out_of_memory_says
from ptq.settings import EFFORTS

VOCABULARY = 1024
SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
SAME = 1e-2  # of the mean error: sums of other batches turn near-ties over
REMEDY = "give --batch 1, fewer sequences or shorter ones"
WHAT_TO_SET = re.compile(rf"out of memory .*; set --|no memory left .*{REMEDY}$")


def quantize(config: PretrainedConfig, effort: str, tokens: torch.Tensor) -> dict:
    """How a run ended, the sequences it ran at once layer by layer, and the mean error of its linears."""
    adapter = random_adapter(config, tokens.device)
    plan = make_plan(adapter, make_recipe(get_format("nvfp4"), settings_of(effort)))
    errors, batches, end = [], [], "finished"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with out_of_memory_says(REMEDY):
                for done in quantize_layers(adapter, plan, Calibration((tokens,))):
                    errors += [record.error for record in done.records]
                    batches.append(done.batch)
        except torch.OutOfMemoryError as error:
            end = str(error).splitlines()[0]
    told = [str(one.message) for one in said if "out of memory" in str(one.message)]
    return {"end": end, "batches": batches, "error": sum(errors) / len(errors) if end == "finished" else None, "told": told}


def peak() -> int:
    """Bytes allocated at most since the last call."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--effort", choices=[name for name in EFFORTS if not EFFORTS[name]["row_feedback"]], default="default")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no CUDA device, whose memory this is about")
    config = AutoConfig.for_model(
        "llama",
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 64,
        vocab_size=VOCABULARY,
        max_position_embeddings=args.length,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (args.sequences, args.length), generator=generator).cuda()
    quantize(config, args.effort, tokens)  # compiles
    peak()
    whole = quantize(config, args.effort, tokens)
    most, held, lost = peak(), torch.cuda.memory_allocated(), 0
    print(json.dumps({"share": 1, "peak_gb": round(most / 1e9, 3), **whole}), flush=True)
    for share in SHARES:
        torch.cuda.set_per_process_memory_fraction(share * most / torch.cuda.get_device_properties(0).total_memory)
        found = quantize(config, args.effort, tokens)
        if found["end"] == "finished":
            fine = math.isclose(found["error"], whole["error"], rel_tol=SAME)
        else:
            fine = bool(WHAT_TO_SET.search(found["end"]))
        used = peak()
        fine = fine and torch.cuda.memory_allocated() <= held
        lost += not fine
        print(json.dumps({"share": share, "peak_gb": round(used / 1e9, 3), **found, "lost": not fine}), flush=True)
    return lost > 0


if __name__ == "__main__":
    sys.exit(main())
