"""`ptq_manifest.json`: a hash of every tensor, so that a copy can be told from what was written."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ptq.export.files import save_text
from ptq.export.index import header

MANIFEST = "ptq_manifest.json"
PIECE = 1 << 24
blake2b = partial(hashlib.blake2b, digest_size=32)


def write_manifest(folder: Path) -> Path:
    """Writes the manifest of the folder's safetensors files, and returns its path.  To be called once all tensors are there."""
    tensors = {name: {"file": path.name, "blake2b": digest} for name, path, digest in hashes(folder)}
    content = {"hash": "blake2b, 32 bytes, of a tensor's bytes as stored", "tensors": dict(sorted(tensors.items()))}
    save_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")
    return folder / MANIFEST


def read_manifest(folder: Path) -> dict[str, dict] | None:
    """By tensor its file and hash; None where there is no manifest."""
    path = folder / MANIFEST
    return json.loads(path.read_text())["tensors"] if path.exists() else None


def hashes(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Tensor, file and hash; one piece of one tensor at a time is in memory."""
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            for name, about in header(path).items():
                first, last = about["data_offsets"]
                file.seek(start + first)
                digest = blake2b()
                for at in range(first, last, PIECE):
                    digest.update(file.read(min(PIECE, last - at)))
                yield name, path, digest.hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """By name, the hash that `hashes` finds once they are stored."""
    raw = {name: tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    return {name: blake2b(data.data).hexdigest() for name, data in raw.items()}
