"""Calibration and evaluation windows, from whatever the caller has: a source of text, texts, or tokens."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq.data.chat import Document, as_conversation, encoder, how_encoded
from ptq.data.text import all_windows, read_documents, read_texts, sample_windows
from ptq.models.loading import check_fit
from ptq.pipeline.source import Source
from ptq.settings import Settings

Given = str | Path | Sequence[str] | Sequence[list[dict[str, str]]] | Tensor
"""A source (ptq.data.text), texts, conversations (lists of messages), or token ids (sequences, length) int64."""

GIVEN = "that were given"


@dataclass(frozen=True)
class Texts:
    """What is read before any model is: documents or tokens to calibrate on, and texts to evaluate on."""

    calibration: Sequence[Document] | Tensor
    evaluation: Sequence[str] = ()


@dataclass(frozen=True)
class Windows:
    """Token ids (n, length) each.  `how`: in words, what became of the calibration's documents."""

    calibration: Tensor
    validation: Tensor | None
    evaluation: Tensor | None
    how: str


def read_calibration(given: Given, settings: Settings) -> tuple[Settings, Texts]:
    """(settings that name what is calibrated on and its size, complete; what there is to read).

    Raises ValueError for a source that cannot be read, texts that are none, and tokens of another dtype or shape.
    """
    calibration: Sequence[Document] | Tensor
    if isinstance(given, Tensor):
        check_tokens(given)
        rows, length = given.shape
        count = settings.sequences or rows - settings.validation
        settings = replace(settings, calibration=f"{rows} × {length} tokens {GIVEN}", length=length, sequences=max(1, count))
        calibration = given.cpu()
    elif isinstance(given, str | Path):
        settings = replace(settings, calibration=str(given))
        calibration = read_documents(str(given))
    else:
        calibration = check_documents(given)
        settings = replace(settings, calibration=f"{len(calibration)} documents {GIVEN}")
    return settings.complete(), Texts(calibration, read_texts(settings.evaluate) if settings.evaluate else ())


def check_tokens(tokens: Tensor) -> None:
    shape = tuple(tokens.shape)
    if tokens.dtype != torch.int64:
        raise ValueError(
            f"calibration tokens are {tokens.dtype} {shape}; give token ids of dtype torch.int64, (sequences, length)"
        )
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(f"calibration tokens have the shape {shape}; give (sequences, length), of 2 tokens or more each")
    if int(tokens.min()) < 0:
        raise ValueError(
            f"calibration tokens hold {int(tokens.min())}; token ids are 0 or more, without padding or label masks"
        )


def check_documents(given: Sequence) -> list[Document]:
    """Raises ValueError that names the first document that is neither text nor a conversation."""
    documents: list[Document] = []
    for number, value in enumerate(given):
        document = value if isinstance(value, str) else as_conversation(value)
        if document is None:
            raise ValueError(
                f"calibration[{number}] is a {type(value).__name__}; give texts, lists of messages with role and content, "
                "one int64 tensor of token ids (sequences, length), or the name of a source"
            )
        documents.append(document)
    if not any(str(document).strip() for document in documents):
        raise ValueError("calibration is empty; give texts, or 'builtin'")
    return documents


def make_windows(texts: Texts, source: Source, settings: Settings) -> Windows:
    """Raises ValueError for too little text, and for tokens that the model has no embedding for."""
    tokenizer, name = source.tokenizer, settings.calibration
    if isinstance(texts.calibration, Tensor):
        drawn_from, how = texts.calibration, "tokens as given"
        check_vocabulary(drawn_from, source)
    else:
        drawn_from = all_windows(encoder(tokenizer), texts.calibration, settings.length, name)
        how = how_encoded(texts.calibration, tokenizer)
        check_fit(int(drawn_from.max()), source.adapter.model, source.name)
    assert settings.sequences is not None
    drawn = sample_windows(drawn_from, settings.sequences, settings.seed, name, validation=settings.validation)
    validation = drawn[settings.sequences :] if settings.validation else None
    return Windows(drawn[: settings.sequences], validation, evaluation_windows(texts, tokenizer, source, settings), how)


def evaluation_windows(texts: Texts, tokenizer: PreTrainedTokenizerBase, source: Source, settings: Settings) -> Tensor | None:
    if not settings.evaluate:
        return None
    windows = all_windows(encoder(tokenizer), texts.evaluation, settings.length, settings.evaluate)
    check_fit(int(windows.max()), source.adapter.model, source.name)
    return windows[: settings.windows]


def check_vocabulary(tokens: Tensor, source: Source) -> None:
    largest: int = source.adapter.model.get_input_embeddings().num_embeddings  # type: ignore[assignment,union-attr]
    if int(tokens.max()) >= largest:
        raise ValueError(f"calibration tokens hold {int(tokens.max())}, and {source.name} has {largest} embeddings")
