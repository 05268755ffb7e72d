"""Layouts beside compressed-tensors, and `convert` between them: the same codes and scales, or a refusal by name."""

import json
import re
from dataclasses import replace

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ptq.core.formats import INT4_G128, MXFP4, NVFP4
from ptq.core.packing import Quantized
from ptq.export.convert import convert
from ptq.export.files import save_tensors
from ptq.export.gguf_blocks import from_blocks, kind_of, to_blocks
from ptq.export.gguf_layout import permuted
from ptq.export.gguf_model import rope_factors
from ptq.export.gguf_tokenizer import split_of, vocabulary
from ptq.export.gptq_layout import GPTQLayout
from ptq.export.layouts import LAYOUTS, get_layout
from ptq.export.manifest import MANIFEST, read_manifest, write_manifest
from ptq.export.modelopt import ModelOpt
from ptq.export.reader import open_checkpoint
from ptq.models.headers import from_headers
from ptq.run.recipe import Recipe

from .test_export import export, stored

INT4 = replace(INT4_G128, block=32)
WIDE = {"hidden_size": 64, "intermediate_size": 128}
HOLDS = {"compressed-tensors": (NVFP4, MXFP4, INT4), "modelopt": (NVFP4,), "gptq": (INT4,), "gptq-v2": (INT4,)}


