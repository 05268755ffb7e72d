"""Checkpoints in the compressed-tensors layout, which vLLM, SGLang and transformers load.  Written by our own code.

For a linear `<name>` of shape (d_out, d_in), weights only, activations untouched:

    nvfp4-pack-quantized   weight_packed U8 (d_out, d_in/2), even column in the low nibble, code = sign << 3 | rank
                           weight_scale F8_E4M3 (d_out, d_in/16);  weight_global_scale F32 [1] = 1 / tensor_scale, a divisor
    mxfp4-pack-quantized   weight_packed as above;  weight_scale U8 (d_out, d_in/32), the exponent plus 127
    pack-quantized         weight_packed I32 (d_out, d_in/8), code = q + 8, first column lowest
                           weight_scale BF16 (d_out, d_in/block);  weight_shape I64 [2]

Every other tensor keeps its name and is stored in bfloat16, the dtype compressed-tensors decompresses FP4 weights to: a bfloat16
model's are bit-identical.  Sources: the compressed-tensors package 0.20 (its files and its loader were the test).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ptq.formats import Format, encode_scales
from ptq.packing import Quantized, pack, pack_int32

DTYPE = torch.bfloat16


class ReadBackError(RuntimeError):
    """A written checkpoint does not load as the model it was made of."""


def pack_nvfp4(quantized: Quantized) -> dict[str, Tensor]:
    return pack_mxfp4(quantized) | {"weight_global_scale": (1 / quantized.tensor_scale).reshape(1)}


def pack_mxfp4(quantized: Quantized) -> dict[str, Tensor]:
    scales = encode_scales(quantized.scales, quantized.format.grid)
    return {"weight_packed": pack(quantized.codes), "weight_scale": scales}


def pack_int4(quantized: Quantized) -> dict[str, Tensor]:
    scales = encode_scales(quantized.scales, quantized.format.grid)
    shape = torch.tensor(quantized.codes.shape, dtype=torch.int64)
    return {"weight_packed": pack_int32(quantized.codes), "weight_scale": scales, "weight_shape": shape}


FLOAT = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
SCHEMES = {
    "nvfp4-pack-quantized": (pack_nvfp4, FLOAT | {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}),
    "mxfp4-pack-quantized": (pack_mxfp4, FLOAT | {"strategy": "group", "scale_dtype": "torch.uint8"}),
    "pack-quantized": (pack_int4, FLOAT | {"type": "int", "strategy": "group"}),
}


def checkpoint_tensors(name: str, quantized: Quantized) -> dict[str, Tensor]:
    """What the checkpoint stores for the linear `name`, on the CPU."""
    tensors = SCHEMES[quantized.format.scheme][0](quantized)
    return {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in tensors.items()}


def quantization_config(format: Format, ignored: tuple[str, ...]) -> dict:
    """The `quantization_config` of config.json.  Keys inside `weights` are checked by the readers; extra ones are refused."""
    weights = SCHEMES[format.scheme][1] | {"group_size": format.block}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format.scheme,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group | {"format": format.scheme}},
        "ignore": ["lm_head", *ignored],
        "kv_cache_scheme": None,
    }


def check_output(output: Path, needed_bytes: int) -> None:
    """Raises ValueError where `output` exists already, cannot be made, or does not fit on its disk."""
    if output.exists():
        raise ValueError(f"output {output} exists already; remove it or name another folder")
    parent = next(p for p in output.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"output {output} cannot be made: {parent} is not a folder one may write to")
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise ValueError(f"output {output} needs about {needed_bytes / 1e9:.2f} GB; {parent} has {free / 1e9:.2f} GB free")


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary folder beside `output` that becomes `output` at the end, or is removed if anything went wrong."""
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.absolute().parent))
    try:
        yield folder
        folder.chmod(0o755)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    packed: Mapping[str, Tensor],
    format: Format,
    ignored: tuple[str, ...] = (),
) -> None:
    """Writes weights (sharded), config, generation config, tokenizer and chat template into an existing folder.

    packed: all `checkpoint_tensors` of the model.  The model's own copies of those linears are not written.
    """
    quantized = {name.rpartition(".")[0] + ".weight" for name in packed if name.endswith(".weight_packed")}
    skip = quantized | ({"lm_head.weight"} if model.config.tie_word_embeddings else set())
    dense = {
        name: tensor.detach().to("cpu", DTYPE if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in model.state_dict().items()
        if name not in skip
    }
    save_torch_state_dict(dense | dict(packed), str(folder), max_shard_size="5GB", metadata={"format": "pt"})
    config = model.config.to_diff_dict() | {
        "architectures": [type(model).__name__],
        "dtype": str(DTYPE).removeprefix("torch."),
        "quantization_config": quantization_config(format, ignored),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@torch.no_grad()
def verify(folder: Path, model: PreTrainedModel, tokens: Tensor) -> float:
    """Max |logit difference| on `tokens` (n, length) between the checkpoint as transformers loads it and `model`, in bfloat16.

    The model's parameters are turned to bfloat16 for good (its buffers are not: the rotary frequencies stay in fp32, as the loader
    keeps them).  Raises ReadBackError where a tensor is missing from the checkpoint, or unexpected in it.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPE)
    device = next(model.parameters()).device
    loaded, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
        str(folder), dtype=DTYPE, attn_implementation="sdpa", output_loading_info=True
    )
    problems = [
        f"{kind}: {sorted(info[kind])[:3]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]
    ]
    if problems:
        raise ReadBackError(f"the checkpoint does not read back: {'; '.join(problems)}")
    ours = model(tokens.to(device)).logits
    theirs = loaded.to(device).eval()(tokens.to(device)).logits
    return float((ours.float() - theirs.float()).abs().max())
