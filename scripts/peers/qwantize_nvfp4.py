"""Quantize with qwantize: runs inside its own environment, and imports nothing of ptq.

    python qwantize_nvfp4.py MODEL TOKENS.npy OUTPUT optimal_hessian

MODEL: a model folder.  TOKENS.npy: token ids (n, length).  Every linear of the decoder layers is rounded to nearest under
qwantize's scales for the inputs it has in the unquantized model.  qwantize writes no checkpoints, and its NVFP4 has no tensor
scale, which checkpoint layouts need: OUTPUT gets dequantized weights in bfloat16 (exactly), and peer.json.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import qwantize
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer


def inputs_of(model: nn.Module, linears: list[nn.Linear], tokens: Tensor) -> list[Tensor]:
    """What each linear reads (tokens, d_in) in a run of the model."""
    seen: dict[nn.Module, list[Tensor]] = {linear: [] for linear in linears}
    hooks = [m.register_forward_hook(lambda m, x, _: seen[m].append(x[0].detach().flatten(0, -2))) for m in linears]
    for batch in tokens.split(max(1, 8192 // tokens.shape[1])):
        model(batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen.values()]


@torch.no_grad()
def main(model_folder: str, tokens_file: str, output: str, recipe: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.from_numpy(np.load(tokens_file)).to(device)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).to(device).eval()
    original = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).to(device).eval()
    quantize = getattr(qwantize, f"nvfp4_{recipe}" + ("_triton" if device == "cuda" else ""))
    begin = time.perf_counter()
    for ours, theirs in zip(model.model.layers, original.model.layers, strict=True):
        linears = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
        targets = [m for m in ours.modules() if isinstance(m, nn.Linear)]
        for target, X in zip(targets, inputs_of(original, linears, tokens), strict=True):
            blocks = target.weight.view(target.out_features, -1, 16)
            target.weight.copy_(quantize(blocks, return_dequant=True, X=X)[2].view_as(target.weight))
    seconds = time.perf_counter() - begin
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(output)
    about = {"peer": "qwantize", "version": version("qwantize"), "recipe": recipe, "seconds": seconds}
    (Path(output) / "peer.json").write_text(json.dumps(about | {"dequantized_bits_per_weight": 4.5}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