def random_weight(format, d_out=16, d_in=128):
    """Any codes, any scales of the grid a GPTQ float16 can hold too, a power of two."""
    codes = torch.randint(0, 16, (d_out, d_in), dtype=torch.uint8)
    scales = torch.ldexp(1 + torch.randint(0, 8, (d_out, d_in // format.block)) / 8, torch.tensor(-3))
    scales = scales if format.grid.dtype != torch.uint8 else torch.full_like(scales, 2.0**-5)
    return Quantized(codes, scales, torch.tensor(2.0**-7 if format.tensor_scale else 1.0), format)


def byte_tokenizer(folder):
    """A byte-level BPE tokenizer like GPT-2's, of 64 tokens, which llama.cpp has a name for."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: letter not in "abc")[:61]
    tokens = [*letters, "</s>", "ab", "abc"]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)


def exported(folder, format, **changes):
    folder.mkdir()
    export(folder, format=format, dtype=torch.bfloat16, **changes)
    return folder


@pytest.mark.parametrize("name, format", [(name, format) for name in HOLDS for format in HOLDS[name]])
def test_unpack_inverts_pack(name, format):
    weight = random_weight(format)
    back = get_layout(name).unpack("linear", get_layout(name).pack("linear", weight), format)
    assert back is not None and torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
    assert back.tensor_scale == weight.tensor_scale and torch.equal(back.dequantize(), weight.dequantize())


@pytest.mark.parametrize(
    "format, path",
    [
        (NVFP4, ["modelopt", "compressed-tensors"]),
        (INT4, ["gptq", "gptq-v2", "gptq", "compressed-tensors"]),
        (MXFP4, ["compressed-tensors"]),
    ],
    ids=["nvfp4", "int4", "mxfp4"],
)
def test_there_and_back_gives_the_same_bytes(tmp_path, format, path):
    """Every tensor of the checkpoint, quantized or not; and transformers reads what came back with the same logits."""
    first = last = exported(tmp_path / "first", format, ignore=("model.layers.1.mlp.down_proj",))
    for number, name in enumerate(path):
        done = convert(last, tmp_path / str(number), name)
        last = done.target
        assert done.to_layout == name and sum(done.linears.values()) == 13
    before, after = stored(first), stored(last)
    assert before.keys() == after.keys()
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in before)
    tokens = torch.arange(8)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits for folder in (first, last))
    assert torch.equal(one, other)
    assert (last / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert not list(tmp_path.glob(".*")), "nothing half-done is left"


def test_modelopt_has_the_tensors_and_both_configs_its_readers_expect(tmp_path):
    source = exported(tmp_path / "source", NVFP4, ignore=("model.layers.1.mlp.down_proj",))
    convert(source, tmp_path / "modelopt", "modelopt")
    name = "model.layers.0.mlp.down_proj"
    found, before = stored(tmp_path / "modelopt"), stored(source)
    kinds = {key.removeprefix(f"{name}."): (t.dtype, tuple(t.shape)) for key, t in found.items() if key.startswith(name)}
    assert kinds == {
        "weight": (torch.uint8, (64, 64)),
        "weight_scale": (torch.float8_e4m3fn, (64, 8)),
        "weight_scale_2": (torch.float32, ()),
    }
    assert found[f"{name}.weight_scale_2"] == 1 / before[f"{name}.weight_global_scale"]
    config = json.loads((tmp_path / "modelopt" / "config.json").read_text())["quantization_config"]
    other = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_method"] == "modelopt" and config["quant_algo"] == other["quant_algo"] == "W4A16_NVFP4"
    assert config["ignore"] == other["exclude_modules"] and "model.layers.1.mlp.down_proj" in config["ignore"]
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= other.keys()


def test_gptq_words_are_eight_inputs_of_one_output():
    """By hand: w = (nibble - 8) · scale, and the two versions differ in the stored zero alone."""
    weight = random_weight(INT4, 8, 64)
    one, two = (GPTQLayout(version).pack("x", weight) for version in ("gptq", "gptq_v2"))
    word = int(one["x.qweight"][3, 5]) & 0xFFFFFFFF
    assert [word >> 4 * i & 15 for i in range(8)] == weight.codes[5, 24:32].tolist()
    assert one["x.scales"].dtype == torch.float16 and one["x.scales"].shape == (2, 8)
    assert set(one["x.qzeros"].flatten().tolist()) == {0x77777777}
    assert set((two["x.qzeros"].flatten().long() & 0xFFFFFFFF).tolist()) == {0x88888888}
    assert one["x.g_idx"].tolist() == [i // 32 for i in range(64)]


def test_gptq_keeps_bfloat16_where_float16_is_too_small():
    weight = random_weight(INT4)
    tiny = replace(weight, scales=weight.scales * 2.0**-30)
    tensors = GPTQLayout().pack("x", tiny)
    assert tensors["x.scales"].dtype == torch.bfloat16
    assert torch.equal(GPTQLayout().unpack("x", tensors, INT4).scales, tiny.scales)  # type: ignore[union-attr]


@pytest.mark.parametrize("format", [NVFP4, MXFP4, INT4, replace(INT4_G128, block=64)], ids=lambda f: f"{f.name}-{f.block}")
def test_ggufs_own_dequantize_gives_the_same_weights_bit_for_bit(format):
    weight = random_weight(format)
    blocks = to_blocks("x", weight)
    values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind_of(format)])
    assert torch.equal(torch.from_numpy(values) * weight.tensor_scale, weight.dequantize())
    back = from_blocks(blocks, format, weight.tensor_scale)
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)


@pytest.mark.parametrize("family, format", [("llama", NVFP4), ("llama", MXFP4), ("qwen2", INT4), ("qwen3", MXFP4)])
def test_a_gguf_file_read_back_holds_the_model(tmp_path, family, format):
    """Names, order of rows, settings and every number, through gguf's reader and its own dequantize."""
    source = exported(tmp_path / "source", format, family=family)
    byte_tokenizer(source)
    checkpoint = open_checkpoint(source)
    weights = {name: checkpoint.quantized(name).dequantize() for name in checkpoint.linears}
    dense = stored(source)
    convert(source, tmp_path / "gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert not list((tmp_path / "gguf").glob("*.safetensors"))
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.o_proj": "attn_output",
        "mlp.down_proj": "ffn_down",
    }
    for ours, theirs in names.items():
        tensor = found[f"blk.1.{theirs}.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if f"blk.1.{theirs}.scale" in found:
            values = values * float(found[f"blk.1.{theirs}.scale"].data[0])
        if family == "llama" and theirs in ("attn_q", "attn_k"):  # row 2i of a head was row i, row 2i + 1 was row i + 8
            values = values.view(-1, 8, 2, 64).transpose(1, 2).reshape(-1, 64)
        assert torch.equal(values, weights[f"model.layers.1.{ours}"])
    embedding = torch.from_numpy(found["token_embd.weight"].data.copy()).view(torch.bfloat16)
    assert torch.equal(embedding, dense["model.embed_tokens.weight"])
    assert found["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = fields["general.architecture"]
    assert arch == family and fields[f"{arch}.attention.head_count_kv"] == 2 and fields[f"{arch}.block_count"] == 2
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.tokens"][62:] == ["ab", "abc"] and fields["tokenizer.ggml.merges"] == ["a b", "ab c"]
    skeleton = from_headers(str(tmp_path / "gguf" / "model.gguf"))
    assert (skeleton is None) == (format == NVFP4)  # whose scales of tensors transformers does not know
    if skeleton:
        groups = [(layer, name) for layer in skeleton.skeleton() for group in skeleton.plan(layer).groups for name in group]
        sizes = {layer.full_name(name): layer.linear(name).weight.shape for layer, name in groups}
        assert sizes == {name: weight.shape for name, weight in weights.items()}
        assert skeleton.parameters() == sum(tensor.n_elements for tensor in reader.tensors)


def test_biases_of_q_and_k_change_places_like_their_rows():
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    assert permuted("layers.0.self_attn.q_proj.bias", torch.arange(8), config).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert permuted("layers.0.self_attn.k_proj.bias", torch.arange(4), config).tolist() == [0, 2, 1, 3]
    assert permuted("layers.0.self_attn.v_proj.bias", torch.arange(4), config).tolist() == [0, 1, 2, 3]


def test_llama_3s_rotary_factors_are_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=8, rope_parameters=rope | {"original_max_position_embeddings": 8192}
    )
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    factors = rope_factors(config.to_dict())
    assert factors is not None
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)  # a few roundings of float32 in each


def test_tokenizers_from_sentencepiece_keep_bytes_and_specials_apart():
    tokenizer = {
        "model": {"vocab": {"<s>": 0, "<0x0A>": 1, "▁a": 2}},
        "added_tokens": [{"id": 0, "content": "<s>", "special": True}],
    }
    assert vocabulary(tokenizer, 5) == (
        ["<s>", "<0x0A>", "▁a", "[PAD3]", "[PAD4]"],
        ["CONTROL", "BYTE", "NORMAL", "UNUSED", "UNUSED"],
    )
    assert split_of(tokenizer) == ()


@pytest.mark.parametrize(
    "format, layout, message",
    [
        (MXFP4, "modelopt", "down_proj is mxfp4 in blocks of 32; ModelOpt's layout holds NVFP4 in blocks of 16: choose"),
        (NVFP4, "gptq", "is nvfp4; GPTQ's layout holds INT4: choose compressed-tensors or modelopt"),
        (INT4, "awq", "unknown layout 'awq'; there are compressed-tensors, modelopt, gptq, gptq-v2, gguf"),
    ],
)
def test_what_a_layout_cannot_hold_is_refused_by_name(tmp_path, format, layout, message):
    source = exported(tmp_path / "source", format)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "target", layout)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_gguf_refuses_by_name_widths_it_has_no_blocks_for(tmp_path):
    source = exported(tmp_path / "source", NVFP4, intermediate_size=96)
    with pytest.raises(ValueError, match=r"mlp.down_proj has 96 inputs in blocks of 16; GGUF's NVFP4 holds multiples of 64"):
        convert(source, tmp_path / "target", "gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_two_formats_in_one_model_are_for_compressed_tensors_only(tmp_path):
    rules = [("re:.*", Recipe(NVFP4, "rtn", "mse")), ("re:.*mlp", Recipe(INT4, "rtn", "mse"))]
    source = exported(tmp_path / "source", rules)
    with pytest.raises(ValueError, match="is int4 in blocks of 32; ModelOpt's layout holds NVFP4"):
        convert(source, tmp_path / "target", "modelopt")
    assert convert(source, tmp_path / "same", "compressed-tensors").linears == {"nvfp4": 8, "int4": 6}


def test_a_tensor_scale_whose_reciprocal_does_not_come_back_is_refused(tmp_path):
    source = exported(tmp_path / "source", NVFP4)
    convert(source, tmp_path / "modelopt", "modelopt")
    values = torch.linspace(1.5, 1.9, 1000)
    lost = values[1 / (1 / values) != values][0]  # a foreign amax / 2688
    change(tmp_path / "modelopt", "model.layers.0.mlp.down_proj.weight_scale_2", lambda t: torch.full_like(t, float(lost)))
    with pytest.raises(
        ValueError, match=rf"down_proj has tensor_scale {lost.item():.9g}, which the layout compressed-tensors would give"
    ):
        convert(tmp_path / "modelopt", tmp_path / "back", "compressed-tensors")


def test_an_input_scale_whose_reciprocal_does_not_come_back_is_refused(tmp_path):
    source = exported(tmp_path / "source", NVFP4)
    quantize_inputs(source)
    change(source, "model.layers.0.mlp.up_proj.input_global_scale", lambda scale: torch.full_like(scale, 7))
    with pytest.raises(ValueError, match=r"up_proj\.input_global_scale is 7, whose reciprocal does not come back in float32"):
        convert(source, tmp_path / "modelopt", "modelopt")


def test_input_scales_go_along_as_their_reciprocals(tmp_path):
    """Weights and activations: compressed-tensors' divisors, ModelOpt's multipliers, and what both configs say."""
    source = exported(tmp_path / "source", NVFP4)
    quantize_inputs(source)
    convert(source, tmp_path / "modelopt", "modelopt")
    assert stored(tmp_path / "modelopt")["model.layers.0.mlp.up_proj.input_scale"].tolist() == 1 / 64
    config = json.loads((tmp_path / "modelopt" / "hf_quant_config.json").read_text())
    assert config["quantization"]["quant_algo"] == "NVFP4"
    convert(tmp_path / "modelopt", tmp_path / "back", "compressed-tensors")
    assert stored(tmp_path / "back")["model.layers.0.mlp.up_proj.input_global_scale"].tolist() == [64.0]
    groups = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert groups["group_0"]["input_activations"]["dynamic"] == "local"
    logits = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.bfloat16)(torch.arange(8)[None]).logits
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)(torch.arange(8)[None]).logits
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("qzeros", 0x66666666, "has stored zeros [6]; symmetric INT4 under checkpoint_format 'gptq' has only 7"),
        ("g_idx", 0, "was quantized in activation order (desc_act)"),
        ("k_scale", 1, "its cache is quantized"),
    ],
)
def test_others_gptq_is_refused_where_it_is_not_symmetric_and_in_order(tmp_path, part, value, message):
    source = exported(tmp_path / "source", INT4)
    convert(source, tmp_path / "gptq", "gptq")
    name = f"model.layers.0.mlp.down_proj.{part}"
    change(tmp_path / "gptq", name, lambda t: torch.full_like(t, value), like="model.layers.0.mlp.down_proj.qzeros")
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(tmp_path / "gptq", tmp_path / "back", "compressed-tensors")
    assert not (tmp_path / "back").exists()


