"""Recipes in YAML: what to do to each linear, as an ordered list of rules.

    - linears: re:.*                      # a full name, or re: and a regular expression
      format: nvfp4
      activations: nvfp4
      effort: default
    - linears: re:.*self_attn
      format: fp8
      activations: fp8-token
    - linears: re:.*layers\\.0\\.mlp
      keep: true                          # bfloat16

Of the rules that match a linear the last one holds; a linear that none matches is kept, and lm_head and embed_tokens where none
with their name does.  With `target_bits: 5.0` one rule may leave a choice between its format, fp8 and bfloat16 (ptq.run.allocate).
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ptq.core.activations import FP8_TOKEN_INPUT, get_activation
from ptq.core.formats import FP8_ROWS
from ptq.run.plan import named_format
from ptq.run.recipe import Choice, OpenRules, Recipe, Rules
from ptq.settings import DRIFTS, EFFORTS, RTN, settings_of_effort, usual_ridge

LARGEST_FILE = 2**16
# Key -> the type of its value.
KEYS: dict[str, type | tuple[type, ...]] = {
    "linears": str,
    "keep": bool,
    "format": str,
    "block": int,
    "activations": str,
    "method": str,
    "effort": str,
    "rule": str,
    "damp": (int, float),
    "drift": str,
    "ridge": (int, float),
    "row_feedback": bool,
    "smooth": bool,
    "target_bits": (int, float),
}


def read_recipe(path: Path) -> OpenRules:
    """The rules of a YAML file.  Raises ValueError, naming file and rule, for what is not one or does not fit together."""
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"recipe {path} has {path.stat().st_size} bytes; a recipe has at most {LARGEST_FILE}")
    return parse_recipe(path.read_bytes(), str(path))


def parse_recipe(text: str | bytes, source: str) -> OpenRules:
    """The rules in YAML; raises as `read_recipe`, naming `source`."""
    try:
        found = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {source} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, list) or not found:
        raise ValueError(f"recipe {source} is no list of rules; a rule begins with '- linears: PATTERN'")
    rules = []
    for number, rule in enumerate(found, 1):
        try:
            rules.append(parse_rule(rule))
        except ValueError as error:
            raise ValueError(f"recipe {source}, rule {number}: {error}") from None
    return rules


def recipe_text(rules: Rules) -> str:
    """The rules in YAML, as `read_recipe` reads them.  Raises ValueError for what a file does not tell of: frozen scales."""
    return yaml.safe_dump([{"linears": pattern} | written(recipe) for pattern, recipe in rules], sort_keys=False, width=1000)


def written(recipe: Recipe | None) -> dict[str, Any]:
    if recipe is None:
        return {"keep": True}
    if recipe.frozen:
        raise ValueError("a recipe file has no word for frozen scales")
    kept = {"drift": recipe.drift} | ({"stagewise": recipe.stagewise} if recipe.drift else {})
    drift = next((name for name, fields in DRIFTS.items() if kept == fields), None)
    if drift is None:
        raise ValueError(f"a recipe file has no word for drift {recipe.drift:g}; there are {', '.join(DRIFTS)}")
    return {
        "format": recipe.format.name,
        **({"block": recipe.format.block} if recipe.format.scheme == "pack-quantized" else {}),
        **({"activations": recipe.activation.name} if recipe.activation else {}),
        **{name: getattr(recipe, name) for name in ("method", "rule", "damp")},
        **{"drift": drift, "ridge": recipe.ridge, "row_feedback": recipe.row_feedback},
        **({"smooth": recipe.smooth} if recipe.activation else {}),
    }


def parse_rule(rule: Any) -> tuple[str, Recipe | Choice | None]:
    """(pattern, what to do; None to keep) of one rule.  Raises ValueError as `read_recipe`."""
    if not isinstance(rule, dict) or "linears" not in rule:
        raise ValueError(f"{rule!r} does not say which linears it is for; write linears: PATTERN")
    unknown = [str(key) for key in rule if key not in KEYS]
    if unknown:
        raise ValueError(f"unknown key {', '.join(unknown)}; there are {', '.join(KEYS)}")
    for key, value in rule.items():
        if not isinstance(value, KEYS[key]) or (isinstance(value, bool) and KEYS[key] is not bool):
            raise ValueError(f"{key}: {value!r} is of the wrong type")
    if rule.get("keep"):
        more = set(rule) - {"linears", "keep"}
        if more:
            raise ValueError(f"keep leaves the linears as they are; {', '.join(sorted(more))} say what to do to them")
        return rule["linears"], None
    recipe = recipe_from(rule)
    return rule["linears"], choice_of(recipe, rule["target_bits"]) if "target_bits" in rule else recipe


def choice_of(recipe: Recipe, bits: float) -> Choice:
    """This recipe, the same in FP8, or bfloat16.  Raises ValueError as `Choice`."""
    inputs = FP8_TOKEN_INPUT if recipe.activation else None
    return Choice(
        (recipe, replace(recipe, format=FP8_ROWS, rule="mse", activation=inputs, frozen=False, smooth=False), None), bits
    )


def recipe_from(rule: Mapping[str, Any]) -> Recipe:
    """What keys left out say: format nvfp4, method gptq, and of gptq effort default; of a format with one scale a row, rule mse."""
    for key, names in (("effort", EFFORTS), ("drift", DRIFTS)):
        if key in rule and rule[key] not in names:
            raise ValueError(f"unknown {key} {rule[key]!r}; there are {', '.join(names)}")
    format, method = named_format(rule.get("format", "nvfp4"), rule.get("block")), rule.get("method", "gptq")
    if "effort" in rule and method != "gptq":
        raise ValueError(f"effort is of method gptq, not {method}")
    activations = rule.get("activations", "none")
    usual = settings_of_effort(rule.get("effort", "default"), activations) if method == "gptq" else RTN
    rule_name = rule.get("rule", usual["rule"] if format.block else "mse")
    return Recipe(
        format,
        method,
        rule_name,
        rule.get("damp", 0.01),
        activation=get_activation(activations),
        ridge=rule.get("ridge", usual_ridge(activations)),
        row_feedback=rule.get("row_feedback", usual.get("row_feedback", False)),
        smooth=rule.get("smooth", usual["smooth"]),
        **DRIFTS[rule.get("drift", usual["drift"])],
    )
