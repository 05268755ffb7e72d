"""A plain Llama as its config and the headers of its files show it, for a plan.

Importing a model's class from transformers takes longer than all else that a plan does.  Where the files hold exactly what a
Llama has, in the shapes that the config says, the class would find nothing else.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from ptq.models.configuration import read_config
from ptq.models.families import ATTENTION, FAMILIES, MLP
from ptq.models.location import fetch, locate
from ptq.models.shards import Shards, shard_paths
from ptq.runtime.adapter import Layer, LayerPlan

LINEARS = (ATTENTION, ("self_attn.o_proj",), MLP, ("mlp.down_proj",))  # in the order they run, by input
NORMS = ("input_layernorm", "post_attention_layernorm")
PLAIN = {"llama": (), "mistral": (), "qwen3": ("self_attn.q_norm", "self_attn.k_norm")}  # with norms of heads
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Headers:
    """The skeleton (ptq.runtime.adapter) of a model of which only headers were read.

    `layer`: shapes of a layer's tensors by their names inside it.  `count`: parameters of all.
    """

    names: tuple[str, ...]
    layer: Shapes
    model: Any
    count: int
    has_experts: bool = False

    def parameters(self) -> int:
        return self.count

    def skeleton(self) -> Iterator[Layer]:
        module = nn.Module()
        module.self_attn, module.mlp = nn.Module(), nn.Module()
        for name in (name for group in LINEARS for name in group):
            d_out, d_in = self.layer[f"{name}.weight"]
            part, leaf = name.split(".")
            module.get_submodule(part).add_module(leaf, nn.Linear(d_in, d_out, bias=False, device="meta"))
        for index, name in enumerate(self.names):
            yield Layer(index, name, module)

    def plan(self, layer: Layer) -> LayerPlan:
        family = FAMILIES[self.model.config.model_type]
        residual = family.residual_of(self.model.config)
        return LayerPlan(tuple((group,) for group in LINEARS), family.fused, residual, list(residual)[-1])


def from_headers(source: str) -> Headers | None:
    """None where the model has to be opened to know: it is of another kind, or something is amiss, which opening it will name.

    Raises ValueError for files that are missing, damaged or elsewhere, as `locate` and `fetch` do.
    """
    where, extra = locate(source)
    if extra:
        return None
    folder, _ = fetch(where)
    if not shard_paths(folder) or not has_tokenizer(folder):
        return None
    config, stored = read_config(folder / "config.json"), Shards(folder).tensors
    tied = bool(config.get("tie_word_embeddings"))
    own_code = config.get("quantization_config") or config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type") not in PLAIN or not config.keys() >= SIZES or own_code:
        return None
    layer, ends = layer_shapes(config), end_shapes(config, tied)
    names = tuple(f"model.layers.{index}" for index in range(config["num_hidden_layers"]))
    wanted = ends | {f"{prefix}.{name}": shape for prefix in names for name, shape in layer.items()}
    if wanted != {name: tensor.shape for name, tensor in stored.items()}:
        return None
    head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False, device="meta")
    model = SimpleNamespace(config=SimpleNamespace(**config), get_output_embeddings=lambda: head)
    return Headers(names, layer, model, sum(map(math.prod, wanted.values())))


def has_tokenizer(folder: Path) -> bool:
    """Whether there is one, as fast tokenizers are stored."""
    try:
        return "model" in json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def layer_shapes(config: Mapping[str, Any]) -> Shapes:
    d, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    width = config.get("head_dim") or d // heads
    out, kv = heads * width, config["num_key_value_heads"] * width
    sizes = zip(LINEARS, ((out, kv, kv), (d,), (inner, inner), (d,)), (d, out, d, inner), strict=True)
    linears = {name: (rows, d_in) for group, d_outs, d_in in sizes for name, rows in zip(group, d_outs, strict=True)}
    norms = dict.fromkeys(NORMS, (d,)) | dict.fromkeys(PLAIN[config["model_type"]], (width,))
    return {f"{name}.weight": shape for name, shape in (linears | norms).items()}


def end_shapes(config: Mapping[str, Any], tied: bool) -> Shapes:
    d, words = config["hidden_size"], config["vocab_size"]
    ends: Shapes = {"model.embed_tokens.weight": (words, d), "model.norm.weight": (d,)}
    return ends if tied else ends | {"lm_head.weight": (words, d)}
