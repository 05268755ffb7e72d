"""The safetensors files of a checkpoint: what is in them, without reading it, and reading tensors by name."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub.constants import SAFETENSORS_INDEX_FILE, SAFETENSORS_SINGLE_FILE
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ptq.runtime.checks import check_finite

LARGEST_INDEX = 10**8  # bytes, as many as safetensors allows a header
LARGEST_WEIGHT = 1e15  # sums of squares of errors stay within float32
CHANGED = "was changed or removed while it was read; nothing may write to the model's folder"
LAYER_NUMBER = re.compile(r"\blayers\.([0-9]{1,9})\.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Stored:
    """Where a tensor is, and what.  `begin`, `end`: its bytes in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Shards:
    """Tensors of a model folder by name.

    Raises ValueError that names the file that is damaged, or missing though the index names it, and a tensor that two hold.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self._stamps: dict[Path, tuple[int, int]] = {}
        for path in shard_paths(folder):
            self._stamps[path] = stamp(path)
            header = read_header(path)
            start = 8 + len(header)
            for name, entry in json.loads(header).items():
                if name != "__metadata__":
                    if name in self.tensors:
                        raise ValueError(f"{path} holds {name}, and so does {self.tensors[name].path.name}; remove one of them")
                    self.tensors[name] = Stored(
                        path, entry["dtype"], tuple(entry["shape"]), *(start + offset for offset in entry["data_offsets"])
                    )

    @property
    def dtype(self) -> torch.dtype:
        """Of the first tensor of a float dtype, which is how transformers decides."""
        return next(DTYPES[stored.dtype] for stored in self.tensors.values() if stored.dtype in DTYPES)

    def read(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """Tensors on the CPU, in pinned memory with `pin`.  Raises ValueError that names one that is not there, or a file that was
        changed since it was opened: layers of two models would be mixed."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            if name not in self.tensors:
                raise ValueError(f"{self.folder} holds no tensor {name}")
            by_file.setdefault(self.tensors[name].path, []).append(name)
        found: dict[str, Tensor] = {}
        for path, wanted in by_file.items():
            try:
                with path.open("rb") as file:
                    for name in wanted:
                        found[name] = read_tensor(file, name, self.tensors[name], pin=pin)
                    as_opened = stamp(file.fileno()) == self._stamps[path]
            except FileNotFoundError:
                as_opened = False
            if not as_opened:
                raise ValueError(f"{path} {CHANGED}")
        return found


def read_tensor(file: BinaryIO, name: str, stored: Stored, *, pin: bool) -> Tensor:
    """The tensor in memory of its own: a mapped file that becomes shorter would end the process with SIGBUS.

    Raises ValueError for a file that became shorter, and for a dtype that is not one of `DTYPES`.
    """
    if stored.dtype not in DTYPES:
        raise ValueError(f"{stored.path}: {name} is in {stored.dtype}; give the original, in {', '.join(DTYPES)}")
    data = torch.empty(stored.end - stored.begin, dtype=torch.uint8, pin_memory=pin)
    file.seek(stored.begin)
    if file.readinto(memoryview(data.numpy())) != len(data):  # type: ignore[attr-defined]
        raise ValueError(f"{stored.path} {CHANGED}")
    return data.view(DTYPES[stored.dtype]).view(stored.shape)


def stamp(file: Path | int) -> tuple[int, int]:
    """Changes with every write to the file, or what is open under that number; (0, 0) where there is none."""
    try:
        found = os.stat(file)
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def layers_of(names: Iterable[str]) -> int:
    """How many layers there are by the largest number in the tensors' names."""
    return max((int(found[1]) + 1 for name in names if (found := LAYER_NUMBER.search(name))), default=0)


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files that transformers would read; none where it would read .bin files.  Raises ValueError for an index that
    is damaged, or that names what is not there or not in the folder, and for files that no index names."""
    index = folder / SAFETENSORS_INDEX_FILE
    if (folder / SAFETENSORS_SINGLE_FILE).is_file():
        return [folder / SAFETENSORS_SINGLE_FILE]
    if not index.is_file():
        others = sorted(folder.glob("*.safetensors"))
        if others and not any(folder.glob("*.bin")):
            raise ValueError(
                f"{folder} holds {others[0].name}, but no {SAFETENSORS_SINGLE_FILE} and no {SAFETENSORS_INDEX_FILE}, by which "
                "transformers finds weights; rename the file if it is the only one, or give the index that belongs to it"
            )
        return []
    if index.stat().st_size > LARGEST_INDEX:
        raise ValueError(f"{index} has {index.stat().st_size} bytes, too many for an index")
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged: {error!r}"[:300]) from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name) > 255:
            raise ValueError(f"{index} names {name!r}, which is no file name; shards must be in the folder itself"[:300])
        if not (folder / name).is_file():
            raise ValueError(f"{folder} lacks {name!r}, which {index.name} names")
    return [folder / name for name in names]


def check_links(folder: Path, patterns: Iterable[str]) -> None:
    """Raises ValueError that names a file that is a link out of the folder (the hub's cache keeps its files in blobs/ beside)."""
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parent.parent / "blobs")
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_symlink()):
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise ValueError(f"{path} is a link to {target}, out of the model's folder; copy the file, or give its own folder")


def check_weights(path: Path) -> None:
    """Raises ValueError that names a tensor of a safetensors file with a value that is not finite, or of absurd size."""
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # it is no dictionary
            tensor = file.get_tensor(name)
            if tensor.dtype not in DTYPES.values() or not tensor.numel():
                continue
            low, high = tensor.aminmax()  # NaN where one is in the tensor
            if not -LARGEST_WEIGHT <= float(low) <= float(high) <= LARGEST_WEIGHT:
                check_finite(f"{path}: {name}", tensor)
                size = max(-float(low), float(high))
                raise ValueError(
                    f"{path}: {name} holds a weight of {size:.3g}; errors of more than {LARGEST_WEIGHT:.0e} overflow"
                )


def read_header(path: Path) -> bytes:
    """The JSON header.  Raises ValueError where header and length do not fit."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())[:300]}") from None
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))
