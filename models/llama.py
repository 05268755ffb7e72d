"""Llama-family decoders: which linears share an input, and how one layer is run by itself."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

Stages = tuple[tuple[str, ...], ...]

LLAMA_STAGES: Stages = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)

FAMILIES: dict[str, Stages] = {
    "llama": LLAMA_STAGES,  # Llama 2, 3.x, SmolLM2
    "mistral": LLAMA_STAGES,
    "qwen2": LLAMA_STAGES,  # Qwen2, Qwen2.5
    "qwen3": LLAMA_STAGES,  # Qwen3 dense
}


def check_family(config: PretrainedConfig, source: str) -> None:
    """Raises ValueError that lists the supported types where the model is of another."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"{source}: model type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)}")


class LlamaAdapter:
    """The adapter (ptq.adapter) of a loaded model.  Runs layers under SDPA's own causal mask, so without padding."""

    def __init__(self, model: PreTrainedModel):
        check_family(model.config, type(model).__name__)
        self.stages = FAMILIES[model.config.model_type]
        self._config = model.config
        self._body: Any = model.get_decoder()
        self._head: Any = model.get_output_embeddings()

    def embed(self, tokens: Tensor) -> Tensor:
        window = getattr(self._config, "sliding_window", None)
        if window is not None and tokens.shape[1] > window:
            raise ValueError(f"sequences of {tokens.shape[1]} tokens exceed the model's sliding window; use at most {window}")
        return self._body.embed_tokens(tokens)

    def layers(self) -> Iterator[tuple[str, nn.Module]]:
        for index, layer in enumerate(self._body.layers):
            yield f"model.layers.{index}", layer

    def forward(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self._body.rotary_emb(hidden, position_ids=positions)
        return layer(hidden, position_embeddings=rotary, position_ids=positions)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._body.norm(hidden))
