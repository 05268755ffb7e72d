"""The output head, which a rule with its name quantizes, as one more layer."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import ptq
from ptq.export.check import check
from ptq.models.headers import from_headers
from ptq.models.loading import open_model
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe
from ptq.run.resume import unfinished_folder

from .conftest import disk_full_at
from .test_unfinished import contents
from .tiny import save_tiny, tiny_tokenizer

TOKENS = torch.randint(0, 64, (12, 32), generator=torch.Generator().manual_seed(7))
W4A4 = """
- {linears: re:.*, activations: nvfp4, rule: mse}
- {linears: lm_head, format: fp8, activations: fp8-token}
"""


def quantize(model, **settings) -> ptq.Result:
    """By the rule whose search takes least."""
    given = {"calibration": TOKENS, "sequences": 8, "length": 32, "validation": 2, "device": "cpu", "progress": False}
    given |= {} if "recipe" in settings else {"rule": "mse"}
    return ptq.quantize(model, **given | settings)


def lm_head(result: ptq.Result) -> dict:
    return next(linear for linear in result.report.linears if linear["name"] == "lm_head")


def shards(result: ptq.Result) -> dict[str, bytes]:
    return {name: data for name, data in contents(result.folder).items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4", "fp8"])
def test_reads_back_as_written(tmp_path, format, tied):
    """In transformers bit for bit, which `quantize` proves; embeddings stay in bfloat16, also where they were the head's too."""
    model = save_tiny(tmp_path / "model", dtype=torch.bfloat16, tie_word_embeddings=tied)
    result = quantize(tmp_path / "model", rules=[("lm_head", format)])
    found = {name: tensor for path in result.folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert torch.equal(found["model.embed_tokens.weight"], model.get_input_embeddings().weight)
    assert "lm_head.weight_scale" in found and found.get("lm_head.weight", found["lm_head.weight_scale"]).dtype.itemsize == 1
    assert json.loads((result.folder / "config.json").read_text())["tie_word_embeddings"] is False
    assert lm_head(result)["error"] < lm_head(result)["rtn_error"] and 0 < lm_head(result)["validation_error"] < 1
    assert not check(result.folder)
    loaded = AutoModelForCausalLM.from_pretrained(result.folder, dtype="bfloat16")
    assert loaded(TOKENS[:1]).logits.isfinite().all()


def test_of_a_model_in_memory_the_same_and_the_model_is_not_changed(tmp_path):
    model = save_tiny(tmp_path / "model", tie_word_embeddings=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = {"rules": [("lm_head", "nvfp4")], "effort": "best"}
    from_disk = quantize(tmp_path / "model", **given)
    from_memory = quantize(model, tokenizer=tiny_tokenizer(), **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight
    assert shards(from_disk) == shards(from_memory)


@pytest.mark.parametrize("index", [1, 2])
def test_a_run_that_stopped_before_it_goes_on_to_the_same_bytes(tmp_path, index):
    """When the layer of that number, the head being 2, is to be written."""
    save_tiny(tmp_path / "model", tie_word_embeddings=True)
    given = {"model": tmp_path / "model", "rules": [("lm_head", "nvfp4")]}
    whole = quantize(**given, output=tmp_path / "whole")
    with disk_full_at(index), pytest.raises(OSError):
        quantize(**given, output=tmp_path / "out")
    assert len(list((unfinished_folder(tmp_path / "out") / "layers").iterdir())) == index
    again = quantize(**given, output=tmp_path / "out", resume=True)
    assert shards(again) == shards(whole)


def test_a_recipe_file_gives_it_inputs_of_its_own(tmp_path):
    save_tiny(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(W4A4)
    result = quantize(tmp_path / "model", recipe=str(tmp_path / "recipe.yaml"))
    groups = json.loads((result.folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["input_activations"]["num_bits"] for group in groups.values()] == [4, 8]
    assert groups["group_1"]["targets"] == ["lm_head"]


@pytest.mark.parametrize(
    "pattern, recipe, said",
    [
        ("lm_head", Recipe(row_feedback=True), "lm_head has too many rows to feed errors forward over them"),
        ("re:.*lm_head|nothing", Recipe(), None),
        ("re:lm_", Recipe(), "rule 're:lm_' is for lm_head alone, which only a rule with its name in it is for"),
    ],
)
def test_which_rules_are_for_it(tmp_path, pattern, recipe, said):
    save_tiny(tmp_path)
    adapter, _, _ = open_model(str(tmp_path))
    rules = [("re:.*", Recipe()), (pattern, recipe)]
    if said:
        with pytest.raises(ValueError, match=re.escape(said)):
            make_plan(adapter, rules)
    else:
        assert "lm_head" in make_plan(adapter, rules).linears
    assert "lm_head" not in make_plan(adapter, rules[:1]).linears


@pytest.mark.parametrize("tied", [False, True])
def test_a_plan_from_headers_counts_it(tmp_path, tied):
    save_tiny(tmp_path, tie_word_embeddings=tied)
    adapter, _, _ = open_model(str(tmp_path))
    seen = from_headers(str(tmp_path))
    assert seen
    rules = [("re:.*", Recipe()), ("lm_head", Recipe())]
    plan = make_plan(adapter, rules)
    assert make_plan(seen, rules) == plan and plan.untied == (64 * 64 if tied else 0)
    # two layers' norms, the last one, and the embeddings stay in 16 bits
    assert plan.checkpoint_bytes(adapter.parameters()) == 2 * (5 * 64 + 64 * 64) + plan.weights * 4.5 / 8
