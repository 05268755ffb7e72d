"""The tensors of a layer as checkpoints of each family hold them: names, and sizes in words of the config.

Linears stand in the order they run, by the input they read, as running the model finds them (ptq.models.adapter); a test
compares the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ptq.models.families import GATE_UP_DOWN, W132

Rows = Mapping[str, str]


@dataclass(frozen=True)
class Tensors:
    """`groups`: (input columns, output rows by linear); * stands for each expert.  `others`: sizes of what is no linear to be
    quantized.  `biased`: linears with a bias.  `dense`: of layers without the mixture that the others have."""

    groups: tuple[tuple[str, Rows], ...]
    others: Rows
    biased: tuple[str, ...] = ()
    dense: "Tensors | None" = None


QKV: Rows = {"self_attn.q_proj": "out", "self_attn.k_proj": "kv", "self_attn.v_proj": "kv"}
OUTPUT: Rows = {"self_attn.o_proj": "d"}
ATTENTION = (("d", QKV), ("out", OUTPUT))
INPUT: Rows = {"input_layernorm.weight": "d"}
AFTER: Rows = {"post_attention_layernorm.weight": "d"}
AROUND: Rows = {"post_feedforward_layernorm.weight": "d"}
HEADS: Rows = {"self_attn.q_norm.weight": "head", "self_attn.k_norm.weight": "head"}
WHOLE: Rows = {"self_attn.q_norm.weight": "out", "self_attn.k_norm.weight": "kv"}
ROUTER: Rows = {"mlp.gate.weight": "experts d"}


def mlp(prefix: str, inner: str, names: tuple[str, str, str] = GATE_UP_DOWN) -> tuple[tuple[str, Rows], tuple[str, Rows]]:
    gate, up, down = (f"{prefix}.{name}" for name in names)
    return ("d", {gate: inner, up: inner}), (inner, {down: "d"})


GATE_UP, DOWN = mlp("mlp", "inner")
EXPERTS = "mlp.experts.*"
LLAMA = Tensors((*ATTENTION, GATE_UP, DOWN), {**INPUT, **AFTER})
QWEN2 = replace(LLAMA, biased=tuple(QKV))
QWEN3 = replace(LLAMA, others={**LLAMA.others, **HEADS})
GEMMA2 = replace(LLAMA, others={**LLAMA.others, **AROUND, "pre_feedforward_layernorm.weight": "d"})
OLMO2 = replace(LLAMA, others={**AFTER, **AROUND, **WHOLE})
TENSORS: dict[str, Tensors] = {
    **dict.fromkeys(("llama", "smollm3", "mistral", "ministral", "granite"), LLAMA),
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "phi3": replace(
        LLAMA, groups=(("d", {"self_attn.qkv_proj": "qkv"}), ATTENTION[1], ("d", {"mlp.gate_up_proj": "gate_up"}), DOWN)
    ),
    "gemma2": GEMMA2,
    "gemma3_text": replace(GEMMA2, others={**GEMMA2.others, **HEADS}),
    **dict.fromkeys(("olmo2", "olmo3"), OLMO2),
    "cohere2": Tensors((("d", {**QKV, **GATE_UP[1]}), ATTENTION[1], DOWN), INPUT),
    "mixtral": Tensors((*ATTENTION, *mlp(EXPERTS, "inner", W132)), {**LLAMA.others, **ROUTER}),
    "qwen2_moe": Tensors(
        (*ATTENTION, *mlp("mlp.shared_expert", "shared"), *mlp(EXPERTS, "expert")),
        {**LLAMA.others, **ROUTER, "mlp.shared_expert_gate.weight": "one d"},
        biased=QWEN2.biased,
        dense=QWEN2,
    ),
    "qwen3_moe": Tensors((*ATTENTION, *mlp(EXPERTS, "expert")), {**QWEN3.others, **ROUTER}, dense=QWEN3),
    "olmoe": Tensors((*ATTENTION, *mlp(EXPERTS, "inner")), {**LLAMA.others, **WHOLE, **ROUTER}),
    "llama4_text": replace(LLAMA, groups=(*ATTENTION, *mlp("feed_forward", "mlp"))),
    "granitemoe": Tensors(
        (*ATTENTION, *mlp("block_sparse_moe.experts.*", "inner", W132)),
        {**LLAMA.others, "block_sparse_moe.router.weight": "experts d"},
    ),
    "gpt_oss": Tensors(
        (*ATTENTION, *mlp(EXPERTS, "inner")),
        {**LLAMA.others, "mlp.router.weight": "experts d", "mlp.router.bias": "experts", "self_attn.sinks": "heads"},
        biased=(*QKV, *OUTPUT, *(f"{EXPERTS}.{name}" for name in GATE_UP_DOWN)),
    ),
}
