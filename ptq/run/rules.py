"""From settings and what a caller adds to them to the rules of a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptq.run.plan import named_format
from ptq.run.recipe import Recipe, Rules, as_rules
from ptq.run.recipe_file import read_recipe
from ptq.run.settings import base_recipe
from ptq.settings import Settings

GivenRules = Sequence[tuple[str, Recipe | str | None]]
"""(pattern, recipe) as ptq.run.recipe.Rules; a format's name stands for the settings' recipe in that format."""


def file_rules(settings: Settings) -> Rules:
    return read_recipe(Path(settings.recipe)) if settings.recipe else []


def all_rules(settings: Settings, of_file: Rules, rules: GivenRules) -> Rules:
    """The settings' own recipe for every linear, or the rules of their file, then what `rules` say, then what is to be ignored."""
    settings = settings.complete()
    base = base_recipe(settings)
    if settings.token_importance == "none" and any(recipe and recipe.row_feedback for _, recipe in of_file):
        raise ValueError("a rule has row feedback, which needs --token-importance text or sampled")
    of_format = {name: named_format(name, settings.block) for _, name in rules if isinstance(name, str)}
    named = [(pattern, replace(base, format=of_format[how]) if isinstance(how, str) else how) for pattern, how in rules]
    return as_rules([*(of_file or [("re:.*", base)]), *named], settings.ignore)


def described(rules: GivenRules) -> list[str]:
    return [f"{pattern}: {how or 'left alone'}" for pattern, how in rules]
