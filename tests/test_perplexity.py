import math

import pytest
import torch
from torch import nn

from ptq.eval.perplexity import evaluate

from .tiny import tiny_model


def windows(count: int = 4, length: int = 32) -> torch.Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(3))


def test_a_uniform_model_has_the_vocabulary_for_perplexity():
    model = tiny_model()
    model.lm_head.weight.data.zero_()
    score = evaluate({"a": model}, windows())["a"]
    assert score.ppl == pytest.approx(64, rel=1e-6) and score.kl == 0
    assert (score.tokens, score.window) == (4 * 31, 32)


@torch.no_grad()
def test_equals_the_definition():
    models = {"original": tiny_model(), "other": tiny_model()}
    models["other"].lm_head.weight.data.mul_(1.5)
    logp = {name: model(windows()).logits[:, :-1].double().log_softmax(-1) for name, model in models.items()}
    scores = evaluate(models, windows())
    for name, score in scores.items():
        nll = -logp[name].gather(2, windows()[:, 1:, None]).mean()
        kl = (logp["original"].exp() * (logp["original"] - logp[name])).sum(-1).mean()
        # float32 log-probabilities of about 4, and their differences summed over 64 words
        assert score.ppl == pytest.approx(math.exp(nll), rel=1e-5) and score.kl == pytest.approx(float(kl), abs=1e-5)
    assert scores["original"].kl == 0 and scores["other"].kl > 0.01


def test_windows_can_be_split_over_calls():
    model = tiny_model()
    whole, parts = evaluate({"a": model}, windows(4))["a"], [evaluate({"a": model}, part)["a"] for part in windows(4).split(2)]
    assert math.log(whole.ppl) == pytest.approx(sum(math.log(part.ppl) for part in parts) / 2, rel=1e-6)


def test_non_finite_logits_and_no_windows_are_refused():
    model = tiny_model()
    model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="model 'a' gave non-finite logits in window 0"):
        evaluate({"a": model}, windows())
    with pytest.raises(ValueError, match="no windows"):
        evaluate({"a": nn.Identity()}, [])
