"""Token perplexity, and the KL divergence from an original model, over the same windows.

Protocol of the GPTQ paper: the text is tokenized as a whole and cut into non-overlapping windows; each is run by itself, with no
token put in front, and its tokens but the first are predicted.  Perplexity is exp of the mean negative log likelihood; KL is the
mean over the same positions of KL(original ‖ model), in nats.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """`tokens`: predicted tokens, so windows · (window - 1).  `kl` of the original to itself is 0."""

    ppl: float
    kl: float
    tokens: int
    window: int


@torch.no_grad()
def evaluate(models: Mapping[str, nn.Module], windows: Iterable[Tensor]) -> dict[str, Score]:
    """A Score for each model, the first being the original.

    `windows`: token ids (length,) each; the models see one at a time, so that the logits of no more than one window are alive.
    Raises ValueError for logits that are not finite, naming the model, and where there are no windows.
    """
    nll, kl = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    tokens = length = 0
    for window in windows:
        reference = None
        for name, model in models.items():
            window = window.to(next(model.parameters()).device)
            logp = model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            loss = -logp.gather(1, window[1:, None]).sum(dtype=torch.float64)
            if not loss.isfinite():
                raise ValueError(f"model {name!r} gave non-finite logits in window {tokens // (len(window) - 1)}")
            nll[name] += float(loss)
            reference = logp if reference is None else reference
            kl[name] += float((reference.exp() * (reference - logp)).sum(dtype=torch.float64))
        tokens += len(window) - 1
        length = len(window)
    if not tokens:
        raise ValueError("no windows to evaluate on")
    return {
        name: Score(
            ppl=float(torch.tensor(nll[name] / tokens, dtype=torch.float64).exp()),
            kl=kl[name] / tokens,
            tokens=tokens,
            window=length,
        )
        for name in models
    }
