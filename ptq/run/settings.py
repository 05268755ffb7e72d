"""The names by which scripts speak of recipes: efforts, drifts, and cases METHOD-RULE-IMPORTANCE."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ptq.core.activations import ActivationFormat, get_activation
from ptq.core.formats import Format, get_format
from ptq.core.scales import RULES
from ptq.methods import METHODS
from ptq.run.plan import with_block
from ptq.run.recipe import Recipe
from ptq.settings import DRIFTS, EFFORTS, IMPORTANCES, Settings, settings_of_effort, usual_ridge


def settings_of(case: str, activations: str = "none") -> dict:
    """What an effort sets with those activations, or a case METHOD-RULE-IMPORTANCE[-half|-full][-rows][-smooth][-frozen]: method,
    what `settings_of_effort` names, frozen, and `effort`, "" where the case is none.  Raises ValueError for neither."""
    if case in EFFORTS:
        return {"method": "gptq", **settings_of_effort(case, activations), "frozen": False, "effort": case}
    method, rule, importance, *more = [*case.split("-"), "", ""]
    drift = next((word for word in more if word in DRIFTS), "none")
    fits = method in METHODS and rule in RULES and importance in IMPORTANCES
    if not fits or set(more) - {"", "rows", "smooth", "frozen", *DRIFTS}:
        raise ValueError(
            f"no such case: {case!r}; write {' | '.join(EFFORTS)}, or METHOD-RULE-IMPORTANCE[-half|-full][-rows][-smooth][-frozen] "
            f"with METHOD {' | '.join(METHODS)}, RULE {' | '.join(RULES)} and IMPORTANCE {' | '.join(IMPORTANCES)}"
        )
    chosen = {"rule": rule, "token_importance": importance, "drift": drift}
    chosen |= {"row_feedback": "rows" in more, "smooth": "smooth" in more}
    frozen = "frozen" in more
    known = method == "gptq" and not frozen
    effort = next((name for name in EFFORTS if known and settings_of_effort(name, activations) == chosen), "")
    return {"method": method, **chosen, "frozen": frozen, "effort": effort}


def make_recipe(
    format: Format,
    settings: Mapping[str, Any],
    damp: float = 0.01,
    *,
    activation: ActivationFormat | None = None,
    ridge: float | None = None,
) -> Recipe:
    """What `settings` say by the names of `settings_of`: method, rule, token_importance, drift, row_feedback, frozen, smooth.

    `ridge`: None, what is usual with those activations.  Raises ValueError where they do not fit each other.
    """
    if settings["row_feedback"] and settings["token_importance"] == "none":
        raise ValueError("row feedback needs the backward pass of token importance text or sampled, and it is none")
    chosen = DRIFTS[settings["drift"]] | {"row_feedback": settings["row_feedback"]}
    chosen |= {name: settings.get(name, False) for name in ("frozen", "smooth")}
    ridge = usual_ridge(activation.name if activation else "none") if ridge is None else ridge
    return Recipe(format, settings["method"], settings["rule"], damp, activation, ridge=ridge, **chosen)


def base_recipe(settings: Settings) -> Recipe:
    """What complete `settings` say of every linear that no rule names.  Raises ValueError where they do not fit each other."""
    format, activation = with_block(get_format(settings.format), settings.block), get_activation(settings.activations)
    return make_recipe(format, asdict(settings), settings.damp, activation=activation)
