import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from ptq.eval.checkpoint import load_any
from ptq.models.adapter import ModelAdapter
from ptq.models.families import FAMILIES
from ptq.models.loading import load_model, open_model

from .tiny import save_tiny, tiny_model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_replaying_the_layers_gives_the_models_logits(family, dtype):
    model, tokens, seen = tiny_model(family, dtype), torch.randint(0, 64, (3, 50)), []
    note = model.get_output_embeddings().register_forward_hook(lambda _head, _x, y: seen.append(y))
    expected = model(tokens).logits
    note.remove()
    adapter = ModelAdapter(model)
    hidden = adapter.embed(tokens)
    names = []
    for layer in adapter.layers():
        hidden = adapter.forward(layer, hidden)
        names.append(layer.name)
        for group in adapter.plan(layer).groups:
            assert len({layer.linear(name).in_features for name in group}) == 1
    assert names == ["model.layers.0", "model.layers.1"]
    assert torch.equal(adapter.logits(hidden), expected)
    assert torch.equal(adapter.forward(adapter.head(), hidden), seen[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_hold_every_linear_of_a_layer_once_but_those_to_keep(family):
    adapter = ModelAdapter(tiny_model(family))
    for layer in adapter.layers():
        linears = {name for name, module in layer.module.named_modules() if isinstance(module, torch.nn.Linear)}
        plan = adapter.plan(layer)
        grouped = [name for group in plan.groups for name in group]
        assert set(grouped) == linears - set(plan.keep) and len(grouped) == len(set(grouped))
        assert all(any(set(fused) <= set(group) for group in plan.groups) for fused in plan.fused)
        assert set(plan.residual) <= set(grouped) and plan.output in (None, "mlp.down_proj", "feed_forward.down_proj")
        experts = {name for name in grouped if ".experts." in name}
        assert plan.experts == experts and plan.share == (0.5 if experts else 1.0)
        assert {name for names in plan.fused for name in names if "experts" in name} == {
            name for name in experts if not name.endswith(("down_proj", "w2"))
        }
    if adapter.has_experts:
        assert plan.keep[0].endswith((".gate", ".router")) and len(experts) == 12


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_is_the_one_in_memory(tmp_path, family):
    """Layers, buffers that no file holds, and names that files have otherwise."""
    model, tokens = save_tiny(tmp_path, family, torch.bfloat16), torch.randint(0, 64, (2, 40))
    expected = model(tokens).logits
    adapter, _, _ = open_model(str(tmp_path))
    hidden = adapter.embed(tokens)
    for layer in adapter.layers():
        hidden = adapter.forward(layer, hidden)
    assert torch.equal(adapter.logits(hidden), expected)
    assert all(parameter.is_meta for layer in adapter.skeleton() for parameter in layer.module.parameters())


@torch.no_grad()
def test_eager_attention_and_a_sliding_window_are_the_models_own():
    """Longer than the window; and eager attention has no causal mask but the one it is given."""
    tokens = torch.randint(0, 64, (3, 50))
    for implementation in ("eager", "sdpa"):
        model = tiny_model("mistral", sliding_window=16, attn_implementation=implementation)
        adapter = ModelAdapter(model)
        hidden = adapter.embed(tokens)
        for layer in adapter.layers():
            hidden = adapter.forward(layer, hidden)
        assert torch.equal(adapter.logits(hidden), model(tokens).logits)
        hidden = adapter.embed(tokens[:1, :30])  # another number of sequences, another length
        for layer in adapter.layers():
            hidden = adapter.forward(layer, hidden)
        assert torch.equal(adapter.logits(hidden), model(tokens[:1, :30]).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_evaluations_run_the_attention_that_the_family_needs(tmp_path, family):
    model, tokens = save_tiny(tmp_path, family), torch.randint(0, 64, (2, 40))
    assert torch.equal(load_any(str(tmp_path)).model(tokens).logits, model(tokens).logits)


def test_unsupported_types_list_the_supported_ones(tmp_path):
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=2, n_layer=1, vocab_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' is not supported; supported are llama, smollm3, mistral"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_folder_is_loaded_as_stored(tmp_path, dtype):
    saved = save_tiny(tmp_path, dtype=dtype)
    model, tokenizer = load_model(str(tmp_path))
    assert model.dtype == dtype and not model.training and tokenizer("a c")["input_ids"] == [2, 4]
    for ours, theirs in zip(model.parameters(), saved.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "source, message",
    [
        ("/nowhere/model", "/nowhere/model: no such folder"),
        ("missing.gguf", "missing.gguf: no such GGUF file"),
        ("{tmp}", "holds no config.json"),
    ],
)
def test_sources_that_are_not_there_are_named(tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        load_model(source.format(tmp=tmp_path))


@pytest.mark.parametrize("load", [load_model, open_model])
@pytest.mark.parametrize(
    "stored, changed, name, count",
    [
        ({"attention_bias": True}, {"attention_bias": False}, "self_attn.k_proj.bias", 8),
        ({"num_hidden_layers": 3}, {"num_hidden_layers": 2}, "layers.2.input_layernorm.weight", 9),
    ],
    ids=["biases", "layers"],
)
def test_tensors_that_the_config_leaves_no_place_for_are_refused(tmp_path, load, stored, changed, name, count):
    save_tiny(tmp_path, **stored)
    config = json.loads((tmp_path / "config.json").read_text()) | changed
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"it holds model.*{name} \({count} such tensors\).*config disagrees"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, open_model])
def test_buffers_of_older_releases_are_left_aside(tmp_path, load):
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    tensors["something.else"] = torch.ones(8)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, open_model])
def test_a_missing_tensor_is_named(tmp_path, load):
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"it lacks model.layers.1.mlp.up_proj.weight \(1 tensors in all\)"):
        load(str(tmp_path))


@pytest.mark.parametrize("load", [load_model, open_model])
def test_gpt_oss_as_released_is_refused(tmp_path, load):
    save_tiny(tmp_path, "gpt_oss")
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized already \(mxfp4\); give the original, or .* dequantize it first"):
        load(str(tmp_path))


def test_experts_that_are_given_all_tokens_are_refused():
    model = tiny_model("llama4_text", moe_layers=[1], num_local_experts=2)
    with pytest.raises(ValueError, match=r"layers.1.feed_forward.experts: of model type 'llama4_text' only dense layers"):
        ModelAdapter(model)


def test_a_folder_without_weights_or_tokenizer_is_refused(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer that loads"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="cannot be loaded: it holds no weights"):
        load_model(str(tmp_path))
