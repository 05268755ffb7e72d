"""The families of decoders: what their layers' code does not say.

Which linears read the same input, and in what order they run, is found by running a layer on the meta device; masks,
rotary embeddings, positions and factors are the model's own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
EXPERTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
MIXTRAL = ("mlp.experts.*.w1", "mlp.experts.*.w3")
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")

Residual = Mapping[str, float]
BOTH: Residual = {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0}
NONE: Residual = {}


def granite(config: Any) -> Residual:
    return dict.fromkeys(BOTH, float(config.residual_multiplier))


@dataclass(frozen=True)
class Family:
    """`fused`: linears that serving engines fuse, * for each expert.  `residual`: linears whose output goes to the residual
    stream as it is but for a factor, the last of them making the layer's output; none where a norm comes between.

    `keep`: modules that stay in high precision, a mixture's routers.  `experts`: names of an expert's gate, up and down
    projections in checkpoints.  `renamed`: (in the model, in checkpoints) parts of names that differ.  `attention`: the
    implementation, where SDPA has what the model needs no place for (soft caps, sinks).
    """

    fused: tuple[tuple[str, ...], ...] = (ATTENTION, MLP)
    residual: Residual | Callable[[Any], Residual] = field(default_factory=lambda: BOTH)
    keep: tuple[str, ...] = ()
    experts: tuple[str, str, str] | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    attention: str = "sdpa"

    def residual_of(self, config: Any) -> Residual:
        return self.residual(config) if callable(self.residual) else self.residual


LLAMA = Family()
AFTER_NORM = Family(residual=NONE)
QWEN_MOE = Family((ATTENTION, MLP, EXPERTS), keep=("mlp.gate",), experts=GATE_UP_DOWN)

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,  # Llama 2, 3.x, SmolLM2
    "smollm3": LLAMA,
    "mistral": LLAMA,
    "ministral": LLAMA,
    "qwen2": LLAMA,  # Qwen2, Qwen2.5
    "qwen3": LLAMA,  # Qwen3 dense
    "phi3": Family(()),  # Phi-3, Phi-4: q/k/v and gate/up are one linear each in the checkpoint
    "granite": Family(residual=granite),
    "gemma2": Family(residual=NONE, attention="eager"),  # scores have a soft cap
    "gemma3_text": AFTER_NORM,
    "olmo2": AFTER_NORM,
    "olmo3": AFTER_NORM,
    "cohere2": LLAMA,  # attention and MLP read the same input, and both add to the layer's
    "mixtral": Family(
        (ATTENTION, MIXTRAL),
        keep=("mlp.gate",),
        experts=("w1", "w3", "w2"),
        renamed=((".mlp.", ".block_sparse_moe."),),
    ),
    "qwen2_moe": Family((ATTENTION, MLP, EXPERTS, SHARED), keep=("mlp.gate", "mlp.shared_expert_gate"), experts=GATE_UP_DOWN),
    "qwen3_moe": QWEN_MOE,
    "olmoe": QWEN_MOE,
}


def family_of(config: Any, source: str) -> Family:
    """Raises ValueError that lists the supported types where the model is of another."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{source}: model type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(CONTRIBUTING.md says how to add one)"
        )
    return FAMILIES[config.model_type]
