"""lm-eval's class for models in memory, with our way of running them.  Imported where it is used: lm-eval takes seconds."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm

from ptq.eval.logits import check_finite
from ptq.eval.scoring import Request, can_share, log_likelihoods


class Checked(HFLM):
    """Stops, where lm-eval would count an answer, at logits that are not finite; Llama-family models run each token once."""

    _encoded: Mapping[str, list[int]] = MappingProxyType({})

    def loglikelihood(self, requests: list, *args: Any, **options: Any) -> list:
        """What will be tokenized is tokenized in one call first, a context once for all its answers."""
        pairs = [request.args for request in requests]
        texts = sorted({text for context, answer in pairs if context for text in (context.rstrip(), context + answer)})
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain = [text for text in texts if self.add_bos_token is None and not text.startswith(bos)]
        self._encoded = dict(zip(plain, self.tokenizer(plain, verbose=False)["input_ids"], strict=True)) if plain else {}
        return super().loglikelihood(requests, *args, **options)

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        found = None if args or options else self._encoded.get(string)
        return super().tok_encode(string, *args, **options) if found is None else found

    def loglikelihood_rolling(self, requests: list, *args: Any, **options: Any) -> list[float]:
        """All windows of all pages at once: those of like length run together, where lm-eval pads those that follow each other."""
        pages = [
            list(map(make_disjoint_window, get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)))
            for tokens in (self.tok_encode(request.args[0]) for request in requests)
        ]
        found = iter(self._loglikelihood_tokens([(None, *window) for windows in pages for window in windows]))
        return [sum(next(found)[0] for _ in windows) for windows in pages]

    def _loglikelihood_tokens(self, requests: list, *args: Any, **options: Any) -> list:
        for strings, _, answer in requests:  # no strings for rolling windows, which fit
            if strings and len(answer) > self.max_length:
                raise ValueError(
                    f"an lm-eval task has an answer of {len(answer)} tokens, more than the {self.max_length} that the model "
                    f"sees at once: {strings[1][:40]!r}…; leave the task out, or give a larger --max-length"
                )
        most = self.max_length + 1
        asked = [Request(tuple((context + answer)[-most:-1]), tuple(answer)) for _, context, answer in requests]
        longest = max(len(request.tokens) for request in asked)
        if not can_share(self.model, longest):
            # The cache makes one run of requests that differ in their last token only.  Windows of a page that hold the same
            # tokens but predict other numbers of them look like that to it, and then results depend on the batch size.
            with patch.object(self, "logits_cache", self.logits_cache and requests[0][0] is not None):
                return super()._loglikelihood_tokens(requests, *args, **options)
        size = self.batch_size
        if size == "auto":
            size = self._detect_batch_size([max(requests, key=lambda request: len(request[1]) + len(request[2]))])
        bar = lambda batches: tqdm(batches, "lm-eval", unit="batch", disable=None)  # noqa: E731
        return log_likelihoods(self.model, asked, size * longest, dtype=self.softmax_dtype, progress=bar)

    def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        logits = super()._model_call(inps, *args, **options)
        check_finite(logits, self.model, inps, "the model gave non-finite logits in an lm-eval task")
        return logits
