"""A model as its config and the headers of its files show it, for a plan.

Importing a model's class from transformers takes longer than all else that a plan does.  Where the files hold exactly what the
family's models have (ptq.models.tensors), in the shapes that the config says, the class would find nothing else.
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
from ptq.models.families import FAMILIES, HEAD, Family, head_dim, layer_plan
from ptq.models.gguf_header import as_checkpoint
from ptq.models.location import fetch, locate
from ptq.models.shards import Shards, shard_paths
from ptq.models.stacked import UnstackedShards
from ptq.models.tensors import TENSORS, Tensors
from ptq.runtime.adapter import Layer, LayerPlan

NEEDED = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"}
# What changes which tensors there are: a config that says another thing than this has to be asked itself.
USUAL: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,), "attention_bias": (None, False), "mlp_bias": (None, False), "qkv_bias": (None, True),
    "moe_layers": (None, []),
}  # fmt: skip
UNUSUAL: dict[str, dict[str, tuple[object, ...]]] = {
    "gpt_oss": {"attention_bias": (True,)}, "llama4_text": {"moe_layers": ([],)},
}  # fmt: skip
SCALED = ("gemma2", "gemma3_text")  # rows of the embeddings, by a factor that they hold
TIED = ("smollm3", "gemma2", "gemma3_text", "cohere2")  # unless their config says otherwise
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class LayerKind:
    """`sizes`: (d_out, d_in) of the linears that may be quantized, by name inside the layer; `shapes`: of all its tensors."""

    plan: LayerPlan
    sizes: Mapping[str, tuple[int, int]]
    shapes: Shapes

    def module(self) -> nn.Module:
        """Holds the linears, without memory."""
        found = nn.Module()
        for name, (d_out, d_in) in self.sizes.items():
            *path, leaf = name.split(".")
            part = found
            for step in path:
                if not hasattr(part, step):
                    part.add_module(step, nn.Module())
                part = part.get_submodule(step)
            part.add_module(leaf, nn.Linear(d_in, d_out, bias=False, device="meta"))
        return found


@dataclass(frozen=True)
class Headers:
    """The skeleton (ptq.runtime.adapter) of a model of which only headers were read.

    `kinds`: of each layer.  `count`: parameters of all.
    """

    kinds: tuple[LayerKind, ...]
    family: Family
    model: Any
    count: int

    @property
    def has_experts(self) -> bool:
        return self.family.experts is not None

    def parameters(self) -> int:
        return self.count

    def skeleton(self) -> Iterator[Layer]:
        modules = {id(kind): kind.module() for kind in self.kinds}
        for index, kind in enumerate(self.kinds):
            yield Layer(index, f"model.layers.{index}", modules[id(kind)], self.family.renamed)

    def head(self) -> Layer:
        return Layer(len(self.kinds), "lm_head", self.model.get_output_embeddings())

    def embedding(self) -> Layer:
        return Layer(-1, "model.embed_tokens", self.model.get_input_embeddings())

    def plan(self, layer: Layer) -> LayerPlan:
        return self.kinds[layer.index].plan if layer.index < len(self.kinds) else HEAD


def from_headers(source: str) -> Headers | None:
    """None where the model has to be opened to know: it is of another kind, or something is amiss, which opening it will name.

    Raises ValueError for files that are missing, damaged or elsewhere, as `locate` and `fetch` do.
    """
    where, extra = locate(source)
    if extra:
        found = as_checkpoint(Path(where) / extra["gguf_file"])
        return found and described(found[0], FAMILIES[found[0]["model_type"]], found[1])
    folder, _ = fetch(where)
    if not shard_paths(folder) or not has_tokenizer(folder):
        return None
    config = read_config(folder / "config.json")
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        return None
    shards = Shards(folder)
    stacked = family.experts is not None and family.experts.ends
    tensors = (UnstackedShards(shards, family.experts) if stacked else shards).tensors  # type: ignore[arg-type]
    return described(config, family, {name: tensor.shape for name, tensor in tensors.items()})


def described(config: Mapping[str, Any], family: Family, stored: Mapping[str, tuple[int, ...]]) -> Headers | None:
    """The model, if the tensors of its files are those, and of the shapes, that its config and its family say."""
    kind = config["model_type"]
    if not config.keys() >= NEEDED | ({"residual_multiplier"} if callable(family.residual) else set()):
        return None
    if any(config.get(key) not in usual for key, usual in (USUAL | UNUSUAL.get(kind, {})).items()):
        return None
    words = sizes_of(config)
    try:
        of_each = layer_kinds(config, family, TENSORS[kind], words)
    except KeyError:  # a size that the config does not say
        return None
    tied = bool(config.get("tie_word_embeddings", kind in TIED))
    wanted = end_shapes(words, tied=tied)
    for index, layer in enumerate(of_each):
        names = Layer(index, f"model.layers.{index}", nn.Module(), family.renamed)
        wanted |= {names.full_name(name): shape for name, shape in layer.shapes.items()}
    if wanted != stored:
        return None
    head = nn.Linear(words["d"], words["words"], bias=False, device="meta")
    embedding = nn.Embedding(words["words"], words["d"], device="meta")
    if kind in SCALED:
        embedding.register_buffer("embed_scale", embedding.weight.detach()[0, 0], persistent=False)
    model = SimpleNamespace(
        config=SimpleNamespace(**config | {"tie_word_embeddings": tied}),
        get_output_embeddings=lambda: head, get_input_embeddings=lambda: embedding,
    )  # fmt: skip
    return Headers(of_each, family, model, sum(map(math.prod, wanted.values())))


def has_tokenizer(folder: Path) -> bool:
    """Whether there is one, as fast tokenizers are stored."""
    try:
        return "model" in json.loads((folder / "tokenizer.json").read_bytes())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def sizes_of(config: Mapping[str, Any]) -> dict[str, int]:
    """What the words of ptq.models.tensors mean in this model; without those it does not say."""
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    head = head_dim(SimpleNamespace(**config))
    out, kv = heads * head, config["num_key_value_heads"] * head
    found = {"d": config["hidden_size"], "inner": inner, "heads": heads, "head": head, "out": out, "kv": kv, "one": 1}
    found |= {"qkv": out + 2 * kv, "gate_up": 2 * inner, "words": config["vocab_size"]}
    others = {"expert": "moe_intermediate_size", "shared": "shared_expert_intermediate_size", "mlp": "intermediate_size_mlp"}
    found |= {word: config[key] for word, key in others.items() if config.get(key)}
    count = config.get("num_experts") or config.get("num_local_experts")
    return found | ({"experts": count} if count else {})


def layer_kinds(config: Mapping[str, Any], family: Family, tensors: Tensors, words: Mapping[str, int]) -> tuple[LayerKind, ...]:
    """Of each layer.  Raises KeyError that names what the config does not say."""
    usual = layer_kind(config, family, tensors, words)
    dense = layer_kind(config, family, tensors.dense, words) if tensors.dense else usual
    every, but = config.get("decoder_sparse_step") or 1, config.get("mlp_only_layers") or ()
    sparse = [index not in but and (index + 1) % every == 0 for index in range(config["num_hidden_layers"])]
    return tuple(usual if one else dense for one in sparse)


def layer_kind(config: Mapping[str, Any], family: Family, tensors: Tensors, words: Mapping[str, int]) -> LayerKind:
    groups, sizes, biases = [], {}, {}
    for columns, rows in tensors.groups:
        for number in range(words["experts"]) if "*" in "".join(rows) else ("",):
            groups.append(tuple(name.replace("*", str(number)) for name in rows))
            for name, row in zip(groups[-1], rows, strict=True):
                sizes[name] = words[rows[row]], words[columns]
                if row in tensors.biased:
                    biases[f"{name}.bias"] = (words[rows[row]],)
    others = {name: tuple(words[word] for word in size.split()) for name, size in tensors.others.items()}
    keep = tuple(name for name in family.keep if f"{name}.weight" in others)
    experts = tuple(name.split("*")[0] for _, rows in tensors.groups for name in rows if "*" in name)
    share = config["num_experts_per_tok"] / words["experts"] if experts else 1.0
    plan = layer_plan(family, SimpleNamespace(**config), groups, keep, experts, share)
    return LayerKind(plan, sizes, {f"{name}.weight": size for name, size in sizes.items()} | biases | others)


def end_shapes(words: Mapping[str, int], *, tied: bool) -> Shapes:
    ends: Shapes = {"model.embed_tokens.weight": (words["words"], words["d"]), "model.norm.weight": (words["d"],)}
    return ends if tied else ends | {"lm_head.weight": (words["words"], words["d"])}
