"""Tiny random models of every supported family, with a word-level tokenizer, saved as real checkpoints."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

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
TEXT = " ".join(WORDS[(i * i + 3 * i) % len(WORDS)] for i in range(3000))


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    torch.manual_seed(1)
    attention = changes.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family, **(SIZES | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
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
