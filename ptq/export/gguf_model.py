"""What llama.cpp needs to know of a model beside its tensors, from transformers' config.json.

Sources: llama.cpp's conversion/base.py (set_gguf_parameters) and conversion/llama.py, as of llama-cpp-python 0.3.36.
"""

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from ptq.models.families import head_dim


@dataclass(frozen=True)
class Architecture:
    """`key`: its name in gguf's MODEL_ARCH; `name`: in the file.  `permuted`: whether rows of q and k change places."""

    key: str
    name: str
    permuted: bool


ARCHITECTURES = {
    "llama": Architecture("LLAMA", "llama", permuted=True),
    "mistral": Architecture("LLAMA", "llama", permuted=True),
    "qwen2": Architecture("QWEN2", "qwen2", permuted=False),
    "qwen3": Architecture("QWEN3", "qwen3", permuted=False),
}


def architecture_of(config: dict) -> Architecture:
    """Raises ValueError that lists what there is, or says how to install gguf."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ValueError("the layout gguf needs the package gguf: pip install 'gguf>=0.19'") from None
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"model type {kind!r} cannot be written as GGUF here; {', '.join(ARCHITECTURES)} can: choose another layout"
        )
    return ARCHITECTURES[kind]


def rope_of(config: dict) -> dict:
    """`rope_type`, `rope_theta` and their like, from transformers 5's one dict or from where they were before."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("rope_type", rope.get("type", "default"))
    return rope


def add_settings(writer, config: dict, kinds: set[str]) -> None:
    """Raises ValueError for rotary embeddings that GGUF has no word for."""
    import gguf

    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    width = head_dim(SimpleNamespace(**config))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = rope_of(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope["rope_type"].upper()])
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] not in ("default", "llama3"):
        raise ValueError(f"rope type {rope['rope_type']!r} cannot be written as GGUF here: choose another layout")
    types = {"NVFP4": "MOSTLY_NVFP4", "MXFP4": "MOSTLY_MXFP4_MOE", "Q4_0": "MOSTLY_Q4_0"}
    writer.add_file_type(gguf.LlamaFileType[types[min(kinds)]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def rope_factors(config: dict) -> Tensor | None:
    """What llama.cpp divides each frequency by (head_dim / 2,) for Llama 3.1's scaling, which the file holds as a tensor; or None.

    As in transformers' modeling_rope_utils: long waves by `factor`, short ones by 1, between them a blend of the frequencies.
    """
    rope = rope_of(config)
    if rope["rope_type"] != "llama3":
        return None
    dim = head_dim(SimpleNamespace(**config))
    waves = 2 * math.pi * rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - blend) / rope["factor"] + blend)
