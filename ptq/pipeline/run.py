"""A whole run, for the command and the library: settings and a model in, a checkpoint and its report out."""

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ptq.calibrate.activations import default_batch
from ptq.cost.estimate import disk_bytes
from ptq.cost.shape import shape_of
from ptq.export.compressed_tensors import CompressedTensors
from ptq.export.files import check_output, save_text
from ptq.export.manifest import write_manifest
from ptq.models.loading import quiet
from ptq.pipeline.allocation import make_choices
from ptq.pipeline.calibration import Given, Windows, make_windows, read_calibration
from ptq.pipeline.card import model_card
from ptq.pipeline.finish import finish
from ptq.pipeline.progress import bars
from ptq.pipeline.source import Source, open_source
from ptq.run.allocate import Allocation
from ptq.run.fingerprint import fingerprint
from ptq.run.job import Job, do_layers
from ptq.run.plan import Plan, make_plan
from ptq.run.recipe import OpenRules, open_choices, settled
from ptq.run.resume import Unfinished, is_complete, unfinished_folder
from ptq.run.rules import GivenRules, all_rules, described, file_rules
from ptq.run.settings import base_recipe
from ptq.runtime.distributed import init_process_group, local_device
from ptq.runtime.memory import out_of_memory_says
from ptq.settings import OF_THE_MACHINE, OF_THE_TEXT, PLACES, Settings


@out_of_memory_says("give --batch 1, fewer --sequences or a shorter --length; finished layers are kept for --resume")
def run(
    model: str | Path | PreTrainedModel,
    settings: Settings,
    output: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: Given | None = None,
    rules: GivenRules = (),
    hidden: bool | None = None,
) -> dict | None:
    """Writes the checkpoint and returns its report, on ranks other than 0 None.

    `calibration`: None for the source that the settings name.  `hidden`: of progress bars; None, where nobody watches.
    """
    begin = time.perf_counter()
    if not (settings.resume and is_complete(output)):
        check_output(output, 0)
    given = settings.calibration if calibration is None else calibration
    work = prepare(model, settings, tokenizer, given, rules, output, hidden=hidden)
    job, settings = work.job, work.settings
    size = job.plan.checkpoint_bytes(job.adapter.parameters())
    with ExitStack() as at_the_end:
        with init_process_group(job.device, deterministic=settings.deterministic) as ranks:
            for part, value in work.about.items():
                ranks.check_same("calibration set" if part == "calibration" else part, value)
            if ranks.rank == 0 and not unfinished_folder(output).exists():
                shape = shape_of(job.plan, job.adapter, len(job.calibration), settings.length, job.importance)
                check_output(output, int(1.05 * (size + disk_bytes(shape))) + 2**24)
            layers, first = len(job.plan.layers), job.plan.first
            unfinished = Unfinished(output, work.about, layers, resume=settings.resume, ranks=ranks, first=first)
            at_the_end.callback(unfinished.close)
            totals = {"importance": len(job.adapter.names), "quantize": layers - first}
            with bars(totals, hidden=True if ranks.rank else hidden) as progress:
                do_layers(job, unfinished, ranks, progress)
        if ranks.rank:
            return None
        # One process is enough for the rest, and compressed-tensors would wait for the others if the group were still there.
        if unfinished.complete:
            report = json.loads((output / "report.json").read_text())
        else:
            report = finish(work.source, settings, job, work.windows, unfinished, hidden=hidden)
            if rules:  # which no flag of the command says
                report |= {"command": None, "rules": described(rules)}
            if work.allocation:
                report |= {"allocation": work.allocation.about}
            report |= {"bytes": size, "seconds": time.perf_counter() - begin}
            save_text(unfinished.checkpoint / "report.json", json.dumps(report, indent=1) + "\n")
            write_manifest(unfinished.checkpoint)
            unfinished.check()
            save_text(unfinished.checkpoint / "README.md", model_card(report, job.plan))
        unfinished.finish()
        return report


@dataclass(frozen=True)
class Work:
    """A run that can begin.  `settings`: complete.  `about`: what its bytes depend on (ptq.run.fingerprint).  `allocation`: where
    there was a choice of formats."""

    source: Source
    settings: Settings
    windows: Windows
    job: Job
    about: dict
    allocation: Allocation | None = None


def prepare(
    model: str | Path | PreTrainedModel,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Given,
    rules: GivenRules,
    output: Path | None = None,
    *,
    hidden: bool | None = None,
) -> Work:
    """Reads no weights of a model in safetensors files, but where formats are to be chosen.  Raises ValueError for everything that
    is known to fail."""
    device = local_device(settings.device)
    settings = replace(settings, device=device)
    of_file = file_rules(settings)
    recipe_rules = all_rules(settings, of_file, rules)
    asked = settings.smooth
    settings, texts = read_calibration(calibration, settings)
    with quiet():
        source = open_source(model, tokenizer, dtype=dtype_of(settings), device=device)
    if asked and not source.adapter.family.scaled:
        kind = source.adapter.config.model_type
        raise ValueError(
            f"--smooth: models of type {kind!r} have no channels that are known to be scaled exactly; leave it out"
        )
    plan = make_plan(source.adapter, settled(recipe_rules))
    windows = make_windows(texts, source, settings)
    job, allocation = make_job(source, settings, windows, plan, torch.device(device)), None
    if open_choices(recipe_rules):
        allocation = make_choices(job, recipe_rules, output if settings.resume else None, hidden=hidden)
        job = replace(job, plan=make_plan(source.adapter, allocation.rules))
    depends = what_bytes_depend_on(settings, of_file, rules) | ({"allocation": allocation.about} if allocation else {})
    about = fingerprint(source.identity(), windows.calibration, depends, job.device)
    return Work(source, settings, windows, job, about, allocation)


def make_job(source: Source, settings: Settings, windows: Windows, plan: Plan, device: torch.device) -> Job:
    batch = settings.batch or default_batch(
        source.adapter.config.hidden_size, settings.length, device, experts=source.adapter.has_experts
    )
    assert settings.token_importance is not None
    return Job(
        source.adapter, plan, CompressedTensors(), windows.calibration, device, settings.token_importance, settings.seed, batch,
        PLACES[settings.hidden_states], windows.validation,
    )  # fmt: skip


def what_bytes_depend_on(settings: Settings, of_file: OpenRules, rules: GivenRules) -> dict[str, object]:
    chosen: dict[str, object] = {**settings.but(*OF_THE_MACHINE, *OF_THE_TEXT, "recipe")}
    chosen["block"] = base_recipe(settings).format.block
    if of_file:
        chosen["recipe"] = [(pattern, recipe and recipe.about) for pattern, recipe in of_file]
    return chosen | ({"rules": described(rules)} if rules else {})


def dtype_of(settings: Settings) -> torch.dtype | None:
    return None if settings.dtype == "auto" else getattr(torch, settings.dtype)
