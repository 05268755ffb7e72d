"""Recipes in YAML."""

import pytest

from ptq.core.activations import FP8_TOKEN_INPUT, NVFP4_INPUT
from ptq.core.formats import FP8_ROWS, NVFP4
from ptq.models.adapter import ModelAdapter
from ptq.run.plan import make_plan
from ptq.run.recipe import Recipe, recipe_of
from ptq.run.recipe_file import LARGEST_FILE, read_recipe
from ptq.settings import DRIFTS, NOISY_RIDGE

from .tiny import tiny_model

MIXED = r"""
- linears: re:.*
  activations: nvfp4
- linears: re:.*self_attn
  format: fp8
  activations: fp8-token
  drift: none
- linears: re:.*layers\.1\.mlp\.down_proj   # bfloat16
  keep: true
"""


def read(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


def test_rules_come_in_order_and_the_last_one_holds(tmp_path):
    rules = read(tmp_path, MIXED)
    assert recipe_of("model.layers.0.mlp.up_proj", rules) == Recipe(
        NVFP4, rule="joint", **DRIFTS["full"], activation=NVFP4_INPUT, ridge=NOISY_RIDGE, smooth=True
    )
    assert recipe_of("model.layers.1.self_attn.q_proj", rules) == Recipe(FP8_ROWS, rule="mse", activation=FP8_TOKEN_INPUT)
    assert recipe_of("model.layers.1.mlp.down_proj", rules) is None
    plan = make_plan(ModelAdapter(tiny_model()), rules)
    assert plan.ignored == ("model.layers.1.mlp.down_proj",) and plan.activations


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "is no YAML"),
        ("", "is no list of rules"),
        ("linears: x", "is no list of rules"),
        ("- format: fp8", "rule 1: {'format': 'fp8'} does not say which linears"),
        ("- {linears: x, formt: fp8, 7: 8}", "rule 1: unknown key formt, 7; there are linears, keep, format"),
        ("- {linears: x, damp: big}", "rule 1: damp: 'big' is of the wrong type"),
        ("- {linears: x, damp: true}", "damp: True is of the wrong type"),
        ("- linears: x\n- {linears: y, format: int3}", "rule 2: unknown format 'int3'"),
        ("- {linears: x, activations: int8}", "unknown activations 'int8'"),
        ("- {linears: x, effort: huge}", "unknown effort 'huge'; there are fast, default, best"),
        ("- {linears: x, method: rtn, effort: best}", "effort is of method gptq, not rtn"),
        ("- {linears: x, keep: true, format: fp8}", "keep leaves the linears as they are; format say what to do"),
        ("- {linears: x, format: fp8, rule: joint}", "fp8 has one scale a row; take absmax or mse"),
        ("- {linears: x, format: mxfp4, activations: nvfp4}", "no engine runs mxfp4 weights on activations in nvfp4"),
        ("- !!python/object/apply:os.system ['true']", "is no YAML"),
        ("# " + "x" * LARGEST_FILE, "a recipe has at most 65536"),
    ],
)
def test_what_is_no_recipe_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=r"recipe .*recipe\.yaml") as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
