"""Many methods and formats on one model, from one calibration pass; what `ptq compare` does."""

import copy
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ptq.calibrate.importance import TokenImportance, keep_in, token_importance
from ptq.data.chat import Document, encoder
from ptq.data.text import all_windows, read_documents, read_texts, sample_windows
from ptq.eval.checkpoint import Loaded, bits_per_weight, load_any
from ptq.eval.logits import KeptLogits
from ptq.eval.logits import run as run_model
from ptq.eval.report import markdown, page
from ptq.eval.results import stamp, surroundings, write
from ptq.eval.text import First, Text, measure_text, tokenize
from ptq.models.adapter import ModelAdapter
from ptq.models.loading import check_fit, quiet
from ptq.run.loop import Calibration, quantize_model
from ptq.run.plan import make_plan, named_format
from ptq.run.recipe import Recipe
from ptq.run.settings import make_recipe, settings_of
from ptq.run.shared_hessians import quantize_from, store_hessians
from ptq.runtime.memory import out_of_memory_says
from ptq.settings import Comparison

TOKENS_AT_ONCE = 4096
ORIGINAL = "original"
HOW = {False: "shared Hessians", True: "sequential"}


@dataclass(frozen=True)
class Case:
    """What to do, whose weights tokens have, and whether by itself on the layers quantized before."""

    recipe: Recipe
    importance: str
    sequential: bool


@dataclass(frozen=True)
class Sequential:
    """For sequential cases: token ids, and by the name of an importance, what tokens count for and the curvature of the loss."""

    batches: tuple[Tensor, ...] = ()
    importances: Mapping[str, TokenImportance | None] = field(default_factory=dict)
    curvatures: Mapping[str, dict[str, Tensor]] = field(default_factory=dict)

    def calibration(self, case: Case) -> Calibration:
        return Calibration(self.batches, self.importances[case.importance], self.curvatures.get(case.importance))


def cases_of(args: Comparison) -> dict[str, Case]:
    """The cases by label.  Raises ValueError for one that there is not."""
    return {f"{name}-{case}": parse_case(name, case, args) for name in args.formats for case in args.cases}


def parse_case(name: str, case: str, args: Comparison) -> Case:
    """A case (ptq.run.settings.settings_of) in the format `name`."""
    chosen = settings_of(case)
    recipe = make_recipe(named_format(name, args.block), chosen, args.damp)
    return Case(recipe, chosen["token_importance"], args.sequential or recipe.drift > 0 or recipe.row_feedback)


@out_of_memory_says("give fewer --sequences or a shorter --length; the same command goes on with the cases that are missing")
def run(args: Comparison) -> list[dict]:
    """The whole job: one result for the model and for each case, the report at the end."""
    cases = cases_of(args)
    wanted = {label: settings(args, label) for label in (ORIGINAL, *cases)}
    results = {label: earlier(args.output / f"{label}.json", wanted[label]) for label in wanted}
    documents, tested_on = read_documents(args.calibration), read_texts(args.text)
    if not all(results.values()):
        with quiet():
            loaded = load_any(args.model, dtype=torch.float32, device=args.device)
        loaded.model.requires_grad_(False)
        for case in cases.values():
            make_plan(ModelAdapter(loaded.model), case.recipe)
        args.output.mkdir(parents=True, exist_ok=True)
        text = Text(args.text, tested_on, args.length, args.windows)
        for label, result in measure(loaded, text, documents, cases, results, args):
            results[label] = result | {"settings": wanted[label]}
            write(args.output / f"{label}.json", json.dumps(results[label], indent=1))
    done = [result for result in results.values() if result]
    write(args.output / "report.md", markdown(done))
    write(args.output / "report.html", page(done))
    return done


def settings(args: Comparison, label: str) -> dict[str, Any]:
    """What a result depends on."""
    names = ("damp", "block", "calibration", "sequences", "length", "seed", "text", "windows", "sequential", "device")
    files = {source: stamp(source) for source in (args.model, args.calibration, args.text)}
    return {"label": label, "model": args.model, "files": files} | {name: getattr(args, name) for name in names}


