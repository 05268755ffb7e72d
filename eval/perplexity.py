"""Token perplexity, and the KL divergence from an original model, over the same windows.

Protocol of the GPTQ paper: the text is tokenized as a whole and cut into non-overlapping windows; each is run by itself, with no
token put in front, and its tokens but the first are predicted.  Perplexity is exp of the mean negative log likelihood; KL is the
mean over the same positions of KL(original ‖ model), in nats.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ptq.calibrate.norms import fused_norms
from ptq.eval.logits import Logits, run
from ptq.eval.paired import ratio_stderr


@dataclass(frozen=True)
class Score:
    """`tokens`: predicted tokens, so windows · (window - 1).  `kl` of the original to itself is 0.

    `agreement`: share of the predicted tokens for which the model's most likely token is the original's.  `dtype` the
    model ran in, where that is known: the same checkpoint has another perplexity in another.  `kl_stderr`: over windows;
    None of one window.
    """

    ppl: float
    kl: float
    tokens: int
    window: int
    agreement: float = 1.0
    dtype: str | None = None
    kl_stderr: float | None = None


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
    Raises ValueError for logits that are not finite, naming model and layer, and where there are no windows.
    """
    scores = score_models(models, windows)
    return {name: replace(summarize(found), dtype=dtype_of(models[name])) for name, found in scores.items()}


def score_models(models: Mapping[str, nn.Module], windows: Iterable[Tensor]) -> dict[str, list[WindowScore]]:
    """What `evaluate` sums up, window by window."""
    original = next(iter(models.values()))
    there = (window.to(next(original.parameters()).device) for window in windows)
    with ExitStack() as fused:
        for model in models.values():
            fused.enter_context(fused_norms(model))
        return score_windows({name: run(model, name) for name, model in models.items()}, there)


def dtype_of(model: nn.Module) -> str:
    """Of its first parameter, by torch's name for it."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


@torch.no_grad()
def score_windows(models: Mapping[str, Logits], windows: Iterable[Tensor]) -> dict[str, list[WindowScore]]:
    """For each source of logits one WindowScore a window, worked out where the window is; the first source is the original's."""
    scores: dict[str, list[WindowScore]] = {name: [] for name in models}
    for index, window in enumerate(windows):
        of_original: tuple[Tensor, Tensor, Tensor] | None = None
        for name, logits in models.items():
            logp = logits(index, window).to(window.device).float().log_softmax(-1)
            loss = -logp.gather(1, window[1:, None]).sum(dtype=torch.float64)
            kl, agreeing = 0.0, len(logp)  # of the original to itself, for which nothing need be computed
            if of_original:
                reference, probability, likeliest = of_original
                kl = float((reference - logp).mul_(probability).sum(dtype=torch.float64))
                agreeing = int((likeliest == logp.argmax(-1)).sum())
            elif len(models) > 1:
                of_original = logp, logp.exp(), logp.argmax(-1)
            scores[name].append(WindowScore(float(loss), kl, agreeing, len(window) - 1))
    return scores


def summarize(scores: Sequence[WindowScore]) -> Score:
    """The Score of windows of one length.  Raises ValueError where there are none."""
    tokens = sum(score.tokens for score in scores)
    if not tokens:
        raise ValueError("no windows to evaluate on")
    stderr = ratio_stderr([(score.kl, score.tokens) for score in scores])
    return Score(
        ppl=math.exp(sum(score.nll for score in scores) / tokens),
        kl=sum(score.kl for score in scores) / tokens,
        tokens=tokens,
        window=scores[-1].tokens + 1,
        agreement=sum(score.agreeing for score in scores) / tokens,
        kl_stderr=None if math.isnan(stderr) else stderr,
    )
