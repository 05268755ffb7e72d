#!/usr/bin/env python
"""What quantizing a trained mixture costs in KL, with its experts calibrated on the tokens routed to them and on all.

    python scripts/bench_mixture.py --seed 0 --commit abc1234

A small Qwen3-MoE is trained for a minute on the characters of Python's language reference, calibrated on a part it was not trained
on, and compared on another.  Rows are appended to benchmarks/mixtures.csv.
"""

import argparse
import copy
import csv
import pydoc_data.topics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ptq.core.formats import get_format
from ptq.models.adapter import ModelAdapter
from ptq.run.loop import Calibration, quantize_model
from ptq.run.settings import make_recipe, settings_of

LENGTH = 128
HELD_OUT = 64
FIELDS = (
    *("seed", "train_seconds", "steps", "perplexity", "format", "case", "tokens", "all_tokens"),
    *("starved", "error", "kl", "perplexity_quantized", "commit"),
)


def windows(text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (n, LENGTH) to train, calibrate and compare on: every tenth window for each of the last two."""
    rows = text[: len(text) // LENGTH * LENGTH].view(-1, LENGTH)
    place = torch.arange(len(rows)) % 10
    return rows[place < 8], rows[place == 8], rows[place == 9][:HELD_OUT]


def make_model(vocabulary: int) -> PreTrainedModel:
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=vocabulary,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.01,
        max_position_embeddings=LENGTH,
    )
    config._experts_implementation = "eager"
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def train(model: nn.Module, rows: Tensor, seconds: float) -> int:
    """By Adam with a falling rate, for so many seconds of processor time; the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    begin, steps = time.process_time(), 0
    while (share := (time.process_time() - begin) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, steps / 50) * (1 - share)
        batch = rows[torch.randint(len(rows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    return steps


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    return torch.cat([model(input_ids=part).logits.log_softmax(-1) for part in rows.split(16)])


def perplexity(logs: Tensor, rows: Tensor) -> float:
    return float(F.nll_loss(logs[:, :-1].flatten(0, 1), rows[:, 1:].flatten()).exp())


def run(args: argparse.Namespace) -> list[dict]:
    text = "".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
    characters = {character: number for number, character in enumerate(sorted(set(text)))}
    to_train, to_calibrate, held_out = windows(torch.tensor([characters[character] for character in text]))
    torch.manual_seed(args.seed)
    model = make_model(len(characters))
    steps = train(model, to_train, args.seconds)
    model.eval().requires_grad_(False)
    reference = log_probabilities(model, held_out)
    known = {"seed": args.seed, "train_seconds": args.seconds, "steps": steps, "commit": args.commit}
    known["perplexity"] = round(perplexity(reference, held_out), 3)
    cases = [("nvfp4", "rtn-absmax-none", 0, False), ("mxfp4", "rtn-absmax-none", 0, False)]
    cases += [("nvfp4", "default", n, whole) for n in (1024, 8192) for whole in (False, True)]
    cases += [("mxfp4", "default", 8192, whole) for whole in (False, True)]
    rows = []
    for format, case, tokens, all_tokens in cases:
        quantized = copy.deepcopy(model)
        chosen = to_calibrate[torch.randperm(len(to_calibrate), generator=torch.Generator().manual_seed(args.seed))]
        calibration = Calibration(chosen[: tokens // LENGTH].split(16), all_tokens=all_tokens) if tokens else None
        recipe = make_recipe(get_format(format), settings_of(case))
        records = [record for record, _ in quantize_model(ModelAdapter(quantized), recipe, calibration)]
        logs = log_probabilities(quantized, held_out)
        starved = sum(record.routed_tokens is not None and record.routed_tokens < record.tokens for record in records)
        errors = [record.error for record in records if record.error is not None]
        row = {"format": format, "case": case, "tokens": tokens, "all_tokens": all_tokens, "starved": starved}
        row["error"] = round(sum(errors) / len(errors), 5) if errors else ""
        row["kl"] = round(float(F.kl_div(logs, reference, log_target=True, reduction="sum") / held_out.numel()), 6)
        rows.append(known | row | {"perplexity_quantized": round(perplexity(logs, held_out), 3)})
        print(rows[-1], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0, help="processor time of the training")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/mixtures.csv"))
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    args = parser.parse_args()
    rows = run(args)
    fresh = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
