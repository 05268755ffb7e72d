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
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import ptq
from ptq.calibration import all_windows, read_documents, sample_windows
from ptq.config import QuantConfig
from ptq.eval.perplexity import Score, evaluate
from ptq.export import ReadBackError, check_output, checkpoint_tensors, staged, verify, write_checkpoint
from ptq.formats import FORMATS, get_format
from ptq.methods import METHODS
from ptq.models.llama import LlamaAdapter
from ptq.models.loading import check_fit, load_model, quiet
from ptq.plan import make_plan, with_block
from ptq.runner import CertificateError, Record, quantize_model
from ptq.scales import RULES
from ptq.token_weights import TokenWeights, token_weights

TOKENS_AT_ONCE = 4096
VERIFY_TOKENS = 128
SETTINGS = ("format", "method", "scales", "token_weights", "damp", "ignore")
SETTINGS += ("calibration", "sequences", "length", "seed", "evaluate", "windows")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="local folder, hub id or .gguf file")
    how = parser.add_argument_group("method")
    how.add_argument("--format", choices=FORMATS, default="nvfp4", help="4-bit format (default: %(default)s)")
    how.add_argument("--method", choices=METHODS, default="gptq", help="rounding method (default: %(default)s)")
    how.add_argument(
        "--scales", choices=RULES, help="how block scales are chosen (default: joint; local without token weights)"
    )
    how.add_argument(
        "--token-weights",
        choices=("none", "text", "sampled"),
        help="what tokens count for: all the same, or by the loss gradient, of the text or of labels the model draws "
        "(default: sampled for gptq, none for rtn)",
    )
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
    text.add_argument("--seed", type=int, default=0, help="which sequences are drawn (default: %(default)s)")
    result = parser.add_argument_group("result")
    result.add_argument("--output", type=Path, metavar="DIR", help="write a checkpoint there; it must not exist")
    result.add_argument("--evaluate", metavar="TEXT", help="perplexity and KL on this text, a source as for --calibration")
    result.add_argument("--windows", type=int, metavar="N", help="evaluate on the first N windows only")
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    machine.add_argument(
        "--dtype", choices=("auto", "bfloat16", "float32"), default="auto", help="to run in (default: as stored)"
    )
    args = parser.parse_args(argv)
    if args.sequences is None:
        args.sequences = 64 if args.calibration == "builtin" else 128
    args.token_weights = args.token_weights or ("sampled" if args.method == "gptq" else "none")
    args.scales = args.scales or ("joint" if args.method == "gptq" and args.token_weights != "none" else "local")
    for name in ("sequences", "windows", "length"):
        if getattr(args, name) is not None and getattr(args, name) < (2 if name == "length" else 1):
            parser.error(f"--{name} {getattr(args, name)}: too few")
    if args.output is None and args.evaluate is None:
        parser.error("nothing to do: give --output, --evaluate or both")
    return args


