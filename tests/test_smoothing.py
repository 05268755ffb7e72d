"""Scaled channels: the model stays what it was to the bit, and the scales do what they are for."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ptq
from ptq.calibrate.activations import embed_all
from ptq.calibrate.inputs import inputs_of, quantized_inputs
from ptq.calibrate.passes import Stream
from ptq.core.activations import MXFP4_INPUT, NVFP4_INPUT
from ptq.core.formats import MXFP4, NVFP4
from ptq.core.linalg import pack_symmetric, unpack_symmetric
from ptq.eval.perplexity import evaluate
from ptq.models.adapter import ModelAdapter
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.run.smoothing import Rescaled, candidates, smooth
from ptq.runtime.distributed import Ranks
from ptq.settings import Settings

from .conftest import disk_full_at
from .tiny import TEXT, tiny_model, tiny_tokenizer

PAIRS = {"nvfp4": (NVFP4, NVFP4_INPUT), "mxfp4": (MXFP4, MXFP4_INPUT)}


def tokens(sequences: int, seed: int = 2) -> torch.Tensor:
    return torch.randint(0, 28, (sequences, 64), generator=torch.Generator().manual_seed(seed))


def with_outliers(kind="llama", dtype=torch.float32):
    """A tiny model some of whose channels are large in every linear's input."""
    model = tiny_model(kind, dtype)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[::13] *= 30
        layer.post_attention_layernorm.weight.data[5::17] *= 20
        layer.self_attn.v_proj.weight.data[::7] *= 15
        layer.mlp.up_proj.weight.data[::11] *= 25
    return model


def smooth_all(model, name="nvfp4"):
    adapter, batches = ModelAdapter(model), tokens(4).split(2)
    stream = Stream(embed_all(adapter, batches), Ranks(), 4)
    format, activation = PAIRS[name]
    recipe = Recipe(format, activation=activation, smooth=True)
    scaled = {}
    with torch.no_grad():
        for layer in adapter.layers():
            plan = adapter.plan(layer)
            recipes = {layer.full_name(n): recipe for group in plan.groups for n in group}
            scaled |= smooth(adapter, layer, plan, recipes, stream)
    return scaled


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "cohere2"])
def test_logits_stay_equal_to_the_bit(kind, dtype):
    model = tiny_model(kind, dtype)
    for layer in model.model.layers:
        layer.input_layernorm.weight.data[::13] *= 30
        layer.mlp.up_proj.weight.data[::11] *= 25
    before = copy.deepcopy(model)
    smooth_all(model)
    x = tokens(2)
    changed = [n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert any("up_proj" in n for n in changed) and any("down_proj" in n for n in changed)
    assert torch.equal(model(x).logits, before(x).logits)


@pytest.mark.parametrize("name", PAIRS)
def test_every_place_of_a_llama_is_scaled_and_the_loss_falls(name):
    """With outliers in all inputs: KL of inputs and weights rounded is lower where channels are scaled."""
    original, (format, activation) = with_outliers(), PAIRS[name]
    assert {n.rpartition(".")[2] for n in smooth_all(copy.deepcopy(original), name)} == {"v_proj", "up_proj"}
    found = {}
    for scaled in (False, True):
        model = copy.deepcopy(original)
        recipe = Recipe(format, rule="local", activation=activation, smooth=scaled)
        done = quantize_model(ModelAdapter(model), recipe, Calibration(tokens(8).split(4)))
        with quantized_inputs(model, inputs_of({record.name: weight for record, weight in done})):
            found[scaled] = evaluate({"original": original, "other": model}, tokens(4, seed=5))["other"].kl
    assert found[True] < found[False]


def test_candidates_are_powers_of_two_and_flatten():
    size = torch.tensor([1.0, 1.0, 1.0, 64.0, 0.0])
    every = list(candidates(size))
    assert torch.equal(every[0], torch.ones(5))
    assert every[4][3] == 1 / 8 and every[8][3] == 1 / 64
    assert all((s.log2() == s.log2().round()).all() for s in every)
    assert all(torch.equal(s, torch.ones(3)) for s in candidates(torch.full((3,), torch.nan)))


def test_curvature_of_scaled_outputs():
    """y' = s y has the curvature G / (s sᵀ)."""
    A = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    G, s = A @ A.T, torch.tensor([1.0, 2, 4, 0.5, 1, 8])
    curvature = {"a": pack_symmetric(G), "b": pack_symmetric(G)}
    rescaled = Rescaled(curvature, {"a": s})
    assert torch.equal(unpack_symmetric(rescaled["a"], 6), unpack_symmetric(curvature["a"], 6) / torch.outer(s, s))
    assert rescaled["b"] is curvature["b"] and set(rescaled) == {"a", "b"} and len(rescaled) == 2


def test_it_is_the_default_for_four_bit_inputs_only():
    assert Settings(activations="nvfp4").complete().smooth and Settings(activations="mxfp4", format="mxfp4").complete().smooth
    assert not Settings().complete().smooth
    assert not Settings(activations="fp8", format="fp8", rule="mse").complete().smooth
    assert not Settings(activations="nvfp4", method="rtn").complete().smooth
    with pytest.raises(ValueError, match="smooth is for inputs"):
        Recipe(smooth=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}


@pytest.fixture
def made(tmp_path):
    """A folder with a model that has outliers, by dtype, and what to quantize it with."""

    def make(dtype: torch.dtype) -> tuple[Path, dict]:
        model, folder = with_outliers(dtype=dtype), tmp_path / "model"
        model.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        (tmp_path / "text.txt").write_text(TEXT)
        how = {"calibration": str(tmp_path / "text.txt"), "sequences": 8, "length": 64, "device": "cpu", "progress": False}
        return folder, how | {"activations": "nvfp4"}

    return make


@pytest.mark.parametrize("effort", ["default", "best"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_in_memory_and_resumed_are_the_same_bytes_with_scaled_gains(tmp_path, made, dtype, effort):
    """Each has been read back by transformers, with equal logits, or the run would have failed."""
    folder, how = made(dtype)
    how |= {"effort": effort, "rule": "mse"}  # the rule whose search takes least
    ptq.quantize(str(folder), output=tmp_path / "streamed", **how)
    gain = "model.layers.0.input_layernorm.weight"
    stored = next(t[gain] for p in (tmp_path / "streamed").glob("*.safetensors") if gain in (t := load_file(p)))
    ratio = stored / with_outliers(dtype=dtype).get_parameter(gain).to(torch.bfloat16)
    assert (ratio != 1).any() and torch.equal(ratio.log2(), ratio.log2().round())
    with disk_full_at(1), pytest.raises(OSError):
        ptq.quantize(str(folder), output=tmp_path / "resumed", **how)
    ptq.quantize(str(folder), output=tmp_path / "resumed", resume=True, **how)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "streamed")


def test_it_can_be_left_out_and_is_refused_where_nothing_can_be_scaled(tmp_path, made):
    folder, how = made(torch.float32)
    ptq.quantize(str(folder), output=tmp_path / "plain", smooth=False, **how)
    assert "--no-smooth" in (tmp_path / "plain" / "README.md").read_text()
    with pytest.raises(ValueError, match="--smooth: models of type 'phi3'"):
        ptq.quantize(tiny_model("phi3"), tokenizer=tiny_tokenizer(), smooth=True, output=tmp_path / "phi", **how)
