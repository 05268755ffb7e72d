import math

import pytest
import torch
from torch import nn

from ptq.eval.logits import KeptLogits, run
from ptq.eval.perplexity import evaluate, score_windows

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


def test_kept_logits_are_the_computed_ones_and_computed_once(tmp_path):
    """Scores from the file equal scores from the model to the last bit, in both dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        first, other = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
        other.lm_head.weight.data.mul_(1.5)
        calls = []

        def compute(index, window, first=first, calls=calls):
            calls.append(index)
            return run(first, "first")(index, window)

        kept = KeptLogits(compute, tmp_path, len(windows()))
        direct = score_windows({"first": run(first, "first"), "other": run(other, "other")}, windows())
        alone = score_windows({"first": kept}, windows())
        assert kept.complete and alone["first"] == direct["first"]
        for _ in range(2):
            assert score_windows({"first": kept, "other": run(other, "other")}, windows()) == direct
        assert calls == list(range(4)) and list(tmp_path.iterdir()) == []


def test_logits_that_do_not_fit_on_the_disk_are_refused_before_they_are_written(tmp_path):
    kept = KeptLogits(run(tiny_model(), "a"), tmp_path, 10**12)
    with pytest.raises(ValueError, match=r"logits take 7936000.0 GB and .* free; give --logits"):
        kept(0, windows()[0])


@pytest.mark.parametrize(
    "place, message",
    [
        ("model.layers.1.mlp.down_proj", "come out of model.layers.1.mlp.down_proj, whose parameters hold 1 such values"),
        ("model.layers.0.input_layernorm", "come out of model.layers.0.input_layernorm, whose parameters hold 1 such values"),
        ("lm_head", "come out of lm_head, whose parameters hold 1 such values"),
    ],
)
def test_non_finite_logits_name_the_layer_that_made_them(place, message):
    model = tiny_model()
    model.get_submodule(place).weight.data.flatten()[0] = float("nan")
    with pytest.raises(
        ValueError, match=f"model 'a' gave non-finite logits in window 0; the first non-finite values {message}"
    ):
        evaluate({"a": model}, windows())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_overflow_is_found_where_it_happens():
    """silu(gate) · up exceeds float16 between two linears, whose own outputs are finite: 6·10⁴ is the largest."""
    model = tiny_model(dtype=torch.float16)
    for name in ("gate_proj", "up_proj"):
        model.model.layers[1].mlp.get_submodule(name).weight.data.mul_(500)
    with pytest.raises(ValueError, match=r"the first non-finite values go into model.layers.1.mlp.down_proj"):
        evaluate({"a": model}, windows())


def test_no_windows_are_refused():
    with pytest.raises(ValueError, match="no windows"):
        evaluate({"a": nn.Identity()}, [])
