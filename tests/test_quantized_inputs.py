"""Activations in the method: what is calibrated, what Hessians are of, what resumes, and what it is worth on a trained model."""

from pathlib import Path

import pytest
import torch

from ptq.calibrate.inputs import Input, inputs_of, quantized_inputs
from ptq.core.activations import MXFP4_INPUT, NVFP4_INPUT, fake_quantize, global_scale_of
from ptq.core.formats import MXFP4, NVFP4
from ptq.data.text import all_windows, read_documents, sample_windows
from ptq.eval.perplexity import evaluate
from ptq.models.adapter import ModelAdapter
from ptq.models.loading import load_model
from ptq.run.loop import Calibration, quantize_layers, quantize_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.recipe_file import parse_recipe
from ptq.run.settings import base_recipe, make_recipe, settings_of
from ptq.runtime.hooks import observe_inputs
from ptq.settings import Settings

from .tiny import tiny_model

TOKENS = torch.randint(0, 64, (6, 32), generator=torch.Generator().manual_seed(4))
W4A4 = Recipe(NVFP4, rule="joint", drift=1.0, activation=NVFP4_INPUT)


def quantize(recipe, model=None):
    """The model, and its quantized weights by name."""
    model = tiny_model() if model is None else model
    found = quantize_model(ModelAdapter(model), recipe, Calibration(TOKENS.split(3)))
    return model, {record.name: weight for record, weight in found}


def test_the_global_scale_is_that_of_the_largest_input():
    model, weights = quantize(Recipe(NVFP4, "rtn", "absmax", activation=NVFP4_INPUT))
    seen = {}
    original = tiny_model()
    linear = original.get_submodule("model.layers.0.self_attn.q_proj")
    observe_inputs([linear], lambda _, x, __: seen.update(amax=x.abs().amax()), None, lambda: original(TOKENS).logits)
    assert weights["model.layers.0.self_attn.q_proj"].input_scale == global_scale_of(seen["amax"], NVFP4_INPUT)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_linears_run_on_rounded_inputs_inside_the_block_only():
    model, weights = quantize(W4A4)
    plain, inputs = model(TOKENS).logits, inputs_of(weights)
    assert len(inputs) == 14
    seen = []
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    with quantized_inputs(model, inputs):
        rounded = observe_inputs([linear], lambda _, x, __: seen.append(x), None, lambda: model(TOKENS).logits)
    scale = inputs["model.layers.1.mlp.down_proj"].global_scale
    assert torch.equal(seen[0], fake_quantize(seen[0], NVFP4_INPUT, scale))
    assert rounded is not None and not torch.equal(plain, rounded) and torch.equal(plain, model(TOKENS).logits)


def test_hessians_are_of_rounded_inputs(monkeypatch):
    from ptq.calibrate.hessian import Hessian

    added = []
    monkeypatch.setattr(Hessian, "add", lambda self, X, weights=None: added.append(X))
    with pytest.raises(ValueError, match="no calibration tokens arrived"):
        quantize(Recipe(MXFP4, rule="joint", activation=MXFP4_INPUT))
    assert len(added) == 8 and all(torch.equal(x, fake_quantize(x, MXFP4_INPUT)) for x in added)


def test_a_restored_layer_goes_on_with_the_same_inputs():
    """The second layer after the first was restored is bit for bit what it is without."""
    _, whole = quantize(W4A4)
    model = tiny_model()
    adapter = ModelAdapter(model)

    def restore(layer):
        scales = {}
        for name, module in layer.module.named_modules():
            if layer.full_name(name) in whole:
                module.weight.data.copy_(whole[layer.full_name(name)].dequantize())
                scales[name] = Input(NVFP4_INPUT, whole[layer.full_name(name)].input_scale)
        return 3, scales

    calibration = Calibration(TOKENS.split(3))
    (second,) = quantize_layers(adapter, make_plan(adapter, W4A4), calibration, finished=1, restore=restore)
    for name, weight in second.quantized.items():
        assert torch.equal(weight.codes, whole[name].codes) and weight.input_scale == whole[name].input_scale


def test_what_cannot_be_done_is_refused():
    with pytest.raises(ValueError, match="rtn with scale rule absmax on activations in nvfp4 needs calibration tokens"):
        next(quantize_model(ModelAdapter(tiny_model()), Recipe(NVFP4, "rtn", "absmax", activation=NVFP4_INPUT)))
    model = tiny_model()
    torch.nn.init.zeros_(model.get_parameter("model.layers.1.input_layernorm.weight"))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj: its largest input .* is 0\.0"):
        quantize(W4A4, model)


@pytest.mark.slow
@pytest.mark.parametrize("format, activation", [(NVFP4, NVFP4_INPUT), (MXFP4, MXFP4_INPUT)], ids=["nvfp4", "mxfp4"])
def test_w4a4_of_a_trained_model_loses_less_with_each_effort(shared: Path, format, activation):
    """KL, both models on rounded inputs: default < fast < RTN."""
    original, tokenizer = load_model(str(shared / "babyllama-tok105"), dtype=torch.float32, device="cpu")

    def windows(*path):
        documents = read_documents(str(shared.joinpath(*path)))
        return all_windows(lambda text: tokenizer(text, verbose=False)["input_ids"], documents, 128, path[-1])

    tokens = sample_windows(windows("calib", "c4_web_en.jsonl.gz"), 48, 0, "c4")
    kl = {}
    for case in ("rtn-absmax-none", "fast", "default"):
        model, _ = load_model(str(shared / "babyllama-tok105"), dtype=torch.float32, device="cpu")
        recipe = make_recipe(format, settings_of(case, activation.name), activation=activation)
        found = quantize_model(ModelAdapter(model), recipe, Calibration(tokens.split(16)))
        with quantized_inputs(model, inputs_of({record.name: weight for record, weight in found})):
            text = windows("eval_text", "tinystories_sample.txt")[:12]
            kl[case] = evaluate({"original": original, "other": model}, text)["other"].kl
    assert kl["default"] < kl["fast"] < kl["rtn-absmax-none"], kl


@pytest.mark.parametrize("activations, ridge", [("none", 0.1), ("nvfp4", 1.0), ("mxfp4", 1.0), ("fp8", 0.1)])
def test_drift_is_held_by_a_larger_ridge_where_inputs_are_noisy(activations, ridge):
    """docs/activations.md has the numbers."""
    format = {"none": "nvfp4", "fp8": "fp8"}.get(activations, activations)
    settings = Settings(format=format, activations=activations, rule="mse").complete()
    recipe = base_recipe(settings)
    assert (recipe.ridge, recipe.drift, recipe.stagewise) == (ridge, 1.0, True)
    assert parse_recipe(f"[{{linears: x, format: {format}, activations: {activations}, rule: mse}}]", "")[0][1] == recipe
