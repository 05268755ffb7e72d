"""Checkpoints read back by the real peers: transformers with compressed-tensors."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ptq.core.activations import FP8_INPUT, FP8_TOKEN_INPUT, MXFP4_INPUT, NVFP4_INPUT
from ptq.core.formats import FP8_ROWS, INT4_G128, MXFP4, NVFP4, Format
from ptq.core.packing import pack_int32
from ptq.export.checkpoint import (
    ReadBackError,
    check_layer,
    layer_tensors,
    shard_name,
    write_rest,
)
from ptq.export.compressed_tensors import CompressedTensors
from ptq.export.files import check_output, save_durably, save_tensors
from ptq.export.read_back import verify
from ptq.models.adapter import ModelAdapter
from ptq.models.families import FAMILIES
from ptq.run.loop import Calibration, quantize_layers
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe

from .tiny import tiny_model, tiny_tokenizer

LAYOUT = CompressedTensors()
INT4 = replace(INT4_G128, block=32)
FORMATS = [NVFP4, MXFP4, INT4]
TOKENS = torch.randint(0, 64, (6, 64), generator=torch.Generator().manual_seed(4))


def export(folder, family="llama", dtype=torch.float32, format=NVFP4, ignore=(), **changes):
    """The adapter of a quantized model whose checkpoint is in `folder`, and the formats of its linears; `format` or rules."""
    model = tiny_model(family, dtype, **changes)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    adapter = ModelAdapter(model)
    # What is stored is nothing that another method could not find.
    rules = Recipe(format, "rtn", "mse") if isinstance(format, Format) else format
    plan = make_plan(adapter, rules, ignore)
    for done in quantize_layers(adapter, plan, Calibration(TOKENS.split(3))):
        path = folder / shard_name(done.layer.index, len(adapter.names))
        save_tensors(path, layer_tensors(done.layer, done.quantized, LAYOUT))
        check_layer(path, done.layer, plan.formats, LAYOUT)
    write_rest(folder, adapter, tiny_tokenizer(), plan.formats, LAYOUT, plan.ignored)
    return adapter, plan.formats


def read_back(folder, exported, layers=None):
    adapter, formats = exported
    return verify(folder, adapter, TOKENS, formats, LAYOUT, layers)


def stored(folder):
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it_back_bit_for_bit(tmp_path, family, format):
    assert read_back(tmp_path, export(tmp_path, family, format=format)) == 0


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"ignore": ("re:.*mlp.down_proj",)}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variants_read_back_bit_for_bit(tmp_path, dtype, changes):
    assert read_back(tmp_path, export(tmp_path, dtype=dtype, **changes)) == 0


def test_formats_by_linear_read_back_bit_for_bit(tmp_path):
    """Later rules win; transformers reads each linear in its own format."""
    rules = [
        ("re:.*", Recipe(NVFP4, "gptq", "mse")),
        ("re:.*self_attn", Recipe(MXFP4, "rtn", "local")),
        ("re:.*mlp.down_proj", Recipe(INT4, "gptq", "joint")),
        ("model.layers.1.mlp.down_proj", None),
    ]
    exported = export(tmp_path, format=rules)
    assert read_back(tmp_path, exported) == 0
    assert {name.split(".", 3)[3]: format.name for name, format in exported[1].items() if ".0." in name} == {
        **dict.fromkeys((f"self_attn.{x}_proj" for x in "qkvo"), "mxfp4"),
        **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), "nvfp4"),
        "mlp.down_proj": "int4",
    }
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision" and len(config["config_groups"]) == 3
    assert config["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]


ACTIVE = {
    "NVFP4": Recipe(NVFP4, "gptq", "joint", activation=NVFP4_INPUT, drift=1.0),
    "MXFP4": Recipe(MXFP4, "gptq", "joint", activation=MXFP4_INPUT, drift=1.0),
    "FP8_DYNAMIC": Recipe(FP8_ROWS, "gptq", "mse", activation=FP8_TOKEN_INPUT),
    "FP8": Recipe(FP8_ROWS, "rtn", "absmax", activation=FP8_INPUT),
}


@pytest.mark.parametrize("preset", ACTIVE)
def test_quantized_activations_read_back_bit_for_bit(tmp_path, preset):
    """transformers rounds the inputs too, as our own forward does; the configuration says what the preset of that name says."""
    adapter, formats = export(tmp_path, format=[("re:.*", ACTIVE[preset])])
    assert read_back(tmp_path, (adapter, formats)) == 0
    kept = {name: replace(format, activation=None) for name, format in formats.items()}
    assert read_back(tmp_path, (adapter, kept)) > 0, "our forward without rounding is another model"
    group = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    scheme = preset_name_to_scheme(preset, ["Linear"])
    assert QuantizationArgs(**group["input_activations"]) == scheme.input_activations
    if preset != "FP8":  # which has one weight scale a tensor; ours are by row, as FP8_DYNAMIC's
        assert scheme.weights is not None  # symmetric weights have no zero point, whose dtype the preset may name
        assert QuantizationArgs(**group["weights"], zp_dtype=scheme.weights.zp_dtype) == scheme.weights


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("preset", ["NVFP4", "MXFP4"])
def test_experts_on_quantized_activations_read_back_bit_for_bit(tmp_path, preset, family):
    """Engines keep one global scale for the inputs of all experts' gate and up projections, and one for their down projections."""
    assert read_back(tmp_path, export(tmp_path, family, format=[("re:.*", ACTIVE[preset])])) == 0
    scales = {name: float(t) for name, t in stored(tmp_path).items() if name.endswith("input_global_scale")}
    of_layer = {name: scale for name, scale in scales.items() if ".layers.1." in name and ".experts." in name}
    down = {scale for name, scale in of_layer.items() if ".down_proj." in name or ".w2." in name}
    others = {scale for name, scale in of_layer.items() if ".down_proj." not in name and ".w2." not in name}
    assert len(of_layer) == (12 if preset == "NVFP4" else 0) and len(down) == len(others) == bool(of_layer)


