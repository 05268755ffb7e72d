"""`check` finds what is planted, one thing at a time, and nothing in what ptq writes."""

import argparse
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ptq.core.formats import INT4_G128, MXFP4, NVFP4
from ptq.export.check import check
from ptq.export.commands import add_check, add_convert, run_check, run_convert
from ptq.export.convert import convert
from ptq.export.files import save_tensors
from ptq.export.finding import ERROR, NOTE, WARNING, engine_layers, fused_groups
from ptq.export.index import write_index
from ptq.export.manifest import write_manifest
from ptq.export.marlin import factor, flushed

from .test_export import export

INT4 = replace(INT4_G128, block=32)
LAYER = "model.layers.0"
DOWN = f"{LAYER}.mlp.down_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of each format, made once."""
    folder = tmp_path_factory.mktemp("written")
    for format in (NVFP4, MXFP4, INT4):
        (folder / format.name).mkdir()
        export(folder / format.name, format=format, dtype=torch.bfloat16)
    convert(folder / "nvfp4", folder / "modelopt", "modelopt")
    convert(folder / "int4", folder / "gptq", "gptq")
    return folder


@pytest.fixture
def copy(written, tmp_path):
    return lambda name: shutil.copytree(written / name, tmp_path / name)


def change(folder, name, how):
    """The tensor becomes what `how` makes of it; nothing, where that is None."""
    path = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(path)
    value = how(tensors.pop(name))
    save_tensors(path, tensors if value is None else tensors | {name: value})
    write_index(folder)


def configure(folder, how, file="config.json"):
    content = json.loads((folder / file).read_text())
    how(content.get("quantization_config", content.get("quantization", content)))
    (folder / file).write_text(json.dumps(content))


def place(value, at=0):
    def how(tensor):
        flat = tensor.view(torch.uint8).clone() if tensor.dtype == torch.float8_e4m3fn else tensor.clone()
        flat.view(-1)[at] = value
        return flat.view(tensor.dtype)

    return how


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "int4", "modelopt", "gptq"])
def test_what_ptq_writes_has_no_errors(copy, name):
    found = check(copy(name))
    assert all("tensor parallel" in finding.sentence for finding in found), found


PLANTED = [
    # a tensor, what becomes of it, and the finding: severity, place, words
    ("nvfp4", f"{DOWN}.weight_scale", place(0x7F), ERROR, f"{DOWN}.weight_scale", "1 of 512 scales are not finite"),
    ("nvfp4", f"{DOWN}.weight_scale", place(0xB8), ERROR, f"{DOWN}.weight_scale", "1 scales are negative"),
    ("nvfp4", f"{DOWN}.weight_scale", place(0), NOTE, f"{DOWN}.weight_scale", "1 of 512 scales are zero"),
    ("mxfp4", f"{DOWN}.weight_scale", place(255), ERROR, f"{DOWN}.weight_scale", "1 of 256 scales are not finite"),
    ("int4", f"{DOWN}.weight_scale", place(float("inf")), ERROR, f"{DOWN}.weight_scale", "1 of 256 scales are not finite"),
    ("gptq", f"{DOWN}.scales", place(float("nan")), ERROR, f"{DOWN}.scales", "1 of 256 scales are not finite"),
    ("nvfp4", f"{DOWN}.weight_global_scale", place(0.0), ERROR, f"{DOWN}.weight_global_scale", "it is 0.0, not a positive"),
    ("modelopt", f"{DOWN}.weight_scale_2", lambda t: t * torch.inf, ERROR, f"{DOWN}.weight_scale_2", "it is inf"),
    (
        "nvfp4",
        f"{LAYER}.self_attn.k_proj.weight_global_scale",
        lambda t: t * 2,
        ERROR,
        f"{LAYER}.self_attn.(k_proj, q_proj, v_proj)",
        "weight_global_scale differs by up to 2 times; vLLM keeps the largest",
    ),
    (
        "modelopt",
        f"{LAYER}.mlp.up_proj.weight_scale_2",
        lambda t: t / 4,
        ERROR,
        f"{LAYER}.mlp.(gate_proj, up_proj)",
        "weight_scale_2 differs by up to 4 times",
    ),
    ("nvfp4", f"{DOWN}.weight_global_scale", lambda t: t.reshape(()), ERROR, DOWN, "transformers loads [1] only"),
    ("nvfp4", f"{DOWN}.weight_scale", lambda t: t[:, :-1].contiguous(), ERROR, DOWN, "and its codes call for [64, 8]"),
    ("nvfp4", f"{DOWN}.weight_scale", lambda t: None, ERROR, DOWN, "it has no weight_scale"),
    ("int4", f"{DOWN}.weight_shape", lambda t: None, ERROR, DOWN, "it has no weight_shape"),
    ("nvfp4", f"{DOWN}.weight_packed", lambda t: None, ERROR, f"{DOWN}.weight_scale", "weight_packed is not"),
    (
        "int4",
        f"{DOWN}.weight_scale",
        lambda t: t.to(torch.float8_e4m3fn),
        ERROR,
        DOWN,
        "codes in I32 and scales in F8_E4M3, which",
    ),
    ("gptq", f"{DOWN}.qzeros", lambda t: None, ERROR, DOWN, "it has no qzeros"),
    ("mxfp4", f"{DOWN}.weight_scale", lambda t: t.view(torch.float8_e8m0fnu), ERROR, DOWN, "stored as F8_E8M0"),
]


