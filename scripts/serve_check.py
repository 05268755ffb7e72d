#!/usr/bin/env python
"""What serving engines compute from our checkpoints, in every layout they load, beside what transformers computes.

    python scripts/serve_check.py CHECKPOINT… --text wiki.test.raw --commit abc1234
    python scripts/serve_check.py CHECKPOINT… --text wiki.test.raw --engines llama.cpp --commit abc1234

A CHECKPOINT is what `ptq quantize` wrote; it is converted to the layouts that hold its format, bit for bit.  On the same tokens
each engine's mean NLL is set beside that of transformers on the checkpoint (in bfloat16 for vLLM, in float32 for llama.cpp, which
rounds inputs to 8 bits), and so is what it says next, greedily.  Rows are appended to the CSV.  Ends with 1 where an engine
failed or vLLM is more than 3e-3 away.  docs/serving.md says how to run it, and what came out.
"""

import argparse
import csv
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ptq.export.convert import convert
from ptq.export.reader import open_checkpoint

PROMPT, FOLLOWING = 32, 32  # tokens of the first window, and how many are said after them
TOLERANCE = {"vllm": 3e-3}  # nats a token: bfloat16, in another order
FIELDS = (
    *("model", "format", "layout", "engine", "kernel", "tokens", "nll_transformers", "nll_engine", "difference", "same_greedy"),
    *("gpu", "torch", "transformers", "commit"),
)


@dataclass(frozen=True)
class Said:
    """Mean NLL in nats of the windows' tokens but the first of each, the greedy continuation's ids, and what said so."""

    nll: float
    following: list[int]
    engine: str = "transformers"
    kernel: str = ""


@dataclass(frozen=True)
class Engine:
    """`run`: (folder, windows, options) -> what it says.  `dtype`: of the model it is held against."""

    layouts: tuple[str, ...]
    dtype: torch.dtype
    run: Callable[[Path, Tensor, Mapping[str, Any]], Said]


def transformers_says(folder: Path, windows: Tensor, dtype: torch.dtype) -> Said:
    from transformers import AutoConfig

    from ptq.eval.perplexity import score_models
    from ptq.eval.sample import continuation
    from ptq.export.read_back import load_checkpoint
    from ptq.models.families import family_of
    from ptq.models.loading import quiet

    family = family_of(AutoConfig.from_pretrained(folder), str(folder))
    how = {"experts": family.experts is not None, "attention": family.attention, "dtype": dtype}
    with quiet():
        model = load_checkpoint(folder, **how, device="cuda" if torch.cuda.is_available() else "cpu")
    scores = score_models({"checkpoint": model}, windows)["checkpoint"]
    following = continuation(model, windows[0, :PROMPT])[:FOLLOWING]
    return Said(sum(s.nll for s in scores) / sum(s.tokens for s in scores), following.tolist())


def vllm_says(folder: Path, windows: Tensor, options: Mapping[str, Any]) -> Said:
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the model is then in this process, to be looked at
    from vllm import LLM, SamplingParams, __version__  # type: ignore[import-not-found]

    length = max(windows.shape[1] + 1, PROMPT + FOLLOWING)
    about = {"dtype": "bfloat16", "max_model_len": length, "enforce_eager": True, "enable_prefix_caching": False}
    llm = LLM(str(folder), skip_tokenizer_init=True, generation_config="vllm", **{**about, **options})
    ask = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    prompts = windows.tolist()
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], ask, use_tqdm=False)
    found = [a.prompt_logprobs[i][ids[i]].logprob for a, ids in zip(answers, prompts, strict=True) for i in range(1, len(ids))]
    ask = SamplingParams(temperature=0, max_tokens=FOLLOWING, ignore_eos=True, detokenize=False)
    answer = llm.generate([{"prompt_token_ids": prompts[0][:PROMPT]}], ask, use_tqdm=False)[0]
    following, names = list(answer.outputs[0].token_ids), ", ".join(llm.apply_model(kernels)[0])
    return Said(-sum(found) / len(found), following, f"vllm {__version__}", names)


def kernels(model: nn.Module) -> list[str]:
    """Of the quantized linears and experts: vLLM's names."""
    found = set()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        kernel = getattr(getattr(module, "scheme", None), "kernel", None) or getattr(method, "kernel", None)
        name = type(kernel or method).__name__
        if method is not None and not name.startswith("Unquantized") and "KVCache" not in name:
            found.add(name)
    return sorted(found)