@pytest.mark.parametrize(
    "preset, key", [("NVFP4", "input_global_scale"), ("FP8", "input_scale"), ("MXFP4", ""), ("FP8_DYNAMIC", "")]
)
def test_linears_that_engines_fuse_share_a_power_of_two_for_their_inputs(tmp_path, preset, key):
    export(tmp_path, format=[("re:.*", ACTIVE[preset])])
    scales = {name: tensor for name, tensor in stored(tmp_path).items() if ".input_" in name and "norm" not in name}
    assert set(scales) == {f"{name}.{key}" for name in export_names() if key}
    if key:
        q, k, v, o = (scales[f"model.layers.0.self_attn.{x}_proj.{key}"] for x in "qkvo")
        assert q == k == v != o and all(
            tensor.shape == (1,) and torch.frexp(tensor).mantissa == 0.5 for tensor in scales.values()
        )


def export_names():
    return make_plan(ModelAdapter(tiny_model()), Recipe()).linears


def test_fp8_is_stored_by_row(tmp_path):
    export(tmp_path, format=[("re:.*", ACTIVE["FP8"])])
    name, found = "model.layers.0.mlp.down_proj", stored(tmp_path)
    layout = {key.removeprefix(f"{name}."): (t.dtype, tuple(t.shape)) for key, t in found.items() if key.startswith(name)}
    assert layout == {
        "weight": (torch.float8_e4m3fn, (64, 128)),
        "weight_scale": (torch.bfloat16, (64, 1)),
        "input_scale": (torch.float32, (1,)),
    }


