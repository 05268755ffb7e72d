"""Quantize with NVIDIA ModelOpt: runs inside its own environment, and imports nothing of ptq.

    python model_optimizer.py MODEL TOKENS.npy OUTPUT RECIPE        max, mse, local_hessian or default

MODEL: a model folder.  TOKENS.npy: token ids (n, length).  NVFP4 weights, activations untouched but by `default`, which is
ModelOpt's NVFP4_DEFAULT_CFG (W4A4); scales by 126-code sweeps
(`fp8_scale_sweep`) for mse and local_hessian.  transformers cannot load ModelOpt's own layout, so its export is renamed, tensor by
tensor, to compressed-tensors, which stores the same codes and scales and the tensor scale's reciprocal.  OUTPUT gets that, and
peer.json.
"""

import copy
import json
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

CONFIGS = {
    "default": mtq.NVFP4_DEFAULT_CFG,
    "max": mtq.W4A16_NVFP4_CFG,
    "mse": mtq.NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG,
    "local_hessian": mtq.NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG,
}
WEIGHTS = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "dynamic": False,
    "strategy": "tensor_group",
    "group_size": 16,
}


def config(recipe: str) -> dict:
    """ModelOpt's preset, but for `default` without its quantizers of activations."""
    chosen = copy.deepcopy(CONFIGS[recipe])
    if recipe == "default":
        return chosen
    chosen["quant_cfg"] = [*chosen["quant_cfg"], {"quantizer_name": "*input_quantizer", "enable": False}]
    return chosen


def rename(exported: Path, output: Path, activations: dict | None) -> None:
    """ModelOpt's export as a compressed-tensors checkpoint."""
    output.mkdir(parents=True)
    for path in exported.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "hf_quant_config.json"):
            shutil.copy(path, output)
    for path in exported.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(path).items():
            if name.endswith(".weight") and tensor.dtype == torch.uint8:
                tensors[f"{name}_packed"] = tensor
            elif name.endswith(".weight_scale_2"):
                tensors[name.removesuffix("_scale_2") + "_global_scale"] = (1 / tensor.float()).reshape(1)
            elif name.endswith(".input_scale") and activations:
                tensors[name.removesuffix("_scale") + "_global_scale"] = (1 / tensor.float()).reshape(1)
            elif not name.endswith(".input_scale"):
                tensors[name] = tensor
        save_file(tensors, output / path.name, metadata={"format": "pt"})
    described = json.loads((exported / "config.json").read_text())
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": activations, "output_activations": None}
    described["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": "nvfp4-pack-quantized"}},
        "ignore": ["lm_head"],
    }
    (output / "config.json").write_text(json.dumps(described, indent=1) + "\n")


def main(model_folder: str, tokens_file: str, output: str, recipe: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.from_numpy(np.load(tokens_file)).to(device)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    begin = time.perf_counter()

    @torch.no_grad()
    def forward(model: torch.nn.Module) -> None:
        for batch in tokens.split(max(1, 4096 // tokens.shape[1])):
            model(batch, use_cache=False)

    mtq.quantize(model, config(recipe), forward)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=folder)
        rename(Path(folder), Path(output), WEIGHTS | {"dynamic": "local"} if recipe == "default" else None)
    tokenizer.save_pretrained(output)
    about = {"peer": "ModelOpt", "version": version("nvidia-modelopt"), "recipe": recipe, "seconds": seconds}
    (Path(output) / "peer.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