@pytest.mark.parametrize("name, tensor, how, severity, where, words", PLANTED)
def test_a_planted_tensor_is_found(copy, name, tensor, how, severity, where, words):
    folder = copy(name)
    (folder / "ptq_manifest.json").unlink(missing_ok=True)  # it would find every change
    change(folder, tensor, how)
    assert any(f.severity == severity and f.place == where and words in f.sentence for f in check(folder)), check(folder)


CONFIGURED = [
    ("nvfp4", lambda c: c["ignore"].append("re:.*gone"), WARNING, "config.json", "ignore pattern 're:.*gone' matches nothing"),
    ("modelopt", lambda c: c["ignore"].append("*.gone"), WARNING, "config.json", "ignore pattern '*.gone' matches nothing"),
    ("nvfp4", lambda c: c["ignore"].append(DOWN), ERROR, DOWN, f"it is quantized, and ignored by '{DOWN}'"),
    ("nvfp4", lambda c: c["ignore"].clear(), ERROR, "lm_head", "its weight is not quantized, and the configuration says it is"),
    ("modelopt", lambda c: c.update(quant_algo="NVFP4"), ERROR, DOWN, "activations are quantized and there is no input_scale"),
    (
        "modelopt",
        lambda c: c.update(group_size=32),
        ERROR,
        "hf_quant_config.json",
        "group_size is 32 in config.json and 16 here",
    ),
    ("gptq", lambda c: c.update(checkpoint_format="gptq_v2"), ERROR, "quantize_config.json", "checkpoint_format is 'gptq_v2'"),
]


@pytest.mark.parametrize("name, how, severity, where, words", CONFIGURED)
def test_a_planted_setting_is_found(copy, name, how, severity, where, words):
    folder = copy(name)
    configure(folder, how)
    assert any(f.severity == severity and f.place == where and words in f.sentence for f in check(folder)), check(folder)


def cut(folder):
    path = max(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-8])


def garble(folder):
    max(folder.glob("*.safetensors")).write_bytes(b"\xff" * 40)


def twice(folder):
    shutil.copy(max(folder.glob("*.safetensors")), folder / "left_over.safetensors")


def index(how):
    def damage(folder):
        content = json.loads((folder / "model.safetensors.index.json").read_text())
        how(content)
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return damage


