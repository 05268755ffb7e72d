#!/usr/bin/env python
"""Other people's quantizers and ours on one model, with the same calibration tokens, in one table.

    python scripts/compare_peers.py MODEL --calibration c4.jsonl.gz --work build/peers/llama --output results/peers -- \\
        --text wiki.test.raw --tasks arc_easy,piqa --task-data DIR

Makes in --work: the model in bfloat16, from which everyone starts; tokens.npy, which everyone calibrates on; and a checkpoint for
each recipe, unless it is there already.  Then scripts/evaluate.py, with what stands after `--`, compares them all with the model.

Peers run in environments of their own (--environments, made where they are missing), or by the command that --python gives.  One
that fails is named with its error, and the others go on; its whole output is in --work/RECIPE.log.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers

from ptq.data.chat import encoder
from ptq.data.text import all_windows, read_documents, sample_windows
from ptq.eval.checkpoint import load_any
from ptq.models.loading import check_fit, quiet

SCRIPTS = Path(__file__).resolve().parent
ENVIRONMENTS = {
    "llm-compressor": ["llmcompressor==0.14.0.1"],  # pins compressed-tensors 0.19.0 and transformers <= 5.17
    "modelopt": ["nvidia-modelopt==0.47.0", "transformers==5.17.0", "accelerate", "triton"],
    "auto-round": ["auto-round==0.14.2", "transformers==5.17.0"],
    "qwantize": ["qwantize==0.1.1", "transformers==5.17.0"],
}


@dataclass(frozen=True)
class Recipe:
    """`environment`: whose python runs `runner`; "ptq" for our own.  `arguments`: what the runner gets after its folders."""

    environment: str
    runner: str
    arguments: tuple[str, ...]
    needs_gpu: str = ""


def ours(*arguments: str) -> Recipe:
    return Recipe("ptq", "quantize_llama.py", arguments)


def llm_compressor(recipe: str) -> Recipe:
    return Recipe("llm-compressor", "peers/llm_compressor.py", (recipe,))


STATIC = "its static NVFP4 quantizers are Triton kernels that it imports only where there is a CUDA device"
RECIPES = {
    "ptq-nvfp4-rtn": ours("--method", "rtn", "--rule", "absmax"),
    "ptq-nvfp4-rtn-local": ours("--method", "rtn", "--rule", "local"),
    "ptq-nvfp4-fast": ours("--effort", "fast"),
    "ptq-nvfp4": ours(),
    "ptq-nvfp4-best": ours("--effort", "best"),
    "ptq-mxfp4": ours("--format", "mxfp4"),
    "ptq-int4": ours("--format", "int4", "--block", "{block}"),
    "ptq-nvfp4-w4a4-rtn": ours("--activations", "nvfp4", "--method", "rtn", "--rule", "absmax"),
    "ptq-nvfp4-w4a4": ours("--activations", "nvfp4"),
    "ptq-nvfp4-w4a4-best": ours("--activations", "nvfp4", "--effort", "best"),
    "llmcompressor-nvfp4-rtn": llm_compressor("NVFP4A16-rtn"),
    "llmcompressor-nvfp4-gptq": llm_compressor("NVFP4A16-gptq"),
    "llmcompressor-nvfp4-w4a4-rtn": llm_compressor("NVFP4-rtn"),
    "llmcompressor-nvfp4-w4a4-gptq": llm_compressor("NVFP4-gptq"),
    "llmcompressor-mxfp4-rtn": llm_compressor("MXFP4A16-rtn"),
    "llmcompressor-mxfp4-gptq": llm_compressor("MXFP4A16-gptq"),
    "llmcompressor-int4-gptq": llm_compressor("W4A16-gptq-{block}"),
    "modelopt-nvfp4-max": Recipe("modelopt", "peers/model_optimizer.py", ("max",)),
    "modelopt-nvfp4-w4a4": Recipe("modelopt", "peers/model_optimizer.py", ("default",)),
    "modelopt-nvfp4-mse": Recipe("modelopt", "peers/model_optimizer.py", ("mse",), STATIC),
    "modelopt-nvfp4-local_hessian": Recipe("modelopt", "peers/model_optimizer.py", ("local_hessian",), STATIC),
    "qwantize-nvfp4": Recipe("qwantize", "peers/qwantize_nvfp4.py", ("optimal_hessian",)),
    "autoround-nvfp4": Recipe("auto-round", "peers/auto_round_nvfp4.py", ("200",)),
}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    given = sys.argv[1:] if argv is None else argv
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s MODEL --work DIR … [-- …]"
    )
    parser.add_argument("model", metavar="MODEL", help="local folder, hub id or .gguf file")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), metavar="RECIPE", help=", ".join(RECIPES))
    parser.add_argument("--ours", nargs="+", default=[], metavar="NAME=OPTIONS", help="more recipes: of quantize_llama.py")
    parser.add_argument("--calibration", default="builtin", metavar="TEXT", help="as quantize_llama.py (default: %(default)s)")
    parser.add_argument("--sequences", type=int, default=128, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=1024, metavar="N", help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which sequences are drawn (default: %(default)s)")
    parser.add_argument("--block", type=int, default=128, metavar="N", help="weights a scale of int4 (default: %(default)s)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="checkpoints, tokens and logs")
    parser.add_argument("--output", metavar="PREFIX", help="of the report, as evaluate.py's (default: make checkpoints only)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="recipes at a time (default: %(default)s)")
    parser.add_argument("--environments", type=Path, default=Path("build/peers"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--python", nargs="+", default=[], metavar="PEER=COMMAND", help="an environment that is there already")
    args = parser.parse_args(given[:split])
    args.evaluation = given[split + 1 :]
    args.python = dict(pair.split("=", 1) if "=" in pair else parser.error(f"--python {pair}: no =") for pair in args.python)
    args.ours = [pair.split("=", 1) if "=" in pair else parser.error(f"--ours {pair}: no =") for pair in args.ours]
    args.all = RECIPES | {name: ours(*shlex.split(options)) for name, options in args.ours}
    args.recipes = list(dict.fromkeys([*args.recipes, *(name for name, _ in args.ours)]))
    strange = [name for name in args.recipes if name not in args.all]
    if strange:
        parser.error(f"recipe {strange[0]!r}: there are {', '.join(args.all)}")
    unknown = args.python.keys() - ENVIRONMENTS.keys()
    if unknown:
        parser.error(f"--python {min(unknown)}: peers are {', '.join(ENVIRONMENTS)}")
    return args


def prepare(args: argparse.Namespace) -> None:
    """The model in bfloat16 and the calibration tokens, where they are not there yet."""
    settings = {name: str(getattr(args, name)) for name in ("model", "calibration", "sequences", "length", "seed")}
    noted = args.work / "settings.json"
    if noted.is_file():
        if json.loads(noted.read_text()) != settings:
            raise ValueError(f"{args.work} was made with other settings, {noted.read_text().strip()}; name another --work")
        return
    documents = read_documents(args.calibration)
    with quiet():
        loaded = load_any(args.model, dtype=torch.bfloat16)
    windows = all_windows(encoder(loaded.tokenizer), documents, args.length, args.calibration)
    check_fit(int(windows.max()), loaded.model, args.model)
    tokens = sample_windows(windows, args.sequences, args.seed, args.calibration)
    original = args.work / "original"
    loaded.model.save_pretrained(original)
    loaded.tokenizer.save_pretrained(original)
    np.save(args.work / "tokens.npy", tokens.numpy())
    noted.write_text(json.dumps(settings) + "\n")


def interpreter(environment: str, args: argparse.Namespace) -> str:
    """The python of an environment, which is made where it is missing, with our own version of torch."""
    if environment == "ptq":
        return sys.executable
    if environment in args.python:
        return args.python[environment]
    python = args.environments.absolute() / environment / "bin" / "python"
    if not python.exists():
        print(f"making {python.parent.parent}", file=sys.stderr)
        torch_version = f"torch=={torch.__version__.partition('+')[0]}"
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", torch_version, *ENVIRONMENTS[environment]], check=True)
    return str(python)


def make(name: str, python: str, args: argparse.Namespace) -> str | None:
    """Runs a recipe by that python; None, or why there is no checkpoint."""
    recipe, output = args.all[name], args.work / name
    if recipe.needs_gpu and not torch.cuda.is_available():
        return f"needs a GPU: {recipe.needs_gpu}"
    given = [argument.format(block=args.block) for argument in recipe.arguments]
    original, tokens = str(args.work / "original"), str(args.work / "tokens.npy")
    if recipe.environment == "ptq":
        chosen = [f"--{key}={getattr(args, key)}" for key in ("calibration", "sequences", "length", "seed")]
        arguments = [original, "--output", str(output), *chosen, *given]
    else:
        arguments = [original, tokens, str(output), *given]
    command = [python, str(SCRIPTS / recipe.runner), *arguments]
    begin = time.perf_counter()
    log = args.work / f"{name}.log"
    with log.open("w") as file:
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    print(f"{name}: {'made' if status == 0 else 'failed'} in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    return None if status == 0 else f"{last_error(log.read_text())} (all of it: {log})"


def last_error(output: str) -> str:
    """The last line that is an exception's, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in reversed(lines) if re.match(r"(error|[\w.]*(Error|Exception)): ", line)), lines[-1])


def run(args: argparse.Namespace) -> dict[str, str]:
    """Makes what is missing, evaluates what there is; returns why the rest is not there."""
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args)
    wanted = [name for name in args.recipes if not (args.work / name / "config.json").is_file()]
    pythons = {name: interpreter(name, args) for name in sorted({args.all[name].environment for name in wanted})}
    with ThreadPoolExecutor(args.jobs) as pool:
        reasons = pool.map(lambda name: make(name, pythons[args.all[name].environment], args), wanted)
        missing = {name: reason for name, reason in zip(wanted, reasons, strict=True) if reason}
    if not args.output:
        return missing
    models = ["original", *(name for name in args.recipes if name not in missing)]
    command = [sys.executable, str(SCRIPTS / "evaluate.py"), *(str(args.work / name) for name in models)]
    subprocess.run([*command, "--output", args.output, "--reuse", *args.evaluation], check=True)
    return missing


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        missing = run(args)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, reason in missing.items():
        print(f"no {name}: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
