"""What `ptq plan` tells of a model and settings."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ptq.cost.preview import Preview, make_preview
from ptq.models.headers import from_headers
from ptq.run.recipe import open_choices, settled
from ptq.run.rules import all_rules, file_rules
from ptq.runtime.adapter import Skeleton
from ptq.runtime.distributed import local_device
from ptq.settings import PLACES, Settings

if TYPE_CHECKING:
    from ptq.run.allocate import Allocation


def preview(model: str, settings: Settings, output: Path | None = None) -> Preview:
    """What a run would do, from the headers of the model's files; no weights and no text are read, but where formats are to be
    chosen, which is done."""
    settings = settings.complete()
    rules = all_rules(settings, file_rules(settings), ())
    allocation = choose(model, settings) if open_choices(rules) else None
    assert settings.sequences is not None and settings.token_importance is not None
    return make_preview(
        from_headers(model) or opened(model),
        allocation.rules if allocation else settled(rules),
        settings.sequences, settings.length,
        settings.token_importance, batch=settings.batch, on_host=PLACES[settings.hidden_states],
        ranks=int(os.environ.get("WORLD_SIZE", 1)), output=output or Path("output"),
        cores=torch.get_num_threads() if local_device(settings.device) == "cpu" else 0, allocation=allocation,
    )  # fmt: skip


def choose(model: str, settings: Settings) -> "Allocation | None":
    from ptq.pipeline.run import prepare  # which takes longer than all of another plan

    return prepare(model, settings, None, settings.calibration, ()).allocation


def opened(model: str) -> Skeleton:
    """The model itself, its tensors on the meta device."""
    import transformers  # which takes longer than all of a plan

    from ptq.models.loading import open_model, quiet

    transformers.utils.logging.set_verbosity_error()
    with quiet():
        return open_model(model)[0]