def test_w4a4_fp8_and_bfloat16_in_one_checkpoint_read_back_bit_for_bit(tmp_path):
    rules = [
        ("re:.*", ACTIVE["NVFP4"]),
        ("re:.*self_attn", ACTIVE["FP8_DYNAMIC"]),
        ("model.layers.1.mlp.down_proj", None),
    ]
    assert read_back(tmp_path, export(tmp_path, format=rules)) == 0
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert {group["format"] for group in config["config_groups"].values()} == {"nvfp4-pack-quantized", "float-quantized"}
    assert config["ignore"] == ["lm_head", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("re:.*q_proj", "q_proj is to be int4 by gptq with local and model.layers.0.self_attn.k_proj nvfp4 by gptq with local"),
        ("re:.*gate_proj", "serving engines fuse mlp.gate_proj, mlp.up_proj and need one scheme for all: give them one recipe"),
        ("re:.*nothing", "rule 're:.*nothing' matches no linear"),
        ("re:lm_h", "rule 're:lm_h' is for lm_head alone, which only a rule with its name in it is for"),
    ],
)
def test_rules_that_split_what_engines_fuse_are_refused(pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_plan(ModelAdapter(tiny_model()), [("re:.*", Recipe()), (pattern, Recipe(INT4))])


def test_dense_tensors_of_a_bfloat16_model_are_bit_identical(tmp_path):
    original = tiny_model(dtype=torch.bfloat16).state_dict()
    export(tmp_path, dtype=torch.bfloat16)
    found = stored(tmp_path)
    dense = [name for name in original if name in found]
    assert len(dense) == 7 and all(torch.equal(found[name], original[name]) for name in dense)


def test_tensors_have_the_layout_the_readers_expect(tmp_path):
    export(tmp_path)
    name = "model.layers.0.mlp.down_proj"
    found = stored(tmp_path).items()
    layout = {key.removeprefix(f"{name}."): (t.dtype, tuple(t.shape)) for key, t in found if key.startswith(name)}
    assert layout == {
        "weight_packed": (torch.uint8, (64, 64)),
        "weight_scale": (torch.float8_e4m3fn, (64, 8)),
        "weight_global_scale": (torch.float32, (1,)),
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["quantization_config"]["quantization_status"] == "compressed"


def test_int4_words_are_those_of_compressed_tensors():
    codes = torch.randint(0, 16, (4, 64), dtype=torch.uint8)
    assert torch.equal(pack_int32(codes), pack_to_int32((codes.to(torch.int8) - 8), 4))


def test_tokenizer_template_and_generation_config_come_along(tmp_path):
    export(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a c")["input_ids"] == [2, 4] and "m.content" in str(tokenizer.chat_template)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 7


def test_one_file_a_layer_and_an_index_of_all(tmp_path):
    export(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(stored(tmp_path))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(tmp_path).values())
    assert index["weight_map"]["model.norm.weight"] == "model-00001-of-00003.safetensors"
    assert index["weight_map"]["model.layers.1.mlp.up_proj.weight_packed"] == "model-00003-of-00003.safetensors"


def test_the_first_layers_alone_can_be_verified(tmp_path):
    assert read_back(tmp_path, export(tmp_path, num_hidden_layers=3), layers=2) == 0


def test_the_checkpoint_generates(tmp_path):
    export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and model.generate(TOKENS[:1, :5], do_sample=False).shape == (1, 12)


def test_reading_back_sees_a_changed_scale_and_a_missing_tensor(tmp_path):
    adapter, formats = export(tmp_path)
    path = tmp_path / shard_name(0, 2)
    tensors = load_file(path)
    tensors["model.layers.0.mlp.down_proj.weight_global_scale"] *= 2
    save_tensors(path, tensors)
    with pytest.raises(ReadBackError, match=r"model.layers.0.mlp.down_proj differs"):
        check_layer(path, next(adapter.layers()), formats, LAYOUT)
    del tensors["model.layers.0.mlp.down_proj.weight_scale"]
    save_tensors(path, tensors)
    with pytest.raises(ReadBackError, match="does not read back: missing_keys"):
        verify(tmp_path, adapter, TOKENS, formats, LAYOUT)


def test_an_existing_output_is_refused(tmp_path):
    with pytest.raises(ValueError, match="exists already"):
        check_output(tmp_path, 0)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"needs about 1000000\.00 GB"):
        check_output(tmp_path / "new", 10**15)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="not a folder one may write to"):
        check_output(tmp_path / "a" / "b", 0)


def test_a_failure_while_writing_leaves_no_half_of_a_file(tmp_path):
    def fail(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_durably(tmp_path / "whole", fail)
    assert list(tmp_path.iterdir()) == []
