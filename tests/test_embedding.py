"""Embeddings in few bits, where a rule has their name."""

import json
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ptq.core.activations import FP8_TOKEN_INPUT
from ptq.core.formats import FP8_ROWS
from ptq.cost.preview import make_preview
from ptq.export.check import check
from ptq.methods.rtn import quantize as round_to_nearest
from ptq.models.adapter import ModelAdapter
from ptq.models.headers import from_headers
from ptq.models.loading import open_model
from ptq.run.loop import Calibration, quantize_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.resume import unfinished_folder

from .conftest import disk_full_at
from .test_head import quantize, shards
from .tiny import TEXT, save_tiny, tiny_tokenizer

NAME = "model.embed_tokens"
TOKENS = torch.arange(64)[None]
FP8 = Recipe(FP8_ROWS, "rtn", "mse")


def rows_in_transformers(folder) -> torch.Tensor:
    """Of all tokens, as transformers runs them."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert loaded(TOKENS).logits.isfinite().all()
    return loaded.get_input_embeddings()(TOKENS)[0]


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return round_to_nearest(weight, FP8_ROWS, rule="mse").dequantize().to(torch.bfloat16)


@pytest.mark.parametrize("tied, head", [(False, "bfloat16"), (True, "bfloat16"), (True, "nvfp4")])
def test_reads_back_as_written(tmp_path, tied, head):
    """Row by row in transformers; the head keeps the original's weights, also where both had them, or has its own rule."""
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=tied)
    rules = [("embed_tokens", "fp8"), *([("lm_head", head)] if head != "bfloat16" else [])]
    result = quantize(tmp_path / "model", rules=rules)
    assert torch.equal(rows_in_transformers(result.folder), rounded(model.get_input_embeddings().weight))
    found = {name: tensor for path in result.folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found[f"{NAME}.weight"].dtype == torch.float8_e4m3fn and found[f"{NAME}.weight_scale"].shape == (64, 1)
    if head == "bfloat16":
        assert torch.equal(found["lm_head.weight"], model.get_output_embeddings().weight)
    else:
        assert "lm_head.weight_packed" in found
    config = json.loads((result.folder / "config.json").read_text())
    targets = [group["targets"] for group in config["quantization_config"]["config_groups"].values()]
    assert [NAME] in targets and not config["tie_word_embeddings"]
    about = result.report.linears[0]
    assert (about["name"], about["method"], about["rule"], tuple(about["shape"])) == (NAME, "rtn", "mse", (64, 64))
    assert 0 < about["error"] < about["rtn_error"] < 0.05 and 0 < about["validation_error"] < 0.05
    (finding,) = check(result.folder)
    assert finding.place == NAME and "vLLM 0.26.0 does not" in finding.sentence


def test_of_a_mixture_too_which_compressed_tensors_reads(tmp_path):
    """`quantize` compares logits with those of the file that was read back."""
    save_tiny(tmp_path / "model", "qwen3_moe", dtype=torch.bfloat16)
    assert quantize(tmp_path / "model", rules=[("embed_tokens", "fp8")]).report.linears[0]["name"] == NAME


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_not_where_they_are_scaled(tmp_path, family):
    save_tiny(tmp_path, family)
    for skeleton in (open_model(str(tmp_path))[0], from_headers(str(tmp_path))):
        with pytest.raises(ValueError, match=r"model\.embed_tokens scales its rows"):
            make_plan(skeleton, [("re:.*", Recipe()), ("embed_tokens", FP8)])


def test_a_recipe_for_them_alone_in_the_format_of_all(tmp_path):
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "recipe.yaml").write_text(
        "- {linears: re:.*, format: fp8, method: rtn}\n- {linears: re:.*embed_tokens, format: fp8, rule: absmax}\n"
    )
    result = quantize(tmp_path / "model", recipe=str(tmp_path / "recipe.yaml"))
    groups = json.loads((result.folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["Linear", NAME]]
    assert result.report.linears[0]["rule"] == "absmax" and result.report.linears[0]["moved_scales"] == 0


def test_layers_are_calibrated_on_the_rounded_rows_and_drift_on_the_original_ones(tmp_path):
    """Without drift the layers are those of a model that has the rounded rows from the start; with it they are not."""
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer()
    of_rounded = save_tiny(tmp_path / "rounded", dtype=torch.bfloat16)
    of_rounded.get_input_embeddings().weight.data.copy_(rounded(model.get_input_embeddings().weight))
    for drift in ("none", "full"):
        given = {"tokenizer": tokenizer, "drift": drift, "token_importance": "none", "row_feedback": False}
        ours = shards(quantize(model, rules=[("embed_tokens", "fp8")], **given))
        theirs = shards(quantize(of_rounded, **given))
        same = [ours[name] == theirs[name] for name in sorted(ours)]
        assert same == [False, drift == "none", drift == "none"]


def test_in_place_and_from_disk_the_same(tmp_path):
    """Of tied embeddings the head keeps the original's rows."""
    model = save_tiny(tmp_path, tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.detach().clone()
    streamed, _, _ = open_model(str(tmp_path))
    rules = [("re:.*", Recipe(method="rtn", rule="mse")), ("embed_tokens", Recipe(FP8_ROWS, rule="mse", row_feedback=True))]
    calibration = Calibration([], validation=TOKENS[:, :8])
    found = [next(quantize_model(adapter, rules, calibration)) for adapter in (ModelAdapter(model), streamed)]
    (ours, weight), (theirs, other) = found
    assert replace(ours, seconds=0) == replace(theirs, seconds=0) and torch.equal(weight.codes, other.codes)
    assert torch.equal(model.get_input_embeddings().weight, weight.dequantize())
    assert torch.equal(model.get_output_embeddings().weight, before)


def test_a_run_that_stopped_goes_on_to_the_same_bytes(tmp_path):
    """When the embeddings and a layer have been written."""
    save_tiny(tmp_path / "model", tie_word_embeddings=True)
    given = {"model": tmp_path / "model", "rules": [("embed_tokens", "fp8")]}
    whole = quantize(**given, output=tmp_path / "whole")
    with disk_full_at(1), pytest.raises(OSError):
        quantize(**given, output=tmp_path / "out")
    assert len(list((unfinished_folder(tmp_path / "out") / "layers").iterdir())) == 2
    again = quantize(**given, output=tmp_path / "out", resume=True)
    assert shards(again) == shards(whole)
    assert [one["name"] for one in again.report.linears] == [one["name"] for one in whole.report.linears]


@pytest.mark.parametrize(
    "pattern, recipe, said",
    [
        ("embed_tokens", Recipe(), "model.embed_tokens is to be nvfp4, and transformers 5.23 loads no packed embeddings"),
        ("embed_tokens", replace(FP8, activation=FP8_TOKEN_INPUT), "leave activations out of its rule"),
        ("re:model.embed", FP8, "rule 're:model.embed' is for model.embed_tokens alone"),
        ("re:.*embed_tokens|nothing", FP8, None),
        (NAME, FP8, None),
    ],
)
def test_which_rules_are_for_them(tmp_path, pattern, recipe, said):
    save_tiny(tmp_path)
    adapter, _, _ = open_model(str(tmp_path))
    rules = [("re:.*", Recipe()), (pattern, recipe)]
    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            make_plan(adapter, rules)
    else:
        assert make_plan(adapter, rules).recipes[NAME] == FP8
    assert NAME not in make_plan(adapter, [*rules[:1], ("embed_tokens", None)]).linears


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_from_headers_counts_them(tmp_path, tied):
    save_tiny(tmp_path, tie_word_embeddings=tied)
    adapter, _, _ = open_model(str(tmp_path))
    seen = from_headers(str(tmp_path))
    assert seen
    rules = [("re:.*", Recipe()), ("embed_tokens", FP8)]
    plan = make_plan(adapter, rules)
    assert make_plan(seen, rules) == plan and plan.first == -1 and plan.untied == (64 * 64 if tied else 0)
    # two layers' norms, the last one, and the head stay in 16 bits
    others = plan.weights - 64 * 64
    assert plan.checkpoint_bytes(adapter.parameters()) == 2 * (5 * 64 + 64 * 64) + 64 * 64 + others * 4.5 / 8
    preview = make_preview(seen, rules, 64, 128, "none", batch=None, on_host=None, ranks=1, output=tmp_path)
    assert f"fp8 and nvfp4: {(8 * 64 * 64 + 4.5 * others) / plan.weights:g} bits a weight" in preview.text()


def test_the_card_and_the_baseline_know_of_them(tmp_path):
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT[:200])
    given = {"activations": "nvfp4", "method": "rtn", "evaluate": str(tmp_path / "text.txt")}
    result = quantize(tmp_path / "model", rules=[("embed_tokens", "fp8")], **given)
    card = (result.folder / "README.md").read_text()
    assert "Norms and the output head are bfloat16." in card and "vllm serve" not in card
    assert result.report.scores["rtn"]["kl"] > 0
