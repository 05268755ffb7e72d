"""One model on one text: token perplexity, KL to the first model, top-1 agreement, bits per byte."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ptq.data.text import join_windows
from ptq.eval.checkpoint import Loaded
from ptq.eval.logits import Logits
from ptq.eval.paired import Item, ratio_stderr
from ptq.eval.perplexity import score_windows, summarize
from ptq.eval.sample import greedy_sample
from ptq.models.loading import check_fit

Progress = Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class Text:
    """Documents, cut into windows of `window` tokens, of which the first `count` are used (None: all)."""

    source: str
    documents: Sequence[str]
    window: int
    count: int | None


@dataclass(frozen=True)
class Tokens:
    """`windows` (n, window) token ids, on the model's device, of a text of `total` tokens."""

    windows: Tensor
    total: int


def tokenize(label: str, loaded: Loaded, text: Text) -> Tokens:
    """The text as the model sees it.

    Raises ValueError for a text shorter than a window, and for tokens that the model has no embedding for.
    """
    encoded = [loaded.tokenizer(document, verbose=False)["input_ids"] for document in text.documents]
    windows = join_windows(encoded, text.window, text.source)
    check_fit(int(windows.max()), loaded.model, label)
    return Tokens(windows[: text.count].to(loaded.model.device), sum(map(len, encoded)))


@dataclass(frozen=True)
class First:
    """What the first model leaves for the others: its logits, and of its result `fingerprint` and `vocabulary`."""

    logits: Logits
    fingerprint: str
    vocabulary: int


def measure_text(
    label: str, loaded: Loaded, logits: Logits, text: Text, tokens: Tokens, first: First | None, progress: Progress = iter
) -> dict[str, Any]:
    """The `text` of a result (docs/evaluation.md).

    logits: the model's.  first: None where the model is the first.  KL and agreement are None where the two see other tokens.
    Raises ValueError for logits that are not finite.
    """
    windows, vocabulary = tokens.windows, loaded.model.config.vocab_size
    fingerprint = hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest()[:16]
    comparable = first is None or (fingerprint == first.fingerprint and vocabulary == first.vocabulary)
    sources = {label: logits} if first is None or not comparable else {f"{label} (first)": first.logits, label: logits}
    scores = score_windows(sources, progress(windows))[label]
    score = summarize(scores)
    items: list[Item] = [(-one.nll, one.tokens) for one in scores]
    kl_stderr = ratio_stderr([(one.kl, one.tokens) for one in scores])
    size = sum(len(document.encode()) for document in text.documents)
    return {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "token_ppl": score.ppl,
        "kl": score.kl if comparable else None,
        "kl_stderr": None if math.isnan(kl_stderr) or not comparable else kl_stderr,
        "agreement": score.agreement if comparable else None,
        "bits_per_byte": math.log2(score.ppl) * tokens.total / size,
        "tokens": score.tokens,
        "windows": len(windows),
        "fingerprint": fingerprint,
        "vocabulary": vocabulary,
        "items": items,
        "sample": greedy_sample(loaded.model, loaded.tokenizer, windows[0]),
        "protocol": {
            "text": text.source,
            "window": text.window,
            "stride": text.window,
            "bos": bos_rule(loaded.tokenizer),
            "documents": len(text.documents),
            "tokens_in_text": tokens.total,
            "bytes_in_text": size,
        },
    }


def bos_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """In words: where BOS tokens stand.  None is ever put in front of a window."""
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return "BOS before each document, as the tokenizer puts it"
    return "no BOS"