def earlier(path: Path, wanted: Mapping[str, Any]) -> dict | None:
    """The result of an earlier run.  Raises ValueError where it has other settings."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text())
    if found["settings"] != wanted:
        changed = [name for name in wanted if found["settings"].get(name) != wanted[name]]
        raise ValueError(f"{path} was measured with another {', '.join(changed)}; name another --output")
    return found


def measure(
    loaded: Loaded,
    text: Text,
    documents: list[Document],
    cases: Mapping[str, Case],
    results: Mapping[str, dict | None],
    args: Comparison,
) -> Iterator[tuple[str, dict]]:
    """(label, result) of what is missing."""
    tokens = tokenize(args.model, loaded, text)
    kept = KeptLogits(run_model(loaded.model, ORIGINAL), args.output, len(tokens.windows))
    common = {"dtype": "float32", "bytes": None, "load_seconds": None, "tasks": {}, **surroundings(args.device)}

    def scored(label: str, model: Loaded, first: First | None) -> dict:
        logits = kept if first is None else run_model(model.model, label)
        bar = lambda windows: tqdm(windows, label, unit="window", disable=None)  # noqa: E731
        return common | {"label": label, "text": measure_text(label, model, logits, text, tokens, first, bar)}

    original = results[ORIGINAL]
    if not original:
        stored = bits_per_weight(loaded.model, loaded.files)
        original = scored(ORIGINAL, loaded, None) | {"bits_per_weight": stored, "quantize_seconds": None}
        yield ORIGINAL, original
    first = First(kept, original["text"]["fingerprint"], original["text"]["vocabulary"])
    missing = {label: case for label, case in cases.items() if not results[label]}
    sequential = calibrate(loaded, documents, missing, args)
    for label, case in missing.items():
        begin = time.perf_counter()
        model = copy.deepcopy(loaded.model)
        for _ in tqdm(quantize(ModelAdapter(model), case, sequential, args), label, unit="linear", disable=None):
            pass
        seconds = time.perf_counter() - begin
        result = scored(label, Loaded(model, loaded.tokenizer, 0.0, []), first)
        bits = case.recipe.format.bits_per_weight
        yield label, result | {"bits_per_weight": bits, "quantize_seconds": seconds, "made_by": HOW[case.sequential]}


def quantize(adapter: ModelAdapter, case: Case, sequential: Sequential, args: Comparison) -> Iterator:
    """Quantizes the model in place, one item a linear."""
    if not case.sequential:
        return quantize_from(adapter, args.output / "hessians", case.importance, case.recipe)
    return quantize_model(adapter, case.recipe, sequential.calibration(case))


def calibrate(loaded: Loaded, documents: list[Document], cases: Mapping[str, Case], args: Comparison) -> Sequential:
    """What the sequential cases need; the Hessians of the others are stored unless they are there already."""
    shared = sorted({case.importance for case in cases.values() if not case.sequential})
    noted = args.output / "hessians" / "settings.json"
    names = ("calibration", "sequences", "length", "seed", "model")
    depends = {name: str(getattr(args, name)) for name in names} | {"files": [stamp(args.model), stamp(args.calibration)]}
    there = json.loads(noted.read_text()) if noted.is_file() else {}
    to_store = [] if there.get("depends") == depends and set(shared) <= set(there["importances"]) else shared
    wanted = sorted({case.importance for case in cases.values() if case.sequential} | set(to_store))
    if not wanted:
        return Sequential()
    windows = all_windows(encoder(loaded.tokenizer), documents, args.length, args.calibration)
    check_fit(int(windows.max()), loaded.model, args.model)
    tokens = sample_windows(windows, args.sequences, args.seed, args.calibration).to(args.device)
    batches = tokens.split(max(1, TOKENS_AT_ONCE // args.length))
    adapter = ModelAdapter(loaded.model)
    seeds = {"text": None, "sampled": args.seed}
    curvatures: dict[str, dict[str, Tensor]] = {case.importance: {} for case in cases.values() if case.recipe.row_feedback}
    importances: dict[str, TokenImportance | None] = {"none": None}
    for name in set(wanted) - {"none"}:
        keep = keep_in(curvatures[name]) if name in curvatures else None
        importances[name] = token_importance(adapter, batches, seed=seeds[name], curvature=keep)
    if to_store:
        noted.parent.mkdir(parents=True, exist_ok=True)
        noted.unlink(missing_ok=True)
        stored = {name: importances[name] for name in to_store}
        with tqdm(total=len(adapter.names), desc="Hessians", unit="layer", disable=None) as bar:
            store_hessians(adapter, batches, stored, noted.parent, lambda _layer: bar.update())
        write(noted, json.dumps({"depends": depends, "importances": to_store}))
    return Sequential(batches, importances, curvatures)
