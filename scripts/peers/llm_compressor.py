"""Quantize with llm-compressor: runs inside its own environment, and imports nothing of ptq.

    python llm_compressor.py MODEL TOKENS.npy OUTPUT SCHEME-METHOD[-GROUP]        NVFP4A16-rtn, NVFP4-gptq (W4A4), W4A16-gptq-64 …

MODEL: a model folder.  TOKENS.npy: token ids (n, length).  OUTPUT gets a compressed-tensors checkpoint, and peer.json.
Everything but the scheme and the modifier is llm-compressor's default.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.quantization import preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

MODIFIERS = {"rtn": QuantizationModifier, "gptq": GPTQModifier}


def main(model_folder: str, tokens_file: str, output: str, recipe: str) -> None:
    name, method, *group = recipe.split("-")
    scheme = preset_name_to_scheme(name, ["Linear"])
    if group and scheme.weights is not None:
        scheme.weights.group_size = int(group[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = np.load(tokens_file)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    begin = time.perf_counter()
    dataset = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": np.ones_like(tokens).tolist()})
    modifier = MODIFIERS[method](config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=dataset if method == "gptq" or scheme.input_activations else None,
        recipe=modifier,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
    )
    seconds = time.perf_counter() - begin
    model.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    about = {"peer": "llm-compressor", "version": version("llmcompressor"), "recipe": recipe, "seconds": seconds}
    (Path(output) / "peer.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
