"""Models with random weights, made on the device layer by layer: to time the work at sizes for which there is no checkpoint."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from ptq.models.streaming import StreamingAdapter

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512},
    "Llama-3.2-1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "Llama-3.1-8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "Llama-3.1-70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "Qwen3-30B-A3B": {
        **{"model_type": "qwen3_moe", "hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48},
        **{"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True},
        **{"num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936},
    },
}
LLAMA_3 = {"vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072}
WEIGHT_STD = 0.02


def shape_config(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The config of a shape, or of its first `layers` layers."""
    settings: dict[str, Any] = {"tie_word_embeddings": False} | LLAMA_3 | SHAPES[shape]
    if settings["num_key_value_heads"] > settings["num_attention_heads"]:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings["num_hidden_layers"] = layers or settings["num_hidden_layers"]
    return AutoConfig.for_model(**{"model_type": "llama"} | settings)


def random_adapter(config: PretrainedConfig, device: torch.device) -> StreamingAdapter:
    """A bfloat16 model whose tensors depend on their names only."""
    shapes: dict[str, torch.Size] = {}

    def make(names: Sequence[str]) -> Mapping[str, Tensor]:
        return {name: random_tensor(name, shapes[name], device) for name in names}

    adapter = StreamingAdapter(config, make, dtype=torch.bfloat16, device=device)
    shapes |= adapter.shapes()
    return adapter


def random_tensor(name: str, shape: torch.Size, device: torch.device) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16, device=device)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, WEIGHT_STD, generator=generator)