LAST = "model-00003-of-00003.safetensors"
FILES = [
    (cut, ERROR, LAST, "bytes and its header says"),
    (garble, ERROR, LAST, "its header cannot be read"),
    (twice, ERROR, "model.layers.1.mlp.down_proj.weight_scale", f"it is in left_over.safetensors and in {LAST}"),
    (lambda folder: (folder / LAST).unlink(), ERROR, LAST, "the index names it and it is not there"),
    (lambda folder: (folder / "model.safetensors.index.json").unlink(), ERROR, "model.safetensors.index.json", "no index"),
    (index(lambda c: c["weight_map"].update(extra=LAST)), ERROR, "extra", "which does not hold it"),
    (index(lambda c: c["weight_map"].pop("model.norm.weight")), ERROR, "model.norm.weight", "not in the index"),
    (
        index(lambda c: c["weight_map"].update({"model.norm.weight": LAST})),
        ERROR,
        "model.norm.weight",
        f"the index has it in {LAST}, and it is in model-00001-of-00003.safetensors",
    ),
    (index(lambda c: c["metadata"].update(total_size=1)), NOTE, "model.safetensors.index.json", "total_size is 1"),
    (lambda folder: (folder / "tokenizer.json").unlink(), WARNING, "tokenizer.json", "there is no tokenizer"),
    (lambda folder: (folder / "chat_template.jinja").unlink(), NOTE, "chat_template.jinja", "there is no chat template"),
]


@pytest.mark.parametrize("damage, severity, where, words", FILES)
def test_planted_damage_of_files_is_found(copy, damage, severity, where, words):
    folder = copy("nvfp4")
    damage(folder)
    assert any(f.severity == severity and f.place == where and words in f.sentence for f in check(folder)), check(folder)


def test_the_manifest_finds_a_flipped_bit_a_lost_and_a_foreign_tensor(copy):
    folder = copy("nvfp4")
    write_manifest(folder)
    change(folder, f"{DOWN}.weight_packed", place(1, at=7))
    change(folder, "model.norm.weight", lambda t: None)
    path = folder / LAST
    save_tensors(path, load_file(path) | {"foreign": torch.zeros(1)})
    write_index(folder)
    found = {f.place: f.sentence for f in check(folder) if "ptq_manifest.json" in f.sentence}
    assert found.keys() == {f"{DOWN}.weight_packed", "model.norm.weight", "foreign"}
    (folder / "ptq_manifest.json").write_text("{")
    assert any(f.place == "ptq_manifest.json" and f.severity == ERROR for f in check(folder))


def test_two_schemes_in_what_engines_fuse_are_found(copy):
    folder = copy("nvfp4")
    q = f"{LAYER}.self_attn.q_proj"
    for part in ("weight_scale", "weight_global_scale"):
        change(folder, f"{q}.{part}", lambda t: None)
    change(folder, f"{q}.weight_packed", lambda t: None)
    path = folder / "model-00002-of-00003.safetensors"
    save_tensors(path, load_file(path) | {f"{q}.weight": torch.zeros(64, 64, dtype=torch.bfloat16)})
    write_index(folder)
    assert any("nvfp4 in blocks of 16 and 16 bits; vLLM refuses" in f.sentence for f in check(folder))


def test_splits_over_gpus_that_cut_a_block_are_found(copy):
    """4 heads: 2 and 4 GPUs.  128 inputs of down_proj over 4 GPUs are 32 each; o_proj has 64, so 16 each, half a block of 32."""
    found = [f for f in check(copy("mxfp4")) if "tensor parallel" in f.sentence]
    assert [(f.place, f.severity) for f in found] == [(f"{LAYER}.self_attn.o_proj", WARNING)]
    assert (
        "tensor parallel 4 is not possible: 16 of 64 inputs on each is no multiple of 32 (and 1 more linears)"
        in found[0].sentence
    )
    assert not [f for f in check(copy("nvfp4")) if "tensor parallel" in f.sentence]


