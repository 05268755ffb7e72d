"""Parsers of strangers' files, given seeded mutations of good ones; prints a JSON line a parser with what they answered.

    PYTHONPATH=. python tests/fuzz.py CASES SEED [PARSER …]

A parser may return or raise ValueError in one line; whatever else it raises is raised here, with the case in the message.  While
it runs it may open nothing for writing, start nothing and connect to nothing (seen by an audit hook; safetensors is Rust and
opens only what it is given), and it takes at most SECONDS a case.
"""

import copy
import gzip
import json
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import transformers

from ptq.data.text import read_jsonl
from ptq.models.configuration import check_config
from ptq.models.gguf_header import check_gguf
from ptq.models.loading import load_config
from ptq.models.shards import Shards, Stored, shard_paths
from ptq.run.recipe import matches

SECONDS = 2.0
ODD = [
    0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1.5, float("nan"), float("inf"), True, None, "", "x", "../x", "/etc/passwd",
    "\0", "\ud800", "a" * 5000,
    [], {}, [[]], [1, 2], {"a": 1}, "F32", "F64", "BF16", "model.layers.9.x", "model.layers.99999999999.x",
]  # fmt: skip
PIECES = [
    b"", b"\0", b"\xff", b"\xff" * 8, bytes(8), b"[", b"{", b'"', b"]" * 50, b"[" * 3000, b"9" * 5000, b"-1", b"1e999", b"\n",
    b"\r\n", b"re:", b"(" * 200, b"a{99999999999}", b"(?P<x>", b"\\", b"*", b"__metadata__", b"data_offsets",
]  # fmt: skip
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.",
    "socket.connect",
    "os.remove",
    "os.rename",
    "os.mkdir",
    "shutil.",
)


class Watch:
    """Raises AssertionError, while it is on, where Python code reaches beyond what it reads."""

    def __init__(self) -> None:
        self.on = False
        sys.addaudithook(self.look)

    def look(self, event: str, arguments: tuple) -> None:
        if not self.on:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event.startswith(FORBIDDEN):
            raise AssertionError(f"a parser did {event} {arguments}")


def flipped(data: bytes, draw: random.Random) -> bytes:
    """One to four of: bits flipped, cut short, a piece put in or over, a part doubled, a number made extreme."""
    out = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, kind = draw.randrange(len(out) + 1), draw.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del out[at:]
        elif kind == 2:
            out[at:at] = draw.choice(PIECES)
        elif kind == 3:
            piece = draw.choice(PIECES)
            out[at : at + len(piece)] = piece
        elif kind == 4:
            out[at:at] = out[at : at + draw.randint(1, 64)]
        elif numbers := list(re.finditer(rb"\d+", out)):
            found = draw.choice(numbers)
            out[found.start() : found.end()] = str(draw.choice([0, -1, 2**31, 2**63, 2**64, 10**30])).encode()
    return bytes(out)


