#!/usr/bin/env python
"""Quantize a Llama-family model to 4 bits and say how much was lost.

    python scripts/quantize_llama.py MODEL --output DIR
    python scripts/quantize_llama.py meta-llama/Llama-3.2-1B --calibration wiki.jsonl.gz --evaluate test.txt --output out

MODEL is a local folder, a hub id or a .gguf file.  DIR gets a compressed-tensors checkpoint that vLLM and transformers load, and
report.json.  With --evaluate, the original, RTN with absmax scales and the result are compared on that text.
"""

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import ptq
from ptq.calibrate.activations import default_batch
from ptq.core.formats import FORMATS, get_format
from ptq.core.scales import RULES
from ptq.cost.estimate import disk_bytes
from ptq.cost.preview import make_preview
from ptq.cost.shape import shape_of
from ptq.data.text import VALIDATION_SEQUENCES, all_windows, read_documents, sample_windows
from ptq.eval.perplexity import Score, evaluate
from ptq.export.checkpoint import DTYPE, ReadBackError, layers_that_fit, verify, write_rest
from ptq.export.compressed_tensors import CompressedTensors
from ptq.export.files import check_output, save_text
from ptq.methods import METHODS
from ptq.models.adapter import ModelAdapter
from ptq.models.loading import check_fit, load_model, open_model, quiet
from ptq.run.job import Job, do_layers
from ptq.run.loop import quantize_model
from ptq.run.plan import make_plan, with_block
from ptq.run.recipe import Recipe, as_rules
from ptq.run.resume import Unfinished, fingerprint, is_complete, unfinished_folder
from ptq.run.settings import DRIFTS, EFFORTS, IMPORTANCES, make_recipe
from ptq.run.solve import CertificateError, Record
from ptq.run.summary import summary
from ptq.runtime.distributed import init_process_group, local_device
from ptq.runtime.stop import say_stopped, stoppable