def llama_cpp_says(folder: Path, windows: Tensor, options: Mapping[str, Any]) -> Said:
    from llama_cpp import Llama, __version__  # type: ignore[import-not-found]

    about = {"n_ctx": max(windows.shape[1], PROMPT + FOLLOWING), "logits_all": True, "verbose": False}
    llm = Llama(str(next(folder.glob("*.gguf"))), **{**about, **options})
    loss = 0.0
    for window in windows:
        llm.reset()
        llm.eval(window.tolist())
        logits = torch.from_numpy(llm.scores[: len(window) - 1]).double()
        loss += float(nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    llm.reset()
    llm.eval(windows[0, :PROMPT].tolist())
    following: list[int] = []
    while len(following) < FOLLOWING:
        following.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(following[-1:])
    return Said(loss / windows[:, 1:].numel(), following, f"llama-cpp-python {__version__}", "CPU")


ENGINES = {
    "vllm": Engine(("compressed-tensors", "modelopt", "gptq", "gptq-v2"), torch.bfloat16, vllm_says),
    "llama.cpp": Engine(("gguf",), torch.float32, llama_cpp_says),
}


def apart(function: Callable[..., Said], *arguments: object) -> Future[Said]:
    """`function` in a process of its own, which has ended and given the device back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments)


def windows_of(folder: Path, text: str, length: int, count: int) -> Tensor:
    from transformers import AutoTokenizer

    from ptq.data.chat import encoder
    from ptq.data.text import all_windows, read_texts

    return all_windows(encoder(AutoTokenizer.from_pretrained(folder)), read_texts(text), length, text)[:count]


def check(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each engine and layout that holds the checkpoint, without numbers where the engine failed."""
    checkpoint = open_checkpoint(folder)
    windows = windows_of(folder, args.text, args.length, args.windows)
    formats = dict.fromkeys(checkpoint.format(name).name for name in checkpoint.linears)
    common = {"model": args.model or folder.name, "format": " ".join(formats), "tokens": windows[:, 1:].numel()}
    for name in args.engines:
        engine = ENGINES[name]
        expected = apart(transformers_says, folder, windows, engine.dtype).result()
        for layout in engine.layouts:
            with tempfile.TemporaryDirectory() as temporary:
                target = folder if layout == "compressed-tensors" else Path(temporary) / "converted"
                try:
                    if target != folder:
                        convert(folder, target, layout)
                except ValueError as reason:
                    print(f"{folder.name}: not in the layout {layout}: {reason}", flush=True)
                    continue
                found = apart(engine.run, target, windows, args.options)
            if failure := found.exception():
                print(f"{folder.name}: {name} with the layout {layout}: {failure!r}", flush=True)
            yield common | {"layout": layout, "engine": name} | ({} if failure else beside(expected, found.result()))


def beside(expected: Said, found: Said) -> dict[str, Any]:
    same = [a == b for a, b in zip(expected.following, found.following, strict=True)]
    return {
        "engine": found.engine,
        "kernel": found.kernel,
        "nll_transformers": round(expected.nll, 5),
        "nll_engine": round(found.nll, 5),
        "difference": round(found.nll - expected.nll, 5),
        "same_greedy": f"{[*same, False].index(False)} of {len(same)}",
    }


def append(path: Path, row: Mapping[str, Any]) -> None:
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if fresh:
            writer.writeheader()
        writer.writerow(row)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--text", required=True, metavar="TEXT", help="as for `ptq evaluate`")
    parser.add_argument("--length", type=int, default=256, help="tokens a window (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=32, help="the first N windows (default: %(default)s)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["vllm"], help="default: vllm")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="more arguments for the engine")
    parser.add_argument("--model", help="its name in the CSV (default: the folder's)")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/serving.csv"))
    parser.add_argument("--commit", required=True, help="recorded in the CSV")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args, wrong = parse_arguments(argv), False
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    about = {"gpu": gpu, "torch": torch.__version__, "transformers": version("transformers"), "commit": args.commit}
    for folder in args.checkpoints:
        for row in check(folder, args):
            if "difference" in row:
                append(args.csv, row | about)
            limit = TOLERANCE.get(row["engine"].split()[0], math.inf)
            off = not abs(row.get("difference", math.nan)) <= limit
            wrong |= off
            print("  ".join(map(str, row.values())), "WRONG" if off else "", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
