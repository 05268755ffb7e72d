import pytest
import torch
from torch import nn

from ptq.calibrate.hessian import Hessian
from ptq.calibrate.importance import keep_in, token_importance
from ptq.core.linalg import packed_size, unpack_symmetric
from ptq.models.adapter import ModelAdapter
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.runtime.hooks import observe_outputs

from .tiny import tiny_model

TOKENS = torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(5))


def test_equal_one_backward_pass_through_the_whole_model():
    model = tiny_model("qwen2")
    weights = token_importance(ModelAdapter(model), TOKENS.split(3))
    outputs = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda _m, _x, y, name=name: outputs.update({name: y}))
    logits = model(TOKENS).logits
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    gradients = dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True))
    adapter = ModelAdapter(model)
    for layer in adapter.layers([0, 1, 2]):
        for stage in adapter.plan(layer).groups:
            expected = sum(gradients[layer.full_name(name)].square().sum(-1) for name in stage)
            ours = torch.cat(weights[layer.full_name(stage[0])])
            # two orders of float32 sums through two layers
            assert torch.allclose(ours, torch.as_tensor(expected), rtol=1e-4, atol=1e-6 * float(ours.max()))


@pytest.mark.parametrize("curvature", [None, lambda name, G: None], ids=["weights", "row feedback"])
def test_a_gradient_that_is_not_finite_is_named(curvature):
    """A head of 1e30 has a finite loss and gradient, the gradient's square in no float32; NaN in a bias gives NaN everywhere."""
    model = tiny_model()
    model.lm_head.weight.data *= 1e30
    with pytest.raises(
        ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: the gradient .* is not finite.*--token-importance none"
    ):
        token_importance(ModelAdapter(model), TOKENS.split(2), curvature=curvature)


def test_sampled_labels_follow_their_seed():
    adapter = ModelAdapter(tiny_model())
    first, again, other = (token_importance(adapter, TOKENS.split(2), seed=seed) for seed in (0, 0, 1))
    for name, batches in first.items():
        assert all(torch.equal(a, b) for a, b in zip(batches, again[name], strict=True))
        assert not torch.equal(batches[0], other[name][0])


def test_no_gradient_and_no_hook_stays_behind():
    model = tiny_model()
    token_importance(ModelAdapter(model), TOKENS.split(2))
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_hooks for m in model.modules())


def test_weighted_hessian_is_the_weighted_mean():
    X, w = torch.randn(50, 16), torch.rand(50)
    hessian = Hessian(16)
    for x, part in zip(X.split(20), w.split(20), strict=True):
        hessian.add(x, 1e9 * part)
    expected = (X.T * w) @ X / w.sum()
    assert hessian.tokens == 50 and torch.allclose(hessian.mean(), expected, atol=1e-5)
    with pytest.raises(ValueError, match="weights of 50 calibration tokens add up to 0"):
        nothing = Hessian(16)
        nothing.add(X, 0 * w)
        nothing.mean()


def test_weights_reach_the_solve():
    """Tokens of weight zero might as well not be there."""
    config = Recipe(rule="local")
    parts = TOKENS.split(2)
    ones = token_importance(ModelAdapter(tiny_model()), parts)
    first_only = {name: [torch.ones(2, 24), torch.zeros(2, 24)] for name in ones}
    weighted = [q.codes for _, q in quantize_model(ModelAdapter(tiny_model()), config, Calibration(parts, first_only))]
    alone = [q.codes for _, q in quantize_model(ModelAdapter(tiny_model()), config, Calibration(parts[:1]))]
    assert all(torch.equal(a, b) for a, b in zip(weighted, alone, strict=True))


def test_curvature_is_the_sum_of_outer_products_of_the_gradients():
    model = tiny_model()
    batches = TOKENS.split(2)
    curvature: dict[str, torch.Tensor] = {}
    token_importance(ModelAdapter(model), batches, segment=1, curvature=keep_in(curvature))
    name = "model.layers.0.self_attn.k_proj"
    expected = torch.zeros(32, 32)
    for batch in batches:
        kept: list[torch.Tensor] = []
        with observe_outputs([model.get_submodule(name)], lambda _, x, y, kept=kept: kept.append(y)):
            logits = model(batch).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
        g = torch.autograd.grad(loss, kept[0])[0].flatten(0, 1)
        expected += g.T @ g
    assert len(curvature) == 14 and curvature["model.layers.1.mlp.up_proj"].shape == (packed_size(128),)
    # The same products in another order: float32 rounding of sums over 128 tokens.
    found = unpack_symmetric(curvature[name], 32)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.diagonal().max()))
