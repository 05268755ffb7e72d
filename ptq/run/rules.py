"""From settings and what a caller adds to them to the rules of a run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ptq.run.plan import named_format
from ptq.run.recipe import Choice, OpenRules, Recipe, settled
from ptq.run.recipe_file import choice_of, read_recipe
from ptq.run.settings import base_recipe
from ptq.settings import Settings

GivenRules = Sequence[tuple[str, Recipe | Choice | str | None]]
"""(pattern, recipe) as ptq.run.recipe.OpenRules; a format's name stands for the settings' recipe in that format."""


def file_rules(settings: Settings) -> OpenRules:
    return read_recipe(Path(settings.recipe)) if settings.recipe else []


def all_rules(settings: Settings, of_file: OpenRules, rules: GivenRules) -> OpenRules:
    """The settings' own recipe for every linear, or the rules of their file, then what `rules` say, then what is to be ignored."""
    settings = settings.complete()
    base = base_recipe(settings)
    whole = base if settings.target_bits is None else choice_of(base, settings.target_bits)
    if settings.token_importance == "none" and any(recipe and recipe.row_feedback for _, recipe in settled(of_file)):
        raise ValueError("a rule has row feedback, which needs --token-importance text or sampled")
    of_format = {name: named_format(name, settings.block) for _, name in rules if isinstance(name, str)}
    named = [(pattern, replace(base, format=of_format[how]) if isinstance(how, str) else how) for pattern, how in rules]
    return [*(of_file or [("re:.*", whole)]), *named, *((pattern, None) for pattern in settings.ignore)]


def described(rules: GivenRules) -> list[str]:
    return [f"{pattern}: {how or 'left alone'}" for pattern, how in rules]
