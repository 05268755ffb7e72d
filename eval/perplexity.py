"""Token perplexity, and the KL divergence from an original model, over the same windows.

Protocol of the GPTQ paper: the text is tokenized as a whole and cut into non-overlapping windows; each is run by itself, with no
token put in front, and its tokens but the first are predicted.  Perplexity is exp of the mean negative log likelihood; KL is the
mean over the same positions of KL(original ‖ model), in nats.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Score:
    """`tokens`: predicted tokens, so windows · (window - 1).  `kl` of the original to itself is 0.

    `agreement`: share of the predicted tokens for which the model's most likely token is the original's.
    """

    ppl: float
    kl: float
    tokens: int
    window: int
    agreement: float = 1.0


@dataclass(frozen=True)
class WindowScore:
    """Sums over the `tokens` predicted tokens of one window: `nll` and `kl` in nats, `agreeing` tokens."""

    nll: float
    kl: float
    agreeing: int
    tokens: int


def evaluate(models: Mapping[str, nn.Module], windows: Iterable[Tensor]) -> dict[str, Score]:
    """A Score for each model, the first being the original.

    `windows`: token ids (length,) each; the models see one at a time, so that the logits of no more than one window are alive.
    Raises ValueError for logits that are not finite, naming the model, and where there are no windows.
    """
    return {name: summarize(scores) for name, scores in score_windows(models, windows).items()}


@torch.no_grad()
def score_windows(models: Mapping[str, nn.Module], windows: Iterable[Tensor]) -> dict[str, list[WindowScore]]:
    """For each model one WindowScore a window; otherwise as `evaluate`."""
    scores: dict[str, list[WindowScore]] = {name: [] for name in models}
    for index, window in enumerate(windows):
        reference = None
        for name, model in models.items():
            window = window.to(next(model.parameters()).device)
            logp = model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
            loss = -logp.gather(1, window[1:, None]).sum(dtype=torch.float64)
            if not loss.isfinite():
                raise ValueError(f"model {name!r} gave non-finite logits in window {index}")
            reference = logp if reference is None else reference.to(logp.device)
            kl = (reference.exp() * (reference - logp)).sum(dtype=torch.float64)
            agreeing = (reference.argmax(-1) == logp.argmax(-1)).sum()
            scores[name].append(WindowScore(float(loss), float(kl), int(agreeing), len(window) - 1))
    return scores


def summarize(scores: Sequence[WindowScore]) -> Score:
    """The Score of windows of one length.  Raises ValueError where there are none."""
    tokens = sum(score.tokens for score in scores)
    if not tokens:
        raise ValueError("no windows to evaluate on")
    return Score(
        ppl=math.exp(sum(score.nll for score in scores) / tokens),
        kl=sum(score.kl for score in scores) / tokens,
        tokens=tokens,
        window=scores[-1].tokens + 1,
        agreement=sum(score.agreeing for score in scores) / tokens,
    )
