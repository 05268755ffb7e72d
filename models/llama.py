"""Llama-family decoders: which linears share an input, and how one layer is run by itself."""

from collections.abc import Iterator, Sequence
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
    """The adapter (ptq.runtime.adapter) of a loaded model.  Runs layers under SDPA's own causal mask, so without padding."""

    def __init__(self, model: PreTrainedModel):
        check_family(model.config, type(model).__name__)
        self.stages = FAMILIES[model.config.model_type]
        self.writers: tuple[str, str] = ("self_attn.o_proj", "mlp.down_proj")
        self.model, self.config = model, model.config
        self.names = tuple(f"model.layers.{index}" for index in range(model.config.num_hidden_layers))
        self._body: Any = model.get_decoder()
        self._head: Any = model.get_output_embeddings()

    def parameters(self) -> int:
        """How many there are."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def check_length(self, tokens: Tensor) -> None:
        window = getattr(self.config, "sliding_window", None)
        if window is not None and tokens.shape[1] > window:
            raise ValueError(f"sequences of {tokens.shape[1]} tokens exceed the model's sliding window; use at most {window}")

    def embed(self, tokens: Tensor) -> Tensor:
        self.check_length(tokens)
        return self._body.embed_tokens(tokens)

    def skeleton(self) -> Iterator[tuple[str, nn.Module]]:
        yield from zip(self.names, self._body.layers, strict=True)

    def layers(self, order: Sequence[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
        for index in range(len(self.names)) if order is None else order:
            yield self.names[index], self._body.layers[index]

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self._body.rotary_emb(hidden, position_ids=positions)

    def forward(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return layer(hidden, position_embeddings=self.rotary(hidden, positions), position_ids=positions)

    def logits(self, hidden: Tensor) -> Tensor:
        return self._head(self._body.norm(hidden))

    def ends(self) -> dict[str, Tensor]:
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        tensors = self.model.state_dict()
        return {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.") and name not in tied}

    def in_dtype(self, dtype: torch.dtype) -> "LlamaAdapter":
        """The same with parameters of another dtype; the model's own change.  (Buffers do not: rotary frequencies stay float32.)"""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        return self
