"""Tiny random models of every supported family, with a word-level tokenizer, saved as real checkpoints."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from ptq.models.families import FAMILIES

random_model = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "random_model.py")))

WORDS = tuple("abcdefghijklmnopqrstuvwxyz")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}
WINDOW = {"sliding_window": 16}
ALTERNATING = WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# What makes a family's tiny model have what sets the family apart: windows shorter than the sequences, factors, experts.
OF_FAMILY: dict[str, dict] = {
    "mistral": WINDOW,
    "ministral": ALTERNATING,
    "smollm3": {"pad_token_id": 0, "no_rope_layers": [1, 0]},
    "phi3": {"pad_token_id": 0},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 3.0, "logits_scaling": 4.0, "attention_multiplier": 0.1},
    "gemma2": ALTERNATING | {"query_pre_attn_scalar": 16},
    "gemma3_text": ALTERNATING | {"query_pre_attn_scalar": 16},
    "olmo3": ALTERNATING,
    "cohere2": ALTERNATING,
    "mixtral": EXPERTS | {"intermediate_size": 32},
    "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": True},
    "olmoe": EXPERTS | {"intermediate_size": 32},
    "llama4_text": {
        "moe_layers": [],
        "intermediate_size_mlp": 128,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 16,
        "pad_token_id": 0,
    },
    "granitemoe": EXPERTS | {"intermediate_size": 32, "residual_multiplier": 0.22, "logits_scaling": 4.0},
    "gpt_oss": ALTERNATING
    | EXPERTS
    | {"intermediate_size": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}
TEXT = " ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(3000))


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    attention = changes.pop("attn_implementation", FAMILIES[family].attention if family in FAMILIES else "sdpa")
    settings = SIZES | OF_FAMILY.get(family, {}) | changes
    if "layer_types" in settings:
        settings["layer_types"] = settings["layer_types"][: settings["num_hidden_layers"]]
    config = AutoConfig.for_model(family, **settings)
    if family in FAMILIES and FAMILIES[family].experts:
        config._experts_implementation = "eager"  # the loop; other implementations differ from it by rounding
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which transformers makes zero
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return fast


def save_tiny(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    """Writes model, tokenizer and a generation config into `folder`; returns the model."""
    model = tiny_model(family, dtype, **changes)
    model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model