PLACES = {"auto": None, "device": False, "host": True}
VERIFY_TOKENS = 128
SETTINGS = ("format", "method", "effort", "rule", "token_importance", "drift", "row_feedback", "damp", "ignore")
BYTES_DEPEND_ON = (*SETTINGS, "seed", "dtype", "deterministic")
SETTINGS += ("calibration", "sequences", "validation", "length", "seed", "evaluate", "windows")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="local folder, hub id or .gguf file")
    how = parser.add_argument_group("method")
    how.add_argument("--format", choices=FORMATS, default="nvfp4", help="4-bit format (default: %(default)s)")
    how.add_argument("--method", choices=METHODS, default="gptq", help="rounding method (default: %(default)s)")
    how.add_argument(
        "--effort",
        choices=EFFORTS,
        default="default",
        help="what gptq does where the next four do not say: fast, default or best (README has a table)",
    )
    how.add_argument("--rule", choices=RULES, help="how block scales are chosen (rtn: local)")
    how.add_argument(
        "--token-importance",
        choices=IMPORTANCES,
        help="what tokens count for: all the same, or by the loss gradient, of the text or of labels the model draws",
    )
    how.add_argument("--drift", choices=DRIFTS, help="how much of what earlier layers lost each linear makes good")
    how.add_argument("--row-feedback", action=argparse.BooleanOptionalAction, help="feed rounding errors forward over rows too")
    how.add_argument("--block", type=int, help="weights per scale, for int4: 32, 64, 128 (default) or 256")
    how.add_argument("--damp", type=float, default=0.01, help="added to diag(H), relative to its mean (default: %(default)s)")
    how.add_argument(
        "--ignore", nargs="+", default=[], metavar="NAME", help="linears to leave alone: a full name or re:PATTERN"
    )
    text = parser.add_argument_group("calibration")
    text.add_argument(
        "--calibration", default="builtin", metavar="TEXT", help=".txt, .jsonl[.gz], dataset id or builtin (default)"
    )
    text.add_argument("--sequences", type=int, metavar="N", help="calibration sequences (default: 128; of builtin, 64)")
    text.add_argument(
        "--length", type=int, default=1024, metavar="N", help="tokens a sequence or window (default: %(default)s)"
    )
    about = "more sequences, to measure every linear on (default: %(default)s)"
    text.add_argument("--validation", type=int, default=VALIDATION_SEQUENCES, metavar="N", help=about)
    text.add_argument("--seed", type=int, default=0, help="which sequences are drawn (default: %(default)s)")
    result = parser.add_argument_group("result")
    result.add_argument("--output", type=Path, metavar="DIR", help="write a checkpoint there; it must not exist")
    result.add_argument("--plan", action="store_true", help="only say what would be done, what it takes, and what cannot work")
    result.add_argument("--evaluate", metavar="TEXT", help="perplexity and KL on this text, a source as for --calibration")
    result.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows only")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    machine.add_argument("--resume", action="store_true", help="go on with an unfinished run into --output, if there is one")
    machine.add_argument("--batch", type=int, metavar="N", help="sequences that run at once (default: by the model's width)")
    machine.add_argument(
        "--activations", choices=PLACES, default="auto", help="where hidden states are (default: by their size)"
    )
    machine.add_argument(
        "--deterministic", action="store_true", help="the same bits on 1, 2, 4 or 8 ranks (torchrun), at some cost"
    )
    machine.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="to run in (default: as stored)"
    )
    args = parser.parse_args(argv)
    if args.sequences is None:
        args.sequences = 64 if args.calibration == "builtin" else 128
    rtn = {"rule": "local", "token_importance": "none", "drift": "none", "row_feedback": False}
    for name, value in (EFFORTS[args.effort] if args.method == "gptq" else rtn).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("sequences", "windows", "length", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < (2 if name == "length" else 1):
            parser.error(f"--{name} {getattr(args, name)}: too few")
    if args.validation < 0:
        parser.error(f"--validation {args.validation}: 0 or more")
    if args.output is None and args.evaluate is None and not args.plan:
        parser.error("nothing to do: give --output, --evaluate or both, or --plan")
    return args


def run(args: argparse.Namespace) -> dict | str | None:
    """The whole job; returns the report, or the plan, or on ranks other than 0 None."""
    begin = time.perf_counter()
    if args.output and not (args.resume and is_complete(args.output)):
        check_output(args.output, 0)
    if args.plan:
        return preview(args)
    args.device = local_device(args.device)
    job, tokenizer, eval_windows, about = prepare(args)
    size = job.plan.checkpoint_bytes(job.adapter.parameters())
    with ExitStack() as at_the_end:
        output = (args.output or Path(at_the_end.enter_context(tempfile.TemporaryDirectory())) / "checkpoint").absolute()
        with init_process_group(job.device, deterministic=args.deterministic) as ranks:
            for part, value in about.items():
                ranks.check_same("calibration set" if part == "calibration" else part, value)
            if ranks.rank == 0 and not unfinished_folder(output).exists():
                work = shape_of(job.plan, job.adapter, len(job.calibration), args.length, job.importance)
                check_output(output, int(1.05 * (size + disk_bytes(work))) + 2**24)
            unfinished = Unfinished(output, about, len(job.adapter.names), resume=args.resume, ranks=ranks)
            at_the_end.callback(unfinished.close)
            with bars(job, hidden=ranks.rank > 0) as progress:
                do_layers(job, unfinished, ranks, progress)
        if ranks.rank:
            return None
        # One process is enough for the rest, and compressed-tensors would wait for the others if the group were still there.
        if unfinished.complete:
            report = json.loads((output / "report.json").read_text())
        else:
            report = finish(args, job, tokenizer, eval_windows, unfinished)
            report |= {"bytes": size, "seconds": time.perf_counter() - begin}
            save_text(unfinished.checkpoint / "report.json", json.dumps(report, indent=1) + "\n")
        unfinished.finish()
        return report


def preview(args: argparse.Namespace) -> str:
    """What `--plan` prints.  From the headers of the model's files; no weights and no text are read."""
    with quiet():
        adapter, _, _ = open_model(args.model, dtype=model_dtype(args), device="cpu")
    return make_preview(
        adapter, as_rules(recipe_of(args), args.ignore), args.sequences, args.length, args.token_importance,
        batch=args.batch, on_host=PLACES[args.activations], ranks=int(os.environ.get("WORLD_SIZE", 1)),
        output=args.output or Path("output"),
    ).text()  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Recipe:
    return make_recipe(with_block(get_format(args.format), args.block), vars(args), args.damp)


def model_dtype(args: argparse.Namespace) -> torch.dtype | None:
    return None if args.dtype == "auto" else getattr(torch, args.dtype)


def prepare(args: argparse.Namespace) -> tuple[Job, PreTrainedTokenizerBase, Tensor | None, dict]:
    """(what to do, tokenizer, windows to evaluate on, fingerprint); reads no weights of a model in safetensors files."""
    recipe = recipe_of(args)
    texts = {source: read_documents(source) for source in (args.calibration, args.evaluate) if source}
    with quiet():
        adapter, tokenizer, files = open_model(args.model, dtype=model_dtype(args), device=args.device)
    plan = make_plan(adapter, recipe, args.ignore)
    calibration, validation, eval_windows = token_windows(args, texts, adapter.model, tokenizer)
    device = torch.device(args.device)
    settings = {name: getattr(args, name) for name in BYTES_DEPEND_ON} | {"block": recipe.format.block}
    batch = args.batch or default_batch(adapter.config.hidden_size, args.length, device)
    place = PLACES[args.activations]
    job = Job(
        adapter, plan, CompressedTensors(), calibration, device, args.token_importance, args.seed, batch, place, validation
    )
    return job, tokenizer, eval_windows, fingerprint(files.identity(), calibration, settings, device)


@contextmanager
def bars(job: Job, *, hidden: bool) -> Iterator[Callable[[str, str], None]]:
    """A bar for each kind of work, counting layers; none where nobody watches."""
    open_bars: dict[str, tqdm] = {}

    def progress(what: str, _layer: str) -> None:
        if what not in open_bars:
            open_bars[what] = tqdm(total=len(job.adapter.names), desc=what, unit="layer", disable=True if hidden else None)
        open_bars[what].update()

    try:
        yield progress
    finally:
        for bar in open_bars.values():
            bar.close()


def finish(
    args: argparse.Namespace, job: Job, tokenizer: PreTrainedTokenizerBase, eval_windows: Tensor | None, unfinished: Unfinished
) -> dict:
    """Writes what is not in a layer, has transformers read all of it back, and compares; returns the report."""
    folder, recipe, formats = unfinished.checkpoint, recipe_of(args), job.plan.formats
    write_rest(folder, job.adapter, tokenizer, formats, job.layout, job.plan.ignored)
    layers = layers_that_fit(len(job.adapter.names), job.adapter.parameters(), job.device)
    with quiet():
        tokens = job.calibration[:1, :VERIFY_TOKENS].to(job.device)
        difference = verify(folder, job.adapter, tokens, formats, job.layout, layers)
    if difference:
        raise ReadBackError(f"the checkpoint reads back with logits {difference:.3g} away from the model it was made of")
    label = recipe.method if recipe.method == "gptq" or recipe.rule == "absmax" else f"{recipe.method}-{recipe.rule}"
    report = describe(args, recipe, unfinished.records(), compare(args, recipe, folder, label, eval_windows))
    return report | {"reload_max_abs_diff": difference, "reload_layers": layers}


def token_windows(
    args: argparse.Namespace, texts: dict[str, list[str]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Calibration sequences (n, length), those held out to measure linears on, and the windows to evaluate on, if any."""
    windows = {
        source: all_windows(lambda text: tokenizer(text, verbose=False)["input_ids"], documents, args.length, source)  # type: ignore[arg-type]
        for source, documents in texts.items()
    }
    check_fit(max(int(tokens.max()) for tokens in windows.values()), model, args.model)
    drawn = sample_windows(windows[args.calibration], args.sequences, args.seed, args.calibration, validation=args.validation)
    validation = drawn[args.sequences :] if args.validation else None
    return drawn[: args.sequences], validation, windows[args.evaluate][: args.windows] if args.evaluate else None


def describe(args: argparse.Namespace, recipe: Recipe, records: list[Record], scores: dict[str, Score]) -> dict:
    """The report but for what writing adds to it."""
    return {
        "model": args.model,
        "settings": {name: getattr(args, name) for name in SETTINGS} | {"block": recipe.format.block},
        **{name: asdict(value) for name, value in scores.items()},
        "linears": [asdict(record) for record in records],
        "versions": {"ptq": ptq.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
    }


def rounded(model: PreTrainedModel, recipe: Recipe, ignore: list[str]) -> PreTrainedModel:
    """The model after RTN with absmax scales, in place: the baseline."""
    for _ in quantize_model(ModelAdapter(model), Recipe(recipe.format, "rtn", "absmax"), ignore=ignore):
        pass
    return model


def compare(
    args: argparse.Namespace, recipe: Recipe, folder: Path, label: str, eval_windows: Tensor | None
) -> dict[str, Score]:
    """Scores of the original, of RTN with absmax scales, and of the checkpoint as transformers loads it, all in one dtype."""
    if eval_windows is None:
        return {}
    with quiet():
        original, _ = load_model(args.model, dtype=model_dtype(args), device=args.device)
        checkpoint = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, attn_implementation="sdpa").to(args.device)
        checkpoint.eval()(eval_windows[:1, :2].to(args.device))  # weights are unpacked at the first forward
        checkpoint.to(dtype=original.dtype)  # type: ignore[call-arg]
    models = {"original": original, "rtn": rounded(copy.deepcopy(original), recipe, args.ignore), label: checkpoint}
    return evaluate(models, tqdm(eval_windows, "evaluate", unit="window", disable=None))


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="Attempting to run cuBLAS")  # said of every first backward pass on a GPU
    transformers.utils.logging.disable_progress_bar()
    rank = os.environ.get("RANK", "0")
    try:
        with stoppable():
            report = run(args)
        if report is not None:
            print(report if isinstance(report, str) else summary(report))
    except (ValueError, OSError, SafetensorError, CertificateError, ReadBackError, torch.OutOfMemoryError) as error:
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        return say_stopped(stopped, args.output and unfinished_folder(args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
