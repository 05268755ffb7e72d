"""How a model goes on after the first words of a text: what numbers do not show."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPT_TOKENS, SAMPLE_TOKENS = 32, 32


def greedy_sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, window: Tensor) -> dict[str, str]:
    """`prompt`, the window's first half or PROMPT_TOKENS tokens, and what is said after it, `greedy`; as text."""
    prompt = window[: min(PROMPT_TOKENS, len(window) // 2)]
    return {"prompt": str(tokenizer.decode(prompt)), "greedy": str(tokenizer.decode(continuation(model, prompt)))}


@torch.no_grad()
def continuation(model: PreTrainedModel, prompt: Tensor) -> Tensor:
    """The likeliest next token, again and again: SAMPLE_TOKENS ids, none of which ends it."""
    tokens, past = prompt[None].to(model.device), None
    found: list[Tensor] = []
    for _ in range(SAMPLE_TOKENS):
        output = model(tokens, past_key_values=past, use_cache=True)
        past, tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)
        found.append(tokens[0])
    return torch.cat(found)
