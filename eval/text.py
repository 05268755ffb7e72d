"""One model on one text: token perplexity, KL to the first model, top-1 agreement, bits per byte."""

import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq.calibration import all_windows
from ptq.eval.checkpoint import Loaded
from ptq.eval.paired import Item, ratio_stderr
from ptq.eval.perplexity import score_windows, summarize
from ptq.models.loading import check_fit

Progress = Callable[[Tensor], Iterable[Tensor]]


@dataclass(frozen=True)
class Text:
    """Documents, cut into windows of `window` tokens, of which the first `count` are used (None: all)."""

    source: str
    documents: Sequence[str]
    window: int
    count: int | None


def measure_text(
    label: str, loaded: Loaded, text: Text, first: tuple[PreTrainedModel, str] | None, progress: Progress = iter
) -> dict[str, Any]:
    """The `text` of a result (docs/evaluation.md).

    first: the first model, and the `fingerprint` of its windows; None where `loaded` is the first.  KL and agreement are None
    where the two see other tokens.  Raises ValueError for a text shorter than a window, for tokens that the model has no
    embedding for, and for logits that are not finite.
    """
    tokenizer, model = loaded.tokenizer, loaded.model
    encode = functools.cache(lambda document: tokenizer(document, verbose=False)["input_ids"])
    windows = all_windows(encode, list(text.documents), text.window, text.source)[: text.count]
    check_fit(int(windows.max()), model, label)
    fingerprint = hashlib.sha256(windows.numpy().tobytes()).hexdigest()[:16]
    comparable = first is None or (fingerprint == first[1] and model.config.vocab_size == first[0].config.vocab_size)
    models = {label: model} if first is None or not comparable else {f"{label} (first)": first[0], label: model}
    scores = score_windows(models, progress(windows))[label]
    score = summarize(scores)
    items: list[Item] = [(-one.nll, one.tokens) for one in scores]
    kl_stderr = ratio_stderr([(one.kl, one.tokens) for one in scores])
    tokens = sum(len(encode(document)) for document in text.documents)
    size = sum(len(document.encode()) for document in text.documents)
    return {
        "token_ppl": score.ppl,
        "kl": score.kl if comparable else None,
        "kl_stderr": None if math.isnan(kl_stderr) or not comparable else kl_stderr,
        "agreement": score.agreement if comparable else None,
        "bits_per_byte": math.log2(score.ppl) * tokens / size,
        "tokens": score.tokens,
        "windows": len(windows),
        "fingerprint": fingerprint,
        "items": items,
        "protocol": {
            "text": text.source,
            "window": text.window,
            "stride": text.window,
            "bos": bos_rule(tokenizer),
            "documents": len(text.documents),
            "tokens_in_text": tokens,
            "bytes_in_text": size,
        },
    }


def bos_rule(tokenizer: PreTrainedTokenizerBase) -> str:
    """In words: where BOS tokens stand.  None is ever put in front of a window."""
    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return "BOS before each document, as the tokenizer puts it"
    return "no BOS"