def altered(value: object, draw: random.Random) -> object:
    """A JSON value with one to three of its parts replaced, removed or renamed."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        part = value
        while isinstance(part, dict | list) and part:
            key = draw.choice(list(part)) if isinstance(part, dict) else draw.randrange(len(part))
            below = part[key]  # type: ignore[index]
            if not (isinstance(below, dict | list) and below) or draw.random() < 0.3:
                kind = draw.randrange(4)
                if kind == 0:
                    del part[key]  # type: ignore[attr-defined]
                elif kind == 1 and isinstance(part, dict):
                    part[str(draw.choice(ODD))] = part.pop(key)
                else:
                    part[key] = copy.deepcopy(draw.choice(ODD))  # type: ignore[index]
                break
            part = below
    return value


def mutated_json(value: object, draw: random.Random) -> bytes:
    data = json.dumps(altered(value, draw) if draw.random() < 0.6 else value).encode("utf-8", "surrogatepass")
    return flipped(data, draw) if draw.random() < 0.6 else data


HEADER = {
    "__metadata__": {"format": "pt"},
    "model.layers.0.w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "model.layers.1.w": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}
TENSORS = {
    "model.layers.1.w": Stored(Path("x"), "F32", (64, 128), 0, 32768),
    "embed": Stored(Path("x"), "F32", (64, 64), 32768, 49152),
}
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "vocab_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rope_theta": 1e4,
    "dtype": "float32", "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "text_config": {"hidden_size": 64},
    "hidden_act": "silu",
    "tie_word_embeddings": False, "eos_token_id": [1, 2], "max_position_embeddings": 256, "attention_bias": False,
}  # fmt: skip


def one_safetensors(folder: Path, draw: random.Random) -> Callable[[], object]:
    text = mutated_json(HEADER, draw)
    length = draw.choice([0, 1, 7, 2**27, 2**63, 2**64 - 1]) if draw.random() < 0.2 else len(text)
    data = struct.pack("<Q", length) + text + bytes(draw.choice([32, 32, 32, 31, 0, 400]))
    (folder / "model.safetensors").write_bytes(flipped(data, draw) if draw.random() < 0.2 else data)
    return lambda: Shards(folder)


def one_index(folder: Path, draw: random.Random) -> Callable[[], object]:
    value = {"metadata": {"total_size": 1}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_bytes(mutated_json(value, draw))

    def parse() -> None:
        for path in shard_paths(folder):
            assert path.parent == folder and path.resolve().parent == folder.resolve(), path

    return parse


def one_config(folder: Path, draw: random.Random) -> Callable[[], object]:
    (folder / "config.json").write_bytes(mutated_json(CONFIG, draw))
    return lambda: check_config(folder, TENSORS)


def one_loaded_config(folder: Path, draw: random.Random) -> Callable[[], object]:
    (folder / "config.json").write_bytes(mutated_json(CONFIG, draw))

    def parse() -> None:
        check_config(folder, TENSORS)
        load_config(str(folder), str(folder), {})

    return parse


def one_text(folder: Path, draw: random.Random) -> Callable[[], object]:
    lines = b"\n".join(mutated_json({"text": "some words", "id": i, "more": [1, {"a": None}]}, draw) for i in range(3))
    packed = draw.random() < 0.5
    path = folder / ("text.jsonl.gz" if packed else "text.jsonl")
    path.write_bytes(flipped(gzip.compress(lines, 1), draw) if packed else lines)
    return lambda: list(read_jsonl(path))


def gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def one_gguf(folder: Path, draw: random.Random) -> Callable[[], object]:
    fields = [
        gguf_string("llama.block_count") + struct.pack("<II", 4, 2),
        gguf_string("general.name") + struct.pack("<I", 8) + gguf_string("x"),
        gguf_string("tokens") + struct.pack("<IIQ", 9, 8, 2) + gguf_string("a") + gguf_string("b"),
        gguf_string("scores") + struct.pack("<IIQ", 9, 6, 2) + bytes(8),
    ]
    tensors = [gguf_string(f"blk.{i}.w") + struct.pack("<IQQIQ", 2, 4, 4, 0, 64 * i) for i in range(2)]
    counts = struct.pack("<IQQ", 3, draw.choice([2, 2, 2, 2**40]), draw.choice([4, 4, 4, 2**60]))
    data = b"GGUF" + counts + b"".join([*fields, *tensors]) + bytes(160)
    (folder / "model.gguf").write_bytes(flipped(data, draw))
    return lambda: check_gguf(folder / "model.gguf")


def one_pattern(folder: Path, draw: random.Random) -> Callable[[], object]:
    good = draw.choice(
        [rb"re:.*\.mlp\.down_proj$", b"model.layers.0.mlp.up_proj", rb"re:model\.layers\.(0|1[0-9])\..*", b"re:(?!x)[a-z]+"]
    )
    pattern = flipped(good, draw).decode("utf-8", "replace")
    return lambda: matches("model.layers.0.mlp.down_proj", pattern)


PARSERS: dict[str, Callable[[Path, random.Random], Callable[[], object]]] = {
    "safetensors": one_safetensors,
    "index": one_index,
    "config": one_config,
    "loaded config": one_loaded_config,
    "jsonl": one_text,
    "gguf": one_gguf,
    "pattern": one_pattern,
}


def fuzz(parser: str, cases: int, seed: int, folder: Path, watch: Watch) -> dict:
    """What became of the cases.  Raises AssertionError that names one which ended in another way than it may."""
    for name in ("a.safetensors", "b.safetensors"):
        (folder / name).write_bytes(bytes(10**5))
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    (folder / "model.safetensors").unlink(missing_ok=True)
    accepted, slowest, begin = 0, 0.0, time.monotonic()
    for case in range(cases):
        draw, start = random.Random(f"{parser} {seed} {case}"), time.monotonic()
        try:
            accepted += answer(PARSERS[parser](folder, draw), watch)
        except Exception as error:
            raise AssertionError(f"{parser}, seed {seed}, case {case}: {type(error).__name__} {str(error)[:300]}") from error
        took = time.monotonic() - start
        assert took < SECONDS, f"{parser}, seed {seed}, case {case} took {took:.1f} s"
        slowest = max(slowest, took)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "parser": parser, "cases": cases, "accepted": accepted, "refused": cases - accepted, "slowest_ms": round(1000 * slowest, 1),
        "seconds": round(time.monotonic() - begin, 1), "peak_memory_mb": round(memory),
    }  # fmt: skip


def answer(parse: Callable[[], object], watch: Watch) -> bool:
    """Whether the case was accepted."""
    watch.on = True
    try:
        parse()
    except ValueError as error:
        assert not isinstance(error, UnicodeError) and "\n" not in str(error) and len(str(error)) < 2000, repr(error)[:500]
        return False
    finally:
        watch.on = False
    return True


def main() -> int:
    cases, seed, names = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or list(PARSERS)
    transformers.utils.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        watch = Watch()
        for name in names:
            sys.stdout.write(json.dumps(fuzz(name, cases, seed, Path(folder), watch)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
