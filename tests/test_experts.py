"""Mixtures of experts: the tokens that each expert's linears are calibrated on, and what happens with too few."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from ptq.calibrate.collect import collect
from ptq.calibrate.importance import token_importance
from ptq.calibrate.passes import Original, Passes, Stream
from ptq.core.formats import MXFP4, NVFP4
from ptq.eval.checkpoint import load_any
from ptq.export.read_back import load_checkpoint
from ptq.models.adapter import ModelAdapter
from ptq.models.experts import LinearExperts, experts_of
from ptq.models.families import FAMILIES
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.run.settings import DRIFTS
from ptq.runtime.distributed import Ranks
from ptq.runtime.hooks import observe_inputs

from .test_export import TOKENS, export
from .test_runner import tokens
from .test_script import main  # noqa: F401  # a fixture
from .tiny import tiny_model

MIXTURES = [name for name, family in FAMILIES.items() if family.experts]


def first_mixture(adapter: ModelAdapter):
    return next(layer for layer in adapter.layers() if experts_of(layer.module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_linear_experts_are_the_fused_ones_to_the_bit(family, dtype):
    model = tiny_model(family, dtype)
    fused = next(module for module in model.modules() if hasattr(module, "gate_up_proj") and module.gate_up_proj.dim() == 3)
    x, index, weights = torch.randn(30, 64, dtype=dtype), torch.randint(0, 3, (30, 2)), torch.rand(30, 2)  # nobody to expert 3
    index[:, 1] = (index[:, 0] + 1) % 3
    experts = FAMILIES[family].experts
    assert experts
    linear = LinearExperts(fused, replace(experts, names=("a", "b", "c")))
    assert torch.equal(linear(x, index, weights), fused(x, index, weights))
    assert set(linear.routing) == {0, 1, 2} and sum(map(len, linear.routing.values())) == 60


@torch.no_grad()
def test_observers_see_an_experts_own_tokens_or_those_it_is_asked_for_and_the_output_stays():
    adapter = ModelAdapter(tiny_model("qwen3_moe"))
    layer, hidden = first_mixture(adapter), adapter.embed(tokens(2))
    names = {layer.linear(f"mlp.experts.{e}.up_proj"): e for e in range(4)}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def run():
        seen.clear()
        see = lambda linear, x, which: seen.update({names[linear]: (x, which)})  # noqa: E731
        return observe_inputs(names, see, None, lambda: adapter.forward(layer, hidden))

    plain = run()
    assert {e: len(x) for e, (x, _) in seen.items()} == {e: len(t) for e, t in adapter.routing(layer).items()}
    routed = dict(seen)
    adapter.watch(layer, {2: torch.arange(128), 0: torch.tensor([5, 7])})
    assert torch.equal(run(), plain) and set(seen) == {0, 2}
    x, which = seen[2]
    assert torch.equal(which, torch.arange(128)) and torch.equal(x[routed[2][1]], routed[2][0])
    adapter.watch(layer, None)
    assert torch.equal(run(), plain) and set(seen) == set(routed)


def sums_of(adapter, layer, group, stream):
    return collect(Passes(adapter, layer, adapter.plan(layer), stream), [group], [[0]])[0]


@torch.no_grad()
def test_drift_pairs_what_both_models_have_of_the_quantized_models_tokens():
    adapter = ModelAdapter(tiny_model("qwen3_moe"))
    layer = first_mixture(adapter)
    from ptq.calibrate.activations import embed_all

    hidden = embed_all(adapter, tokens(4).split(2))
    moved, other = hidden.copy(), copy.deepcopy(layer.module)
    moved.data += 0.3 * torch.randn(moved.data.shape, generator=torch.Generator().manual_seed(1))
    original = Original(replace(layer, module=other), hidden)
    stream = Stream(moved, Ranks(), 4, original=original)
    group = ("mlp.experts.1.gate_proj", "mlp.experts.1.up_proj")
    found = sums_of(adapter, layer, group, stream)
    inputs: list[torch.Tensor] = []
    for states in (moved.data, hidden.data):
        block = []
        handle = layer.module.mlp.register_forward_pre_hook(lambda _, args, block=block: block.append(args[0].flatten(0, 1)))
        adapter.forward(layer, states)
        handle.remove()
        inputs.append(block[0])
        if states is moved.data:
            which = adapter.routing(layer)[1]
    ours, theirs = (x[which].double() for x in inputs)
    assert found.routed == found.hessian.tokens == len(which)
    # Float32 sums over 2 · 64 · 4 / 4 tokens.
    assert torch.allclose(found.hessian.mean().double() * len(which), ours.T @ ours, rtol=1e-4, atol=1e-3)
    assert found.drift and torch.allclose(found.drift.sum.double(), (theirs - ours).T @ ours, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("drift", ["none", "full"])
def test_an_expert_with_too_few_tokens_is_calibrated_on_all_and_the_record_says_so(drift):
    """The router never chooses expert 3."""
    model = tiny_model("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.weight.data[3] = 0
        layer.mlp.gate.weight.data[3, 0] = -1e3
        layer.post_attention_layernorm.register_forward_hook(one_in_front)
    batches = tokens(4).split(2)
    recipe = Recipe(rule="joint", **DRIFTS[drift])
    records = {r.name: r for r, _ in quantize_model(ModelAdapter(model), recipe, Calibration(batches))}
    starved = {name: record for name, record in records.items() if ".experts.3." in name}
    assert len(starved) == 6 and all(r.routed_tokens == 0 and r.tokens == 4 * 64 for r in starved.values())
    rest = [r for name, r in records.items() if ".experts." in name and name not in starved]
    assert rest and all(r.routed_tokens == r.tokens and r.tokens > 0 for r in rest)
    assert all(r.routed_tokens is None and r.tokens == 256 for name, r in records.items() if "self_attn" in name)
    assert all(r.error is not None and r.certificate is not None and r.certificate < 1e-4 for r in records.values())


def one_in_front(_module, _inputs, y):
    """The first channel that the router sees is 1."""
    return torch.cat([torch.ones_like(y[..., :1]), y[..., 1:]], -1)


def test_all_tokens_can_be_asked_for():
    records = [
        record
        for record, _ in quantize_model(
            ModelAdapter(tiny_model("qwen3_moe")), Recipe(), Calibration(tokens(4).split(2), all_tokens=True)
        )
    ]
    assert all(record.tokens == 256 for record in records)


def test_importance_and_row_feedback_know_of_experts():
    model = tiny_model("olmoe")
    batches, curvature = tokens(4).split(2), {}
    from ptq.calibrate.importance import keep_in

    importance = token_importance(ModelAdapter(model), batches, seed=0, curvature=keep_in(curvature))
    experts = [name for name in importance if ".experts." in name]
    assert len(experts) == 2 * 4 * 2
    for name in experts:
        weights = torch.cat(importance[name])
        assert weights.shape == (4, 64) and 0 < (weights > 0).float().mean() < 1  # of tokens routed elsewhere it is 0
    recipe = Recipe(rule="joint", row_feedback=True, **DRIFTS["full"])
    calibration = Calibration(batches, importance, curvature, validation=tokens(2))
    records = [record for record, _ in quantize_model(ModelAdapter(model), recipe, calibration)]
    assert len(records) == 2 * (4 + 12) and all(record.error is not None for record in records)
    assert any(record.validation_error is not None for record in records if ".experts." in record.name)


def as_linears(folder):
    return load_checkpoint(folder, experts=True, attention="sdpa", device="cpu", dtype=torch.bfloat16)(TOKENS).logits


@torch.no_grad()
def test_mixtures_that_transformers_loads_wrong_are_not_scored(tmp_path):
    """When the last line fails, transformers has learnt it, and the refusal can go."""
    mixed = [("re:.*", Recipe(MXFP4, "rtn", "mse")), ("re:.*experts", Recipe(NVFP4, "rtn", "mse"))]
    for rules, folder in ((mixed, tmp_path / "mixed"), (NVFP4, tmp_path / "nvfp4")):
        folder.mkdir()
        export(folder, "qwen3_moe", torch.bfloat16, rules)
        with pytest.raises(ValueError, match="experts in nvfp4-pack-quantized, which transformers does not load right"):
            load_any(str(folder))
    right = as_linears(tmp_path / "nvfp4")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "nvfp4", dtype=torch.bfloat16)(TOKENS).logits
    assert (theirs - right).std() > right.std() / 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe", "gpt_oss"])
def test_other_mixtures_are_scored_right_or_not_at_all(tmp_path, family):
    """transformers merges experts under the names it knows only; of others it lacks the stacked tensors, and says so."""
    export(tmp_path, family, torch.bfloat16, MXFP4)
    if family != "qwen3_moe":
        with pytest.raises(ValueError, match=r"lacks \d+ tensors of the model"):
            load_any(str(tmp_path))
        return
    right = as_linears(tmp_path)
    assert torch.equal(load_any(str(tmp_path)).model(TOKENS).logits, right)
