"""What identifies a model's files by their contents: a run is never gone on with on another model's weights."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ptq.models.shards import CHANGED, check_weights, read_header, stamp

WHOLE = 2 * 10**9  # bytes up to which a file is read whole
PIECES, PIECE = 17, 4096  # of every tensor of a larger one; an odd number has a middle
RAW_PIECES, RAW_PIECE, RAW_STEP = 4097, 2**16, 2**23  # of a larger file of which tensors are not known
READ_AT_ONCE = 2**20
THREADS = 4


@dataclass(frozen=True)
class ModelFiles:
    """`files`: all that the weights and the config are read from.  `stamps`: of the files before anything was read.  `commit`: of
    the hub, where they came from there."""

    files: tuple[Path, ...]
    stamps: tuple[tuple[int, int], ...]
    commit: str | None = None

    @classmethod
    def now(cls, files: Iterable[Path], commit: str | None = None) -> "ModelFiles":
        """As they are now."""
        files = tuple(files)
        return cls(files, tuple(map(stamp, files)), commit)

    @property
    def place(self) -> str:
        """What gives this very model again; the hub may have another by then."""
        return str(self.files[0] if self.files[0].suffix == ".gguf" else self.files[0].parent)

    def check(self) -> None:
        """Raises ValueError that names a file which is another than before anything was read."""
        for path, before in zip(self.files, self.stamps, strict=True):
            if stamp(path) != before:
                raise ValueError(f"{path} {CHANGED}")

    def identity(self, *, whole: int = WHOLE) -> dict[str, object]:
        """By file name, [bytes, digest]; and the commit, if there is one.  The files are read (`digest`).

        Raises ValueError for a weight that is not finite, wherever it is: else it would be met when its layer's turn comes.  And
        as `check`: what was read before, of a model that is loaded whole, would be another's.
        """
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(check_weights, (path for path in self.files if path.suffix == ".safetensors")):
                pass
            digests = pool.map(lambda path: digest(path, whole=whole), self.files)
            found: dict[str, object] = {
                path.name: [path.stat().st_size, text] for path, text in zip(self.files, digests, strict=True)
            }
        self.check()
        return found | ({"commit": self.commit} if self.commit else {})


def digest(path: Path, *, whole: int = WHOLE) -> str:
    """Of the contents: of all of a file of at most `whole` bytes, else of its `spans`.

    2 GB take 2 to 5 s of one core, and are read from the disk once; of a larger safetensors file, 70 KB a tensor are.
    """
    found = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for begin, end in [(0, size)] if size <= whole else spans(path, size):
            file.seek(begin)
            while begin < end:
                part = file.read(min(READ_AT_ONCE, end - begin))
                if not part:
                    raise ValueError(f"{path} became shorter while it was read; is it still being written?")
                found.update(part)
                begin += len(part)
    return found.hexdigest()


def spans(path: Path, size: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of what stands for a file too large to be read whole.

    Of a safetensors file its header and pieces of every tensor, the first, the middle and the last among them: what
    is merged into one matrix changes nearly all of it.  Of another, pieces at most 8 MiB apart.
    """
    if path.suffix != ".safetensors":
        yield from pieces(0, size, max(RAW_PIECES, size // RAW_STEP + 2), RAW_PIECE)
        return
    header = read_header(path)
    start = 8 + len(header)
    yield 0, start
    for name, entry in json.loads(header).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            yield from pieces(start + begin, start + end, PIECES, PIECE)


def pieces(begin: int, end: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """`count` evenly spaced spans of `size` bytes, the first at the beginning, the last at the end; all where that is less."""
    if end - begin <= count * size:
        yield begin, end
        return
    for i in range(count):
        first = begin + i * (end - begin - size) // (count - 1)
        yield first, first + size
