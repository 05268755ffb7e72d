"""Conversations as calibration text: through the tokenizer's chat template, which is what a chat model reads when it is used."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Conversation:
    """Chat messages with a role and a content each.  As plain text: their contents, joined by blank lines."""

    messages: tuple[Mapping[str, str], ...]

    def __str__(self) -> str:
        return "\n\n".join(message["content"] for message in self.messages)


Document = str | Conversation


def as_conversation(value: Any) -> Conversation | None:
    """Of a list of {"role": str, "content": str}; None for anything else."""
    if not isinstance(value, list) or not value:
        return None
    fits = (
        isinstance(one, Mapping) and isinstance(one.get("role"), str) and isinstance(one.get("content"), str) for one in value
    )
    return Conversation(tuple(value)) if all(fits) else None


def document_of(row: Mapping[str, Any]) -> Document | None:
    """What a row has in "text", else in "messages"; None where it has neither."""
    text = row.get("text")
    return text if isinstance(text, str) else as_conversation(row.get("messages"))


def encoder(tokenizer: Any) -> Callable[[Document], list[int]]:
    """Documents to token ids, by a tokenizer of transformers; a conversation through its chat template if it has one.

    The template writes the special tokens itself, so none are added.  What is returned raises ValueError where the template
    refuses a conversation.
    """
    from jinja2 import TemplateError

    def encode(document: Document) -> list[int]:
        if not isinstance(document, Conversation) or not tokenizer.chat_template:
            return tokenizer(str(document), verbose=False)["input_ids"]
        try:
            text = tokenizer.apply_chat_template([dict(message) for message in document.messages], tokenize=False)
        except TemplateError as error:
            start = document.messages[0]["content"][:40]
            raise ValueError(f"the tokenizer's chat template refuses the conversation that begins {start!r}: {error}") from None
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    return encode


def how_encoded(documents: Iterable[Document], tokenizer: Any) -> str:
    """In words, what `encoder` makes of these documents."""
    if not any(isinstance(document, Conversation) for document in documents):
        return "plain text"
    if tokenizer.chat_template:
        return "conversations through the tokenizer's chat template"
    return "conversations as plain text, for the tokenizer has no chat template"
