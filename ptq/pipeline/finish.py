"""The end of a run: the checkpoint is read back, compared with the original, and described."""

import copy
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

import ptq
from ptq.calibrate.inputs import inputs_of, quantized_inputs
from ptq.core.packing import Quantized
from ptq.eval.paired import difference
from ptq.eval.perplexity import dtype_of, score_models, summarize
from ptq.eval.sample import greedy_sample
from ptq.export.checkpoint import ReadBackError, write_rest
from ptq.export.read_back import layers_that_fit, load_checkpoint, verify
from ptq.models.adapter import ModelAdapter
from ptq.models.loading import quiet
from ptq.pipeline.calibration import GIVEN, Windows
from ptq.pipeline.source import Source
from ptq.run.job import Job
from ptq.run.loop import Calibration, quantize_model
from ptq.run.recipe import Recipe
from ptq.run.record import Record
from ptq.run.resume import Unfinished
from ptq.run.settings import base_recipe
from ptq.settings import OF_THE_MACHINE, Settings, command

VERIFY_TOKENS = 128


def finish(
    source: Source, settings: Settings, job: Job, windows: Windows, unfinished: Unfinished, *, hidden: bool | None = None
) -> dict:
    """Writes what is not in a layer, has transformers read all of it back, and compares; returns the report.

    Raises ReadBackError where the checkpoint does not give the logits of the model it was made of, bit for bit.
    """
    folder, formats = unfinished.checkpoint, job.plan.formats
    write_rest(folder, job.adapter, source.tokenizer, formats, job.layout, job.plan.ignored)
    layers = layers_that_fit(len(job.adapter.names), job.adapter.parameters(), job.device)
    with quiet():
        tokens = job.calibration[:1, :VERIFY_TOKENS].to(job.device)
        difference = verify(folder, job.adapter, tokens, formats, job.layout, layers)
    if difference:
        raise ReadBackError(f"the checkpoint reads back with logits {difference:.3g} away from the model it was made of")
    report = describe(source, settings, windows, job, unfinished.records())
    report |= {"reload_max_abs_diff": difference, "reload_layers": layers}
    if windows.evaluation is None:
        return report
    return report | compare(source, settings, folder, windows.evaluation, job, hidden=hidden)


def describe(source: Source, settings: Settings, windows: Windows, job: Job, records: list[Record]) -> dict:
    """The report but for scores and what writing adds to it."""
    return {
        "model": source.name,
        "settings": settings.but(*OF_THE_MACHINE, "dtype", "deterministic") | {"block": base_recipe(settings).format.block},
        "calibrated_on": windows.how,
        "command": None if settings.calibration.endswith(GIVEN) else command(source.name, settings),
        "linears": [asdict(record) for record in records],
        "versions": {"ptq": ptq.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else "cpu",
    }


def compare(source: Source, settings: Settings, folder: Path, windows: Tensor, job: Job, *, hidden: bool | None) -> dict:
    """Scores of the original, of RTN with absmax scales, and of the checkpoint as transformers loads it, all in one dtype and on
    inputs rounded as they are to be; how the first and the last go on with a prompt; and the difference in KL to RTN, paired
    over the windows."""
    recipe, device = base_recipe(settings), torch.device(settings.device or "cpu")
    label = recipe.method if recipe.method == "gptq" or recipe.rule == "absmax" else f"{recipe.method}-{recipe.rule}"
    with quiet():
        original = source.load()
        attention = str(source.adapter.config._attn_implementation)
        how = {"experts": source.adapter.has_experts, "attention": attention, "device": device, "dtype": original.dtype}
        checkpoint = load_checkpoint(folder, **how)
    baseline = copy.deepcopy(original)
    models = {"original": original, "rtn": baseline, label: checkpoint}
    with quantized_inputs(baseline, inputs_of(round_to_nearest(baseline, job))):
        scored = score_models(models, tqdm(windows, "evaluate", unit="window", disable=hidden))
    samples = {name: greedy_sample(models[name], source.tokenizer, windows[0]) for name in ("original", label)}
    found: dict = {name: asdict(replace(summarize(one), dtype=dtype_of(models[name]))) for name, one in scored.items()}
    prompt = samples["original"]["prompt"]
    found["samples"] = {"prompt": prompt} | {name: sample["greedy"] for name, sample in samples.items()}
    if label == "rtn":  # the baseline itself
        return found
    kl = [[(window.kl, window.tokens) for window in scored[name]] for name in ("rtn", label)]
    change = difference(kl[0], kl[1], "mean")
    stderr = None if math.isnan(change.stderr) else change.stderr
    about = {"value": change.value, "stderr": stderr, "windows": change.items, "windows_needed": change.items_needed}
    return found | {"kl_against_rtn": about}


def round_to_nearest(model: PreTrainedModel, job: Job) -> dict[str, Quantized]:
    """The baseline, in place: every linear in the format of the job's plan by RTN with absmax scales; its weights by name."""
    recipes = job.plan.recipes.items()
    rules = [(name, Recipe(recipe.format, "rtn", "absmax", activation=recipe.activation)) for name, recipe in recipes]
    batches = job.calibration.to(job.device).split(job.batch) if job.plan.activations else ()
    done = quantize_model(ModelAdapter(model), rules, Calibration(batches))
    return {record.name: weight for record, weight in done}
