"""The families of decoders: what their layers' code does not say.

Which linears read the same input, and in what order they run, is found by running a layer on the meta device; masks,
rotary embeddings, positions and factors are the model's own.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ptq.runtime.adapter import Group, LayerPlan, Scaling

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj")
EXPERTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
MIXTRAL = ("mlp.experts.*.w1", "mlp.experts.*.w3")
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
W132 = ("w1", "w3", "w2")
GRANITE_EXPERTS = ("block_sparse_moe.experts.*.w1", "block_sparse_moe.experts.*.w3")

SCALED = (
    ("input_layernorm", ATTENTION),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    ("post_attention_layernorm", MLP),
    ("mlp.up_proj", ("mlp.down_proj",)),
)

Residual = Mapping[str, float]
BOTH: Residual = {"self_attn.o_proj": 1.0, "mlp.down_proj": 1.0}
NONE: Residual = {}


def granite(config: Any) -> Residual:
    return dict.fromkeys(BOTH, float(config.residual_multiplier))


@dataclass(frozen=True)
class Stacking:
    """How transformers stacks the experts of a layer: gate_up_proj (E, 2m, d), down_proj (E, d, m), and biases of these names.

    `names`: of an expert's gate, up and down projections in checkpoints.  `concatenated`: all of a gate before all of its up,
    else the two alternate.  `transposed`: weights are (d_in, d_out).  `ends`: where checkpoints stack too, (the end of a name,
    what transformers calls that parameter).
    """

    names: tuple[str, str, str]
    concatenated: bool = True
    transposed: bool = False
    ends: tuple[tuple[str, str], ...] = ()

    def parts(self, parameter: str, stacked: "Tensor") -> "dict[str, Tensor]":
        """By the name inside an expert, the tensors (E, …) that the stacked `parameter` (gate_up_proj, down_proj, and these with
        _bias) holds.  Views."""
        gate, up, down = self.names
        kind = "bias" if parameter.endswith("_bias") else "weight"
        if self.transposed and kind == "weight":
            stacked = stacked.mT
        if parameter.startswith("down"):
            return {f"{down}.{kind}": stacked}
        both = stacked.chunk(2, dim=1) if self.concatenated else (stacked[:, ::2], stacked[:, 1::2])
        return {f"{name}.{kind}": part for name, part in zip((gate, up), both, strict=True)}


@dataclass(frozen=True)
class Family:
    """`fused`: linears that serving engines fuse, * for each expert.  `residual`: linears whose output goes to the residual
    stream as it is but for a factor, the last of them making the layer's output; none where a norm comes between.

    `keep`: modules that stay in high precision, a mixture's routers.  `experts`: how those of a layer are stacked.
    `renamed`: (in the model, in checkpoints) parts of names that differ.  `attention`: the
    implementation, where SDPA has what the model needs no place for (soft caps, sinks).
    `scaled`: (a norm or linear, the linears that read its output channel by channel), where all that they read may be scaled.
    """

    fused: tuple[tuple[str, ...], ...] = (ATTENTION, MLP)
    residual: Residual | Callable[[Any], Residual] = field(default_factory=lambda: BOTH)
    keep: tuple[str, ...] = ()
    experts: Stacking | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    attention: str = "sdpa"
    scaled: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def residual_of(self, config: Any) -> Residual:
        return self.residual(config) if callable(self.residual) else self.residual


HEAD = LayerPlan(waves=((("",),),), fused=(), residual={}, output=None, last=True)
LLAMA = Family(scaled=SCALED)
AFTER_NORM = Family(residual=NONE)
QWEN_MOE = Family((ATTENTION, MLP, EXPERTS), keep=("mlp.gate",), experts=Stacking(GATE_UP_DOWN))

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
        experts=Stacking(W132),
        renamed=((".mlp.", ".block_sparse_moe."),),
    ),
    "qwen2_moe": Family(
        (ATTENTION, MLP, EXPERTS, SHARED),
        keep=("mlp.gate", "mlp.shared_expert_gate"),
        experts=Stacking(GATE_UP_DOWN),
    ),
    "qwen3_moe": QWEN_MOE,
    "olmoe": QWEN_MOE,
    "llama4_text": Family(  # without its mixture, whose experts are given all tokens
        (ATTENTION, ("feed_forward.gate_proj", "feed_forward.up_proj")),
        residual={"self_attn.o_proj": 1.0, "feed_forward.down_proj": 1.0},
    ),
    "granitemoe": Family(
        (ATTENTION, GRANITE_EXPERTS),
        residual=granite,
        keep=("block_sparse_moe.router",),
        experts=Stacking(
            W132,
            ends=(
                ("block_sparse_moe.input_linear.weight", "gate_up_proj"),
                ("block_sparse_moe.output_linear.weight", "down_proj"),
            ),
        ),
        renamed=((".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),),
    ),
    "gpt_oss": Family(
        (ATTENTION, EXPERTS),
        keep=("mlp.router",),
        experts=Stacking(
            GATE_UP_DOWN,
            concatenated=False,
            transposed=True,
            ends=tuple(
                (f"mlp.experts.{name}", name) for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
            ),
        ),
        attention="eager",  # sinks
    ),
}


def family_of(config: Any, source: str) -> Family:
    """Raises ValueError that lists the supported types where the model is of another."""
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"{source}: model type {config.model_type!r} is not supported; supported are {', '.join(FAMILIES)} "
            "(CONTRIBUTING.md says how to add one)"
        )
    return FAMILIES[config.model_type]


def head_dim(config: Any) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layer_plan(
    family: Family, config: Any, groups: Sequence[Group], keep: tuple[str, ...], experts: tuple[str, ...], share: float
) -> LayerPlan:
    """Of a layer whose linears are read in these groups, in the order they run.  `experts`: how the names of experts' linears
    begin, which see about `share` of the tokens."""
    linears = [name for group in groups for name in group]
    residual = {name: factor for name, factor in family.residual_of(config).items() if name in linears}
    last = next(reversed(family.residual_of(config)), None)
    return LayerPlan(
        waves=waves_of(groups),
        fused=expand(family.fused, linears),
        residual=residual,
        output=last if last in residual else None,
        keep=keep,
        experts=frozenset(name for name in linears if name.startswith(experts)),
        share=share,
        scalings=scalings_of(family, config, groups),
    )


def scalings_of(family: Family, config: Any, groups: Sequence[Group]) -> tuple[Scaling, ...]:
    """Those of the family whose readers are all that read that input."""
    read = {frozenset(group) for group in groups}
    found = [(maker, readers) for maker, readers in family.scaled if frozenset(readers) in read]
    return tuple(Scaling(maker, readers, head_dim(config) if maker.endswith("v_proj") else None) for maker, readers in found)


def expand(fused: tuple[tuple[str, ...], ...], linears: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """The fused sets of a layer with these linears, where * in a name stands for every expert's number."""
    sets: dict[tuple[int, str], list[str]] = {}
    for number, names in enumerate(fused):
        for name in names:
            pattern = re.escape(name).replace(r"\*", r"(\d+)")
            for linear in linears:
                if found := re.fullmatch(pattern, linear):
                    sets.setdefault((number, found[1] if "*" in name else ""), []).append(linear)
    return tuple(map(tuple, sets.values()))


def waves_of(groups: Sequence[Group]) -> tuple[tuple[Group, ...], ...]:
    """Groups whose names differ in numbers only, those of experts, are one wave; all others one each."""
    waves: dict[str, list[Group]] = {}
    for group in groups:
        waves.setdefault(re.sub(r"\d+", "*", " ".join(group)), []).append(group)
    return tuple(map(tuple, waves.values()))