def test_scales_that_marlin_sets_to_zero_are_counted_over_the_fused_layer(copy):
    """Up's largest scale decides for gate too: beside 448 it is multiplied by 1, and 2^-7 is lost."""
    folder = copy("nvfp4")
    gate, up = (f"{LAYER}.mlp.{name}_proj.weight_scale" for name in ("gate", "up"))
    change(folder, gate, lambda t: torch.full_like(t.float(), 2.0**-5).to(t.dtype))
    change(folder, up, lambda t: torch.full_like(t.float(), 16.0).to(t.dtype))
    assert not [f for f in check(folder) if "Marlin" in f.sentence], "16 is multiplied by 16, and 2^-5 survives"
    change(folder, gate, lambda t: torch.full_like(t.float(), 2.0**-7).to(t.dtype))
    change(folder, up, place(0x7E))  # 448
    found = [f for f in check(folder) if "Marlin" in f.sentence]
    assert len(found) == 1 and found[0].place.startswith(f"{LAYER}.mlp.") and found[0].severity == WARNING
    assert "512 of" in found[0].sentence and "in 1 fused layers" in found[0].sentence and "below 0.015625" in found[0].sentence


@pytest.mark.parametrize("largest, power", [(448.0, 1), (225.0, 1), (224.0, 2), (1.0, 256), (2.0**-9, 2**17)])
def test_marlins_factor_leaves_the_largest_at_448_or_below(largest, power):
    scales = torch.tensor([largest, 0.0])
    assert factor(scales) == power and not flushed(scales).any()
    small = torch.tensor([largest, 2.0**-6 / power, 2.0**-6 / power * 0.99])
    assert flushed(small).tolist() == [False, False, True]
    assert flushed(small, "float16").tolist() == [value < 2.0**-6 for value in small.tolist()], "nothing is multiplied there"


def test_fused_groups_are_per_expert():
    names = [f"layers.0.experts.{e}.{w}" for e in (0, 1) for w in ("w1", "w2", "w3")] + ["layers.0.self_attn.o_proj"]
    groups = set(fused_groups(names))
    assert ("layers.0.experts.1.w1", "layers.0.experts.1.w3") in groups and ("layers.0.self_attn.o_proj",) in groups
    assert len(groups) == 5
    assert len(list(engine_layers(names))) == 3, "all experts' w1 and w3 are one weight, all w2 another"


def test_commands_print_findings_and_say_by_their_status_whether_there_are_errors(copy, tmp_path, capsys):
    folder = copy("nvfp4")
    parser = argparse.ArgumentParser()
    add_convert(parser)
    assert run_convert(parser.parse_args([str(folder), str(tmp_path / "out"), "--layout", "modelopt"])) == 0
    assert "14 nvfp4 linears, compressed-tensors to modelopt" in capsys.readouterr().out
    parser = argparse.ArgumentParser()
    add_check(parser)
    assert run_check(parser.parse_args([str(tmp_path / "out")])) == 0 and "0 errors and warnings" in capsys.readouterr().out
    change(folder, f"{DOWN}.weight_scale", place(0x7F))
    assert run_check(parser.parse_args([str(folder)])) == 1 and "    quantize it again" in capsys.readouterr().out
    assert run_check(parser.parse_args([str(folder), "--json"])) == 1
    assert json.loads(capsys.readouterr().out)[0]["severity"] == ERROR


def test_int4_scales_may_be_negative(copy):
    folder = copy("gptq")
    (folder / "ptq_manifest.json").unlink()
    change(folder, f"{DOWN}.scales", lambda t: -t)
    assert all("tensor parallel" in finding.sentence for finding in check(folder))


def test_linears_in_eight_bits_beside_are_left_alone(copy):
    """FP8 in a mixed checkpoint: its weight, its weight_scale and its inputs are no findings."""
    folder = copy("nvfp4")
    configure(folder, lambda c: c["config_groups"]["group_0"].update(targets=["re:.*(self_attn|gate|up|layers.1)"]))
    eight = {"targets": [DOWN], "weights": {"num_bits": 8}, "input_activations": {"num_bits": 8}}
    configure(folder, lambda c: c["config_groups"].update(group_1=eight))
    change(folder, f"{DOWN}.weight_packed", lambda t: None)
    change(folder, f"{DOWN}.weight_global_scale", lambda t: None)
    path = folder / "model-00002-of-00003.safetensors"
    save_tensors(path, load_file(path) | {f"{DOWN}.weight": torch.zeros(64, 128).to(torch.float8_e4m3fn)})
    write_index(folder)
    assert not check(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: name a checkpoint's folder"):
        check(tmp_path)
