"""What is written for each model: whole files, and what a result depends on."""

import hashlib
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.absolute().parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text + "\n")
    partial.replace(path)


def stamp(source: str) -> str | None:
    """A hash of names, sizes and times of the files of a local model or text; None for a hub id."""
    path = Path(source).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16] if files else None


def labels(sources: Sequence[str]) -> list[str]:
    """Short names for the models: the last part of the path, numbered where they repeat."""
    names: list[str] = []
    for source in sources:
        name = Path(source).expanduser().resolve().name if Path(source).exists() else source.rpartition("/")[2]
        taken = sum(other == name or other.startswith(f"{name}-") for other in names)
        names.append(f"{name}-{taken + 1}" if name in names else name)
    return names


def surroundings(device: str) -> dict[str, Any]:
    """Versions and device, as a result holds them."""
    return {
        "versions": {name: version(name) for name in ("torch", "transformers", "lm_eval")},
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
    }


def provenance(source: str) -> dict[str, Any]:
    """`made_by` and `quantize_seconds` of a checkpoint, from what quantize_llama.py or a peer's runner left beside it.

    And `bits_per_weight` of one that holds dequantized weights, as its format would take.
    """
    folder, found = Path(source).expanduser(), {"made_by": None, "quantize_seconds": None}
    if (folder / "peer.json").is_file():
        peer = json.loads((folder / "peer.json").read_text())
        found |= {"made_by": f"{peer['peer']} {peer['version']}, {peer['recipe']}", "quantize_seconds": peer["seconds"]}
        if "dequantized_bits_per_weight" in peer:
            found["bits_per_weight"] = peer["dequantized_bits_per_weight"]
    elif (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text())
        settings = report.get("settings", {})
        names = [str(settings.get(name)) for name in ("format", "method", "rule", "token_importance")]
        if settings.get("method") == "gptq" and settings.get("effort"):
            names.append(f"effort {settings['effort']}")
        found |= {"made_by": f"ptq {', '.join(names)}", "quantize_seconds": report.get("seconds")}
    return found
