"""Quantize with AutoRound: runs inside its own environment, and imports nothing of ptq.

    python auto_round_nvfp4.py MODEL TOKENS.npy OUTPUT ITERATIONS        200 is AutoRound's default; 0 is its RTN

MODEL: a model folder.  TOKENS.npy: token ids (n, length).  NVFP4 weights, activations untouched.  AutoRound 0.14 exports NVFP4 in
no layout that transformers reads with 16-bit activations, so OUTPUT gets its dequantized weights (its format `fake`; on a CPU in
float32), and peer.json with the bits per weight that its layout for vLLM would take.
"""

import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer

SCHEME = {"bits": 4, "group_size": 16, "data_type": "nv_fp", "sym": True, "act_bits": 16}


def main(model_folder: str, tokens_file: str, output: str, recipe: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.from_numpy(np.load(tokens_file))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    begin = time.perf_counter()
    rounder = AutoRound(
        model,
        tokenizer,
        scheme=SCHEME,
        dataset=torch.utils.data.DataLoader(tokens, batch_size=8),
        iters=int(recipe),
        seqlen=tokens.shape[1],
        nsamples=len(tokens),
        device_map=device,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounder.quantize_and_save(folder, format="fake")  # in a folder inside, of a name of its own
        seconds = time.perf_counter() - begin
        config = next(Path(folder).rglob("config.json"))
        shutil.move(config.parent, output)
    about = {"peer": "AutoRound", "version": version("auto-round"), "recipe": recipe, "seconds": seconds}
    (Path(output) / "peer.json").write_text(json.dumps(about | {"dequantized_bits_per_weight": 4.5}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