def test_a_target_that_exists_and_a_source_that_is_none_are_refused(tmp_path):
    source = exported(tmp_path / "source", NVFP4)
    with pytest.raises(ValueError, match="exists already"):
        convert(source, source, "modelopt")
    with pytest.raises(ValueError, match=r"has no config\.json: name a checkpoint's folder"):
        convert(tmp_path, tmp_path / "new", "modelopt")


def test_the_manifest_has_the_hash_of_every_tensor(tmp_path):
    source = exported(tmp_path / "source", MXFP4)
    write_manifest(source)
    listed = read_manifest(source)
    assert listed is not None and listed.keys() == stored(source).keys() and len({v["blake2b"] for v in listed.values()}) > 20
    assert read_manifest(tmp_path) is None and (source / MANIFEST).exists()


def test_layouts_have_their_names():
    assert all(layout.name == name for name, layout in LAYOUTS.items()) and ModelOpt(activations=True).name == "modelopt"


def change(folder, name, how, like=""):
    """Replaces a tensor by what `how` makes of it, or adds one made of `like`."""
    path = next(path for path in folder.glob("*.safetensors") if (like or name) in load_file(path))
    tensors = load_file(path)
    tensors[name] = how(tensors.get(name, tensors.get(like)))
    save_tensors(path, tensors)


def quantize_inputs(folder):
    """Makes a weights-only NVFP4 checkpoint one that quantizes activations too."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith("weight_global_scale")]:
            tensors[name.replace("weight_global", "input_global")] = torch.tensor([64.0])
        save_tensors(path, tensors)
    config = json.loads((folder / "config.json").read_text())
    for group in config["quantization_config"]["config_groups"].values():
        group["input_activations"] = group["weights"] | {"dynamic": "local"}
    (folder / "config.json").write_text(json.dumps(config))
