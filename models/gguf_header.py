"""The tables at the start of a GGUF file, read within bounds before the gguf package, which trusts their counts, reads them.

Layout: github.com/ggml-org/ggml, docs/gguf.md, versions 2 and 3.
"""

import mmap
import struct
from pathlib import Path
from typing import Any

from ptq.models.configuration import check_sizes

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_DIMENSIONS, LONGEST = 4, 64
NAMES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
}
PLAIN = ("llama", "qwen2", "qwen3")
EMBEDDING = "token_embd.weight"
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
IN_LAYERS = {
    **{f"attn_{end}": f"self_attn.{end}_proj" for end in ("q", "k", "v")},
    **{f"attn_{end}_norm": f"self_attn.{end}_norm" for end in ("q", "k")},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    **{"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
}


class Cursor:
    """Reads one value after the other.  Raises ValueError where one would end after the file."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def skip(self, count: int) -> int:
        """Where the `count` bytes start that are skipped."""
        start = self.at
        if count > len(self.data) - start:
            raise ValueError(f"{count} bytes are to follow byte {start}, but the file has {len(self.data)}")
        self.at += count
        return start

    def scalar(self, code: str) -> Any:
        return struct.unpack_from(f"<{code}", self.data, self.skip(struct.calcsize(f"<{code}")))[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")  # an error is a ValueError too

    def value(self) -> Any:
        """A number or a short string, or None for what is skipped: longer ones and arrays.  Arrays of arrays no model has."""
        kind = self.scalar("I")
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            if kind in SCALARS:
                self.skip(count * struct.calcsize(f"<{SCALARS[kind]}"))
                return None
        elif kind == STRING:
            length = self.scalar("Q")
            start = self.skip(length)
            return self.data[start : start + length].decode("utf-8", "replace") if length <= LONGEST else None
        if kind != STRING:
            raise ValueError(f"a value of type {kind} before byte {self.at}")
        for _ in range(count):  # each takes eight bytes at least
            self.skip(self.scalar("Q"))
        return None


def check_gguf(path: Path) -> None:
    """Raises ValueError of one line where the tables do not fit the file, and where they name sizes that the tensors belie."""
    fields, shapes = open_tables(path)
    sizes = sizes_in(fields)
    layers = 1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("blk.")), default=-1)
    check_sizes(str(path), sizes, list(shapes.values()), layers, path.stat().st_size)


def open_tables(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return read_tables(Cursor(data))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def sizes_in(fields: dict[str, Any]) -> dict[str, Any]:
    """By the names that configs have."""
    found = {name: fields[key] for key in fields for tail, name in NAMES.items() if key.endswith(f".{tail}")}
    return {name: value for name, value in found.items() if value is not None}


def as_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]] | None:
    """(config, shape by name) as transformers' checkpoints have them, of a file without anything that it would not be enough for;
    None for other architectures than `PLAIN`, and without a tokenizer."""
    fields, shapes = open_tables(path)
    if fields.get("general.architecture") not in PLAIN or "tokenizer.ggml.tokens" not in fields or EMBEDDING not in shapes:
        return None
    renamed = {}
    for name, shape in shapes.items():
        *place, part, kind = name.split(".")
        layer = f"model.layers.{place[1]}." if len(place) == 2 else ""
        renamed[f"{layer}{(IN_LAYERS if layer else OUTSIDE).get(part, part)}.{kind}"] = shape[::-1]
    config = {"model_type": fields["general.architecture"], "vocab_size": shapes[EMBEDDING][-1], **sizes_in(fields)}
    renamed.pop("rope_freqs.weight", None)  # which transformers makes anew
    return config | {"tie_word_embeddings": "output.weight" not in shapes}, renamed


def read_tables(cursor: Cursor) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(fields, shapes of the tensors).  Raises ValueError for a file of another kind, and where something is not as it must be."""
    if cursor.data[:4] != b"GGUF":
        raise ValueError("it is no GGUF file")
    cursor.skip(4)
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}; supported are 2 and 3, little-endian")
    tensors, count = cursor.scalar("Q"), cursor.scalar("Q")
    fields = {}
    for _ in range(count):  # a count that lies ends at the end of the file
        name = cursor.string()
        if name in fields:
            raise ValueError(f"field {name[:50]!r} twice")
        fields[name] = cursor.value()
    shapes: dict[str, tuple[int, ...]] = {}
    offsets = []
    for _ in range(tensors):
        name, dimensions = cursor.string(), cursor.scalar("I")
        if name in shapes or dimensions > MOST_DIMENSIONS:
            raise ValueError(f"tensor {name[:50]!r} is there twice, or has {dimensions} dimensions")
        if name.startswith("blk.") and not name.split(".")[1].isdecimal():
            raise ValueError(f"tensor {name[:50]!r} has no layer number")
        shapes[name] = tuple(cursor.scalar("Q") for _ in range(dimensions))
        cursor.scalar("I")  # its type
        offsets.append(cursor.scalar("Q"))
    if offsets and max(offsets) > len(cursor.data) - cursor.at:
        raise ValueError(f"a tensor starts {max(offsets)} bytes after the tables, but the file has {len(cursor.data)}")
    return fields, shapes
