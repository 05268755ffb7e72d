"""The families of decoders: what their layers' code does not say.

Which linears read the same input, and in what order they run, is found by running a layer on the meta device; masks,
rotary embeddings, positions and factors are the model's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Family:
    """`fused`: linears that serving engines fuse.  `residual`: linears whose output goes to the residual stream as it is but
    for a factor, the last of them making the layer's output; empty where a norm comes between."""

    fused: tuple[tuple[str, ...], ...] = (ATTENTION, MLP)
    residual: Mapping[str, float] = field(default_factory=lambda: {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0})


FAMILIES: dict[str, Family] = {
    "llama": Family(),  # Llama 2, 3.x, SmolLM2
    "mistral": Family(),
    "qwen2": Family(),  # Qwen2, Qwen2.5
    "qwen3": Family(),  # Qwen3 dense
}


def family_of(config: PretrainedConfig, source: str) -> Family:
    """Raises ValueError that lists the supported types where the model is of another."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{source}: model type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(CONTRIBUTING.md says how to add one)"
        )
    return FAMILIES[config.model_type]