def run(args: argparse.Namespace) -> dict:
    """The whole job; returns the report."""
    begin = time.perf_counter()
    if args.output:
        check_output(args.output, 0)
    format = with_block(get_format(args.format), args.block)
    config = QuantConfig(format, args.method, args.scales, args.damp, tuple(args.ignore))
    texts = {source: read_documents(source) for source in (args.calibration, args.evaluate) if source}
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with quiet():
        model, tokenizer = load_model(args.model, dtype=dtype, device=args.device)
    adapter = LlamaAdapter(model)
    plan = make_plan(adapter, config)
    size = plan.checkpoint_bytes(sum(parameter.numel() for parameter in model.parameters()), format)
    if args.output:
        check_output(args.output, int(1.05 * size) + 2**24)

    calibration, held_out = token_windows(args, texts, model, tokenizer)
    originals = {"original": copy.deepcopy(model), "rtn": rounded(copy.deepcopy(model), config)} if args.evaluate else {}
    batches = calibration.to(args.device).split(max(1, TOKENS_AT_ONCE // args.length))
    records, packed = quantize(adapter, batches, config, len(plan.linears), weigh(adapter, batches, args))
    label = config.method if config.method == "gptq" or config.rule == "absmax" else f"{config.method}-{config.rule}"
    scores = score(originals | {label: model}, held_out)
    originals.clear()
    report = describe(args, config, size, records, scores)
    if args.output:
        with staged(args.output) as folder:
            write_checkpoint(folder, model, tokenizer, packed, format, plan.ignored)
            report["reload_max_abs_diff"] = reload_difference(folder, model, calibration)
            report["seconds"] = time.perf_counter() - begin
            (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report | {"seconds": time.perf_counter() - begin}


def token_windows(
    args: argparse.Namespace, texts: dict[str, list[str]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor | None]:
    """Calibration sequences (n, length), and the windows to evaluate on, if any."""
    windows = {
        source: all_windows(lambda text: tokenizer(text, verbose=False)["input_ids"], documents, args.length, source)  # type: ignore[arg-type]
        for source, documents in texts.items()
    }
    check_fit(max(int(tokens.max()) for tokens in windows.values()), model, args.model)
    calibration = sample_windows(windows[args.calibration], args.sequences, args.seed, args.calibration)
    return calibration, windows[args.evaluate][: args.windows] if args.evaluate else None


def describe(args: argparse.Namespace, config: QuantConfig, size: int, records: list[Record], scores: dict[str, Score]) -> dict:
    """The report but for what writing adds to it."""
    return {
        "model": args.model,
        "settings": {name: getattr(args, name) for name in SETTINGS} | {"block": config.format.block},
        **{name: asdict(value) for name, value in scores.items()},
        "bytes": size,
        "linears": [asdict(record) for record in records],
        "versions": {"ptq": ptq.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
    }


def weigh(adapter: LlamaAdapter, batches: Sequence[Tensor], args: argparse.Namespace) -> TokenWeights | None:
    if args.token_weights == "none":
        return None
    seed = args.seed if args.token_weights == "sampled" else None
    return token_weights(adapter, batches, seed=seed, progress=lambda layers: tqdm(layers, "weigh", unit="layer", disable=None))


def quantize(
    adapter: LlamaAdapter, batches: Sequence[Tensor], config: QuantConfig, total: int, weights: TokenWeights | None
) -> tuple[list[Record], dict[str, Tensor]]:
    """Quantizes the model behind the adapter, with a progress bar: the records and the checkpoint's tensors."""
    records, packed = [], {}
    results = quantize_model(adapter, batches, config, weights)
    for record, quantized in tqdm(results, "quantize", total, unit="linear", disable=None):
        records.append(record)
        packed |= checkpoint_tensors(record.name, quantized)
    return records, packed


def rounded(model: PreTrainedModel, config: QuantConfig) -> PreTrainedModel:
    """The model after RTN with absmax scales, in place: the baseline."""
    baseline = QuantConfig(config.format, "rtn", "absmax", config.damp, config.ignore)
    for _ in quantize_model(LlamaAdapter(model), None, baseline):
        pass
    return model


def score(models: dict[str, PreTrainedModel], held_out: Tensor | None) -> dict[str, Score]:
    if held_out is None:
        return {}
    return evaluate(models, tqdm(held_out, "evaluate", unit="window", disable=None))


def reload_difference(folder: Path, model: PreTrainedModel, tokens: Tensor) -> float:
    """What reading the checkpoint back changes, which must be nothing."""
    with quiet():
        difference = verify(folder, model, tokens[:1, :VERIFY_TOKENS])
    if difference:
        raise ReadBackError(f"the checkpoint reads back with logits {difference:.3g} away from the model it was made of")
    return difference


def table(report: dict) -> str:
    """What a person wants to know at the end."""
    linears = report["linears"]
    settings = report["settings"]
    lines = [f"{len(linears)} linears, {settings['format']}, {report['bytes'] / 1e6:.0f} MB, {report['seconds']:.0f} s"]
    measured = [linear for linear in linears if linear["error"] is not None]
    mean = {key: sum(linear[key] for linear in measured) / len(measured) for key in ("error", "rtn_error")}
    worst = max(measured, key=lambda linear: linear["error"])
    lines.append(f"relative output error: mean {mean['error']:.4f} (RTN absmax {mean['rtn_error']:.4f})")
    lines.append(f"                       largest {worst['error']:.4f}, {worst['name']}")
    scores = {name: value for name, value in report.items() if isinstance(value, dict) and "ppl" in value}
    if scores:
        first = next(iter(scores.values()))
        lines.append(f"{first['tokens']} tokens in windows of {first['window']}:")
        lines.append(f"  {'':10} {'token ppl':>10} {'KL (nats)':>10}")
        lines += [f"  {name:10} {value['ppl']:10.3f} {value['kl']:10.5f}" for name, value in scores.items()]
    if "reload_max_abs_diff" in report:
        lines.append(f"read back by transformers: max |logit difference| = {report['reload_max_abs_diff']:g}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        print(table(run(args)))
    except (ValueError, OSError, SafetensorError, CertificateError, ReadBackError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
