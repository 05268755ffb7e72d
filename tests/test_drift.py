"""What earlier layers lost, made good: the least squares it claims to be, and what it does to a model."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from ptq.calibrate.drift import Drift
from ptq.calibrate.hessian import Hessian
from ptq.calibrate.observe import LayerPass, Observed
from ptq.calibrate.validation import Validation
from ptq.models.adapter import ModelAdapter
from ptq.models.families import FAMILIES
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.run.settings import DRIFTS
from ptq.runtime.hooks import observe_outputs

from .test_runner import tokens
from .tiny import tiny_model


def problem(d_in: int = 12, d_out: int = 7, count: int = 300):
    """(W, x, x̂, h - ĥ, token weights), in float64."""
    x = torch.randn(count, d_in, dtype=torch.float64)
    seen = x + 0.2 * torch.randn_like(x)
    W, weights = torch.randn(d_out, d_in, dtype=torch.float64), torch.rand(count, dtype=torch.float64)
    return W, x, seen, 0.3 * torch.randn(count, d_out, dtype=torch.float64) + seen[:, :d_out], weights


def sums(x, seen, gap, weights, W, parts: int = 3):
    """Of a linear that writes to the stream if there is a gap in it."""
    lost = x - seen if gap is None else x @ W.T + gap
    hessian, drift = Hessian(x.shape[1]), Drift(x.shape[1], stream=None if gap is None else len(W))
    for rows in torch.arange(len(x)).chunk(parts):
        hessian.add(seen[rows], weights[rows])
        drift.add(seen[rows], lost[rows], weights[rows])
    return hessian, drift


@pytest.mark.parametrize("stream", [False, True])
def test_target_is_the_ridge_regression_of_what_the_original_had(stream):
    W, x, seen, gap, weights = problem()
    hessian, drift = sums(*(part.float() for part in (x, seen)), gap.float() if stream else None, weights.float(), W.float())
    H = hessian.mean()
    T = drift.target(W.float(), H, hessian.weight, strength=1.0, ridge=0.05)
    # Rows √w x̂ᵀ and, for the ridge, √λ I; wanted is what T adds to W.
    share = (weights / weights.sum()).sqrt()[:, None]
    wanted = (x - seen) @ W.T + (gap if stream else 0)
    ridge = (0.05 * H.diagonal().mean()).double().sqrt() * torch.eye(12, dtype=torch.float64)
    rows = torch.cat([share * seen, ridge])
    added = torch.linalg.lstsq(rows, torch.cat([share * wanted, torch.zeros(12, 7, dtype=torch.float64)])).solution.T
    # Float32 sums over 300 tokens, and a condition number of H of about 2.
    assert torch.allclose(T.double(), W + added, atol=2e-5)


def test_no_drift_changes_nothing_and_half_of_it_half_as_much():
    W, x, seen, gap, weights = (part.float() for part in problem())
    hessian, drift = sums(seen, seen, None, weights, W)
    assert torch.equal(drift.target(W, hessian.mean(), hessian.weight, strength=1.0, ridge=0.1), W)
    hessian, drift = sums(seen, seen, torch.zeros_like(gap), weights, W)
    T = drift.target(W, hessian.mean(), hessian.weight, strength=1.0, ridge=0.1)
    assert torch.allclose(T, W, atol=2e-5)  # two float32 sums over 300 tokens, one of outputs, one of inputs
    hessian, drift = sums(x, seen, gap, weights, W)
    whole, half = (drift.target(W, hessian.mean(), hessian.weight, strength=s, ridge=0.1) for s in (1.0, 0.5))
    assert torch.allclose(half - W, (whole - W) / 2, atol=1e-6)
    some = drift.target(W[2:5], hessian.mean(), hessian.weight, strength=1.0, ridge=0.1, rows=slice(2, 5))
    assert torch.allclose(some, whole[2:5], atol=1e-6)


def test_dead_inputs_are_left_alone():
    W, x, seen, gap, weights = (part.float() for part in problem())
    seen[:, 5] = 0
    hessian, drift = sums(x, seen, gap, weights, W)
    T = drift.target(W, hessian.mean(), hessian.weight, strength=1.0, ridge=0.1)
    assert torch.equal(T[:, 5], W[:, 5]) and not torch.equal(T, W)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "cohere2"])
def test_the_writers_outputs_are_what_they_leave_in_the_stream(family):
    adapter = ModelAdapter(tiny_model(family))
    hidden = adapter.embed(tokens(2))
    layer, *_ = adapter.layers()
    plan = adapter.plan(layer)
    if not plan.residual:
        assert hasattr(layer.module, "post_feedforward_layernorm")  # a norm comes between
        return
    between: list[torch.Tensor] = []
    handle = layer.module.post_attention_layernorm.register_forward_pre_hook(lambda _, args: between.append(args[0]))
    with torch.no_grad():
        output = adapter.forward(layer, hidden)
        first = plan.groups[0][0]
        together = observed(adapter, layer, [first, *plan.residual], hidden)
        for local, after in zip(plan.residual, (between[0], output), strict=False):  # a mixture's experts are no writers
            alone, frozen = (observed(adapter, layer, [local], hidden, frozen=frozen) for frozen in (False, True))
            assert torch.equal(alone[local].x, together[local].x) and torch.equal(frozen[local].x, alone[local].x)
            assert torch.equal(frozen[local].stream, after)
            y = layer.linear(local)(alone[local].x)
            for seen in (alone, together):  # b + W x added to what the linear's bias alone leaves
                W, factor = layer.linear(local).weight, plan.residual[local]
                assert torch.allclose(seen[local].stream + factor * (alone[local].x @ W.T), after, atol=1e-6)
                if layer.linear(local).bias is None:
                    assert torch.equal(seen[local].stream + (factor * y if factor != 1 else y), after)
    handle.remove()
    assert list(together) == [first, *plan.residual] and together[first].stream is None


def observed(adapter, layer, names, hidden, *, frozen: bool = False) -> dict[str, Observed]:
    seen: dict[str, Observed] = {}
    one = LayerPass(adapter, layer, adapter.plan(layer), hidden, frozen=frozen)
    one.observe(names, lambda one: seen.update({one.name: one}), streams=True)
    one.close()
    return seen


@pytest.mark.parametrize("how", ["half", "full"])
@pytest.mark.parametrize("method, rule", [("rtn", "absmax"), ("rtn", "local"), ("gptq", "joint")])
def test_the_model_comes_closer_to_the_original(method, rule, how):
    original, batches = tiny_model(num_hidden_layers=4), tokens(24).split(8)
    distances = []
    for drift in ("none", how):
        model = copy.deepcopy(original)
        list(quantize_model(ModelAdapter(model), Recipe(method=method, rule=rule, **DRIFTS[drift]), Calibration(batches)))
        with torch.no_grad():
            outputs = [torch.cat([m.get_decoder()(b).last_hidden_state for b in batches]) for m in (original, model)]
        distances.append(float((outputs[0] - outputs[1]).norm()))
    assert distances[1] < 0.9 * distances[0]


def test_nothing_of_a_finished_layer_waits_for_the_garbage_collector(monkeypatch):
    """On a GPU it would be gigabytes.  A pass that ends early must not leave a cycle that holds its layer."""
    copies: list[weakref.ref] = []

    def spy(thing, *arguments):
        copied = deepcopy(thing, *arguments)
        if isinstance(thing, torch.nn.Module):
            copies.append(weakref.ref(copied))
        return copied

    model, deepcopy = tiny_model(num_hidden_layers=3), copy.deepcopy
    monkeypatch.setattr(copy, "deepcopy", spy)
    gc.collect()
    gc.disable()
    try:
        list(quantize_model(ModelAdapter(model), Recipe(drift=1.0), Calibration(tokens().split(2))))
        assert len(copies) >= 3 and not [one for one in copies if one() is not None]
    finally:
        gc.enable()


def test_validation_errors_are_those_of_the_outputs():
    original, validation = tiny_model(), tokens(3)
    model = copy.deepcopy(original)
    results = quantize_model(ModelAdapter(model), Recipe(drift=1.0), Calibration(tokens().split(2), validation=validation))
    records = {record.name: record.validation_error for record, _ in results}
    name = "model.layers.1.mlp.up_proj"
    outputs = []
    for one in (original, model):
        with torch.no_grad(), observe_outputs([one.get_submodule(name)], lambda _, x, y: outputs.append(y)):
            one(validation)
    assert records[name] == pytest.approx(float((outputs[1] - outputs[0]).norm() / outputs[0].norm()), rel=1e-5)
    assert len(records) == 14 and all(error is not None and error > 0 for error in records.values())


def test_an_unchanged_layer_has_no_validation_error():
    adapter = ModelAdapter(tiny_model())
    whole, by_one = Validation(adapter, tokens(3), batch=3), Validation(adapter, tokens(3), batch=1)
    for layer in adapter.layers():
        changed = replace(layer, module=copy.deepcopy(layer.module))
        changed.module.mlp.down_proj.weight.data *= 1.01
        assert set(whole.measure(layer, layer, adapter.plan(layer)).values()) == {0.0}
        errors = by_one.measure(layer, changed, adapter.plan(layer))
        assert errors["mlp.down_proj"] > 0.009


def test_settings_that_make_no_sense_are_refused():
    config = Recipe()
    with pytest.raises(ValueError, match=r"drift is the share .* 0 to 1, not 1.5"):
        replace(config, drift=1.5)
    with pytest.raises(ValueError, match=r"drift 0\.6 from one pass a layer diverges; take at most 0\.5"):
        replace(config, drift=0.6, stagewise=False)
    with pytest.raises(ValueError, match="ridge must be positive, not 0"):
        replace(config, ridge=0)
    with pytest.raises(ValueError, match="row feedback is part of method gptq"):
        replace(config, method="rtn", row_feedback=True)
    with pytest.raises(ValueError, match="row feedback needs the curvature"):
        next(quantize_model(ModelAdapter(tiny_model()), replace(config, row_feedback=True), Calibration(tokens().split(2))))
