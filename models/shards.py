"""The safetensors files of a checkpoint: what is in them, without reading it, and reading tensors by name."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """Tensors of a model folder by name.

    Raises ValueError that names the file that is damaged, or missing though the index names it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path in shard_paths(folder):
            for name, entry in json.loads(read_header(path)).items():
                if name != "__metadata__":
                    self.tensors[name] = Stored(path, entry["dtype"], tuple(entry["shape"]))

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor of a float dtype, which is how transformers decides."""
        return next(DTYPES[stored.dtype] for stored in self.tensors.values() if stored.dtype in DTYPES)

    def read(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """Tensors on the CPU, in pinned memory with `pin`.  Raises ValueError that names one that is not there."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"{self.folder} holds no tensor {name}")
            by_file.setdefault(self.tensors[name].path, []).append(name)
        found: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in wanted:
                    tensor = file.get_tensor(name)
                    found[name] = tensor.pin_memory() if pin else tensor
        return found


def shard_paths(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from None
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name}, which {index.name} names")
    return [folder / name for name in names]


def read_header(path: Path) -> bytes:
    """The JSON header.  Raises ValueError where header and length do not fit."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
