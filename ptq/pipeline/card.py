"""The model card: README.md of a checkpoint, of which the hub reads the first lines.

It holds no times and no paths, so that the same run writes the same bytes.
"""

import json
import re

from ptq.run.plan import Plan
from ptq.run.summary import scores_of
from ptq.settings import is_hub_id, short_name

NAMES = {"nvfp4": "NVFP4", "mxfp4": "MXFP4", "mxfp4-round": "MXFP4", "int4": "INT4"}


def model_card(report: dict, plan: Plan) -> str:
    """Markdown with YAML front matter."""
    settings = report["settings"]
    formats = " and ".join(dict.fromkeys(NAMES.get(format.name, format.name) for format in plan.formats.values()))
    name = short_name(report["model"])
    left = f"; {len(plan.ignored)} linears were left alone" if plan.ignored else ""
    parts = [
        front_matter(report["model"], dict.fromkeys(format.name for format in plan.formats.values())),
        f"# {name}, {formats}\n",
        f"{name} with the weights of {len(plan.linears)} linears in {formats}{left}, made by ptq {report['versions']['ptq']}. "
        f"{kept(plan)} are bfloat16.\n",
        f"## How it was made\n\n{method(settings, report)}\n{made_by(report)}",
        f"## What it lost\n\n{losses(report)}\n{samples(report)}",
        "## How to use it\n",
        *([] if plan.first < 0 else [VLLM]),  # which loads no embeddings in FP8
        TRANSFORMERS,
        f"Versions: {', '.join(f'{package} {version}' for package, version in report['versions'].items())}; {report['device']}.\n",
    ]
    return "\n".join(parts)


VLLM = """In vLLM, with this folder or the id of its repository for MODEL:

```
vllm serve MODEL
```
"""

TRANSFORMERS = """In transformers, which needs the package compressed-tensors:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="bfloat16", device_map="auto")
tokenizer = AutoTokenizer.from_pretrained("MODEL")
```
"""


def kept(plan: Plan) -> str:
    """What is in no format."""
    head = [] if "lm_head" in plan.recipes else ["the output head"]
    names = [*(["embeddings"] if plan.first == 0 else []), "norms", *head]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]])).capitalize()


def front_matter(model: str, formats: dict[str, None]) -> str:
    """YAML; JSON strings are YAML strings."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if is_hub_id(model):
        lines += [f"base_model: {json.dumps(model)}", "base_model_relation: quantized"]
    tags = [*formats, "4-bit", "quantized", "compressed-tensors", "ptq"]
    return "\n".join([*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in tags), "---\n"])


def method(settings: dict, report: dict) -> str:
    how = f"Method {settings['method']}, block scales by rule `{settings['rule']}`"
    if settings["method"] == "gptq":
        how += f", effort `{settings['effort']}`, damping {settings['damp']:g}, drift {settings['drift']}"
        how += f", token importance {settings['token_importance']}, row feedback {'on' if settings['row_feedback'] else 'off'}"
    size, text = f"{settings['sequences']} × {settings['length']} tokens", short_name(settings["calibration"])
    return f"{how}. Calibrated on {size} of {text} ({report['calibrated_on']})."


def made_by(report: dict) -> str:
    return f"\n```\n{report['command']}\n```\n" if report["command"] else ""


def losses(report: dict) -> str:
    """Errors of the linears, and scores where there are any."""
    measured = [linear for linear in report["linears"] if linear["error"] is not None]
    lines = []
    if measured:
        mean, usual = (sum(linear[key] for linear in measured) / len(measured) for key in ("error", "rtn_error"))
        lines.append(f"Relative error of a linear's output, mean: {mean:.4f} (round to nearest: {usual:.4f}).")
    scores = scores_of(report)
    if scores:
        first = next(iter(scores.values()))
        lines += [
            f"\n{first['tokens']} tokens of {short_name(report['settings']['evaluate'])} in windows of {first['window']}, "
            f"scored in {first['dtype']}:\n",
            "| | token perplexity | KL to the original (nats) |\n|---|---:|---:|",
            *(f"| {name} | {value['ppl']:.3f} | {value['kl']:.5f} |" for name, value in scores.items()),
        ]
    return "\n".join(lines) or "Not measured: this method needs no calibration, and no text was given to evaluate on."


def samples(report: dict) -> str:
    """What the original and the checkpoint say after the first words of the text that was evaluated on."""
    if "samples" not in report:
        return ""
    names = {"prompt": "The text begins", "original": "The original goes on"}
    parts = [f"{names.get(name, 'This checkpoint goes on')}:\n\n{fenced(text)}" for name, text in report["samples"].items()]
    return "\n## What it says\n\nThe likeliest token, again and again. " + "\n\n".join(parts) + "\n"


def fenced(text: str) -> str:
    """As it is, whatever marks it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"
