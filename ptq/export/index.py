"""The tensors of a folder of safetensors files: which file holds each, read without loading the rest."""

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ptq.export.files import save_text

INDEX = "model.safetensors.index.json"


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of each tensor, from the files' own headers."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def header(path: Path) -> dict[str, dict]:
    """By tensor name, its dtype (safetensors' word for it), shape and data_offsets, from the head of the file."""
    with path.open("rb") as file:
        content = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    content.pop("__metadata__", None)
    return content


def read_tensors(files: dict[str, Path], names: Iterable[str]) -> dict[str, Tensor]:
    """Those tensors, on the CPU."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    tensors: dict[str, Tensor] = {}
    for path, wanted in by_file.items():
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in wanted}
    return tensors


def write_index(folder: Path) -> None:
    """Writes the index that names each tensor's file."""
    files = {name: path.name for name, path in tensor_files(folder).items()}
    size = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as raw:  # what follows the header is the tensors
            size += path.stat().st_size - 8 - int.from_bytes(raw.read(8), "little")
    index = {"metadata": {"total_size": size}, "weight_map": files}
    save_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
