"""Checkpoints read back by the real peers: transformers with compressed-tensors."""

import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from ptq.config import QuantConfig
from ptq.export import ReadBackError, check_output, checkpoint_tensors, staged, verify, write_checkpoint
from ptq.formats import INT4_G128, MXFP4, NVFP4
from ptq.models.llama import FAMILIES, LlamaAdapter
from ptq.packing import pack_int32
from ptq.plan import make_plan
from ptq.runner import quantize_model

from .tiny import tiny_model, tiny_tokenizer

INT4 = replace(INT4_G128, block=32)
FORMATS = [NVFP4, MXFP4, INT4]
TOKENS = torch.randint(0, 64, (6, 64), generator=torch.Generator().manual_seed(4))


def export(folder, family="llama", dtype=torch.float32, format=NVFP4, ignore=(), **changes):
    model = tiny_model(family, dtype, **changes)
    model.generation_config = GenerationConfig(max_new_tokens=7)
    config = QuantConfig(format, "gptq", "mse", ignore=ignore)
    adapter = LlamaAdapter(model)
    ignored = make_plan(adapter, config).ignored
    packed = {}
    for record, quantized in quantize_model(adapter, TOKENS.split(3), config):
        packed |= checkpoint_tensors(record.name, quantized)
    write_checkpoint(folder, model, tiny_tokenizer(), packed, format, ignored)
    return model


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_it_back_bit_for_bit(tmp_path, family, format):
    assert verify(tmp_path, export(tmp_path, family, format=format), TOKENS) == 0


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"attention_bias": True}, {"ignore": ("re:.*mlp.down_proj",)}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variants_read_back_bit_for_bit(tmp_path, dtype, changes):
    assert verify(tmp_path, export(tmp_path, dtype=dtype, **changes), TOKENS) == 0


def test_dense_tensors_of_a_bfloat16_model_are_bit_identical(tmp_path):
    original = tiny_model(dtype=torch.bfloat16).state_dict()
    export(tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    dense = [name for name in original if name in stored]
    assert len(dense) == 7 and all(torch.equal(stored[name], original[name]) for name in dense)


def test_tensors_have_the_layout_the_readers_expect(tmp_path):
    export(tmp_path)
    stored, name = load_file(tmp_path / "model.safetensors"), "model.layers.0.mlp.down_proj"
    layout = {key.removeprefix(f"{name}."): (t.dtype, tuple(t.shape)) for key, t in stored.items() if key.startswith(name)}
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


def test_shards_read_back(tmp_path, monkeypatch):
    import ptq.export

    save = ptq.export.save_torch_state_dict
    monkeypatch.setattr(ptq.export, "save_torch_state_dict", lambda *a, **k: save(*a, **(k | {"max_shard_size": "20KB"})))
    model = export(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2 and (tmp_path / "model.safetensors.index.json").exists()
    assert verify(tmp_path, model, TOKENS) == 0


def test_the_checkpoint_generates(tmp_path):
    export(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16 and model.generate(TOKENS[:1, :5], do_sample=False).shape == (1, 12)


def test_verify_sees_a_changed_scale_and_a_missing_tensor(tmp_path):
    from safetensors.torch import save_file

    model = export(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.mlp.down_proj.weight_global_scale"] *= 2
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert verify(tmp_path, model, TOKENS) > 0
    del stored["model.layers.0.mlp.down_proj.weight_scale"]
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ReadBackError, match="does not read back: missing_keys"):
        verify(tmp_path, model, TOKENS)


def test_an_existing_output_is_refused_and_kept(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ValueError, match="exists already"):
        check_output(tmp_path, 0)
    with pytest.raises(OSError), staged(tmp_path) as folder:
        (folder / "a").write_text("y")
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"needs about 1000000\.00 GB"):
        check_output(tmp_path / "new", 10**15)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="not a folder one may write to"):
        check_output(tmp_path / "a" / "b", 0)


def test_a_failure_while_writing_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "deep" / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError("stop")
    assert list((tmp_path / "deep").iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small disk needs root")
def test_a_full_disk_leaves_nothing(tmp_path):
    """A real file system of 64 kB fills up while the checkpoint is written."""
    import subprocess

    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(Exception, match="No space left"), staged(disk / "out") as folder:
            export(folder)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
