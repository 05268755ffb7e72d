"""Text in, token windows out; for calibration and for evaluation alike.

A source is a file (.jsonl or .jsonl.gz with a field "text" or "messages" a line, or plain text, also gzipped), a name that
ptq.data.presets knows, a Hugging Face dataset id, or `builtin`: the language reference that every Python carries
(pydoc_data.topics), of which one topic in four is set aside as `builtin-heldout`.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from ptq.data.chat import Document, document_of
from ptq.data.presets import PRESETS, find_preset, hub_documents

BUILTIN_HELD_OUT = "builtin-heldout"
# A text is in memory whole, and a small .gz file may unpack to any size.
TEXT_BYTES = 2**31
LINE_BYTES = 2**26
HALF_A_CHARACTER = re.compile("[\ud800-\udfff]")


def read_texts(source: str) -> list[str]:
    """The documents of a source as plain text, conversations too."""
    return [str(document) for document in read_documents(source)]


def read_documents(source: str) -> list[Document]:
    """The documents of a source.  Raises ValueError that names the file (and the line) and says what is wrong."""
    if source in ("builtin", BUILTIN_HELD_OUT):
        return [*builtin_documents(held_out=source == BUILTIN_HELD_OUT)]
    path = Path(source).expanduser()
    found = None if path.exists() or (path.suffix and ":" not in source) else find_preset(source)
    documents: Sequence[Document]
    if path.is_file():
        documents = list(read_jsonl(path) if ".jsonl" in path.suffixes else [read_text(path)])
    elif found:
        documents = hub_documents(source, *found)
    else:
        kind = "a folder" if path.is_dir() else "not there"
        raise ValueError(
            f"text {source!r} is {kind}; give a .txt, .jsonl or .jsonl.gz file, a dataset id, 'builtin', or one of "
            f"{', '.join(PRESETS)}"
        )
    documents = [document for document in documents if str(document).strip()]
    if not documents:
        raise ValueError(f"text {source!r} is empty")
    return documents


def builtin_documents(*, held_out: bool) -> list[str]:
    """Python's language reference by topic, the topics in a fixed pseudo-random order.  Paragraphs that stand in both halves
    (the reference repeats itself) are left out of the held-out one."""
    from pydoc_data.topics import topics

    order = sorted(topics, key=lambda name: zlib.crc32(name.encode()))
    calibration = [topics[name] for i, name in enumerate(order) if i % 4]
    if not held_out:
        return calibration
    seen = {paragraph for text in calibration for paragraph in text.split("\n\n")}
    rest = (topics[name].split("\n\n") for i, name in enumerate(order) if not i % 4)
    return ["\n\n".join(p for p in paragraphs if p not in seen) for paragraphs in rest]


def read_text(path: Path) -> str:
    raw = b"".join(read_lines(path, TEXT_BYTES))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def read_lines(path: Path, longest: int) -> Iterator[bytes]:
    """The lines of a file, unpacked from .gz, never more than one in memory.

    Raises ValueError that names the line of more than `longest` bytes, for more than TEXT_BYTES in all, and for a damaged file.
    """
    whole = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number in count(1):
                line = file.readline(longest + 1)
                whole += len(line)
                if len(line) > longest:
                    raise ValueError(f"{path}, line {number}: more than {longest} bytes; split it into shorter documents")
                if whole > TEXT_BYTES:
                    raise ValueError(f"{path}, line {number}: more than {TEXT_BYTES} bytes in all; give a part of the text")
                if not line:
                    return
                yield line
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def read_jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(read_lines(path, LINE_BYTES), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 text: byte {error.start} cannot be decoded") from None
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
            raise ValueError(f"{path}, line {number}: not JSON that one reads ({str(error).split(';')[0]})") from None
        document = document_of(record) if isinstance(record, dict) else None
        if document is None:
            raise ValueError(
                f'{path}, line {number}: no field "text" with a string, nor "messages", each with role and content'
            )
        if isinstance(document, str) and HALF_A_CHARACTER.search(document):
            raise ValueError(f'{path}, line {number}: "text" holds half a surrogate pair, which is no character')
        yield document


def all_windows(encode: Callable[[Document], list[int]], documents: Sequence[Document], length: int, source: str) -> Tensor:
    """All non-overlapping windows (n, length) of the documents' tokens, joined in order.

    `encode` turns a document into token ids.  Raises ValueError where there is not one window.
    """
    return join_windows([encode(text) for text in documents], length, source)


def join_windows(encoded: list[list[int]], length: int, source: str) -> Tensor:
    """The same of documents that are token ids already."""
    tokens = [token for ids in encoded for token in ids]
    count = len(tokens) // length
    if not count:
        raise ValueError(f"text {source!r} has {len(tokens)} tokens, too few for one window of {length}")
    return torch.tensor(tokens[: count * length]).view(count, length)


def sample_windows(windows: Tensor, count: int, seed: int, source: str, *, validation: int = 0) -> Tensor:
    """`count` of the windows (n, length), then `validation` more, drawn without replacement.  Raises ValueError for too few."""
    if len(windows) < count + validation:
        more = f" and {validation} for validation" if validation else ""
        raise ValueError(
            f"text {source!r} gives {len(windows)} sequences of {windows.shape[1]} tokens, fewer than the {count} asked for{more}"
            "; give more text, or ask for fewer or shorter sequences"
        )
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[: count + validation]]
