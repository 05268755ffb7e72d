"""A checkpoint in the making: what is finished is on the disk for good, and a later run goes on from there.

`<output>.unfinished/` holds fingerprint.json (what the work depends on), token_importance.safetensors, curvature/
(for row feedback), layers/<n>.json (the records of a finished layer, written after its tensors) and checkpoint/,
which becomes the output at the end.  A file has its name only once its content is on the disk.
"""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ptq.calibrate.importance import TokenImportance
from ptq.calibrate.inputs import Inputs
from ptq.export.checkpoint import Formats, check_layer, layer_tensors, restore_layer, shard_name
from ptq.export.files import on_cpu, save_tensors, save_text, sync
from ptq.export.layout import Layout
from ptq.export.manifest import digests, read_manifest
from ptq.run.curvature import Curvature, beside
from ptq.run.fingerprint import differences
from ptq.run.record import LayerResult, Record
from ptq.runtime.adapter import Layer
from ptq.runtime.distributed import Ranks

# What an unfinished folder may hold before it says of which run it is.  It is emptied for a new one: nobody else's may be in it.
OURS = re.compile(r"\.?(fingerprint\.json|token_importance\.safetensors|curvature|layers|checkpoint)(\.part)?")


class Unfinished:
    """The folder beside `output`.  `finished`: number of the first of the `layers` that is not done.  `complete`: the output
    is there, of the same fingerprint, and the run was ended while it cleared up; only `finish` is to be called.

    With `resume`, what is there is gone on with.  Rank 0 of the ranks writes, the others read; on several machines they must see
    the same folder.  Raises ValueError where an unfinished run is there and `resume` is not given, where its fingerprint is another
    (saying what differs), and where another process is at it.
    """

    def __init__(self, output: Path, about: dict, layers: int, *, resume: bool, ranks: Ranks | None = None, first: int = 0):
        ranks = ranks or Ranks()
        self.output, self.layers, self.numbers = output, layers, range(first, layers)
        self.folder = unfinished_folder(output)
        self.checkpoint = self.folder / "checkpoint"
        self.curvature = Curvature(self.folder / "curvature")
        self._lock: int | None = None
        if ranks.rank == 0:
            try:
                self._open(about, resume)
            except ValueError:
                self._unlock()
                raise
        done = next((n for n in self.numbers if not self._record_path(n).is_file()), layers)
        self.finished: int
        self.complete: bool
        self.finished, self.complete = ranks.all_gather_object((done, is_complete(output)))[0]

    def _open(self, about: dict, resume: bool) -> None:
        if self.folder.is_symlink():
            raise ValueError(f"{self.folder} is a link; remove it, or give another output")
        self.folder.mkdir(parents=True, exist_ok=True)
        sync(self.folder.parent)
        self._lock = lock(self.folder)
        others = sorted(path.name for path in self.folder.iterdir() if not OURS.fullmatch(path.name))
        if others and not (self.folder / "fingerprint.json").is_file():
            raise ValueError(f"{self.folder} holds {others[0]!r}, which is of no run; remove it, or give another output")
        path = self.folder / "fingerprint.json"
        if not self.checkpoint.is_dir() and not is_complete(self.output):
            self._empty()  # new, or what is left of a finished run whose output is elsewhere by now
        if path.is_file() and not resume:
            raise ValueError(f"{self.folder} holds an unfinished run; go on with --resume, or remove it")
        if not path.is_file():
            self.checkpoint.mkdir(exist_ok=True)
            (self.folder / "layers").mkdir(exist_ok=True)
            save_text(path, json.dumps(about, indent=1) + "\n")
        differ = differences(json.loads(path.read_text()), about)
        if differ:
            raise ValueError(
                f"{self.folder} is of another run: {'; '.join(differ)}.  Remove it, or give what it was begun with"
            )

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _empty(self) -> None:
        """Removes what is in the folder, the fingerprint last: as long as there is anything, it says of which run."""
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "fingerprint.json"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _record_path(self, index: int) -> Path:
        return self.folder / "layers" / f"{index:05}.json"

    def write_layer(self, done: LayerResult, tensors: Mapping[str, Tensor], formats: Formats, layout: Layout) -> None:
        """Stores a layer for good.  Raises ReadBackError where its file does not read back as the layer."""
        path, tensors = self.checkpoint / shard_name(done.layer.index, self.layers), on_cpu(tensors)  # once, and hashed there
        save_tensors(path, tensors)
        check_layer(path, done.layer, formats, layout)
        records = [asdict(record) for record in done.records]
        about = {"layer": done.layer.name, "batch": done.batch, "records": records, "stored": digests(tensors)}
        save_text(self._record_path(done.layer.index), json.dumps(about) + "\n")

    def restore(self, layer: Layer, formats: Formats, layout: Layout) -> tuple[int, Inputs]:
        """Makes a layer of the original what it was after it had been finished; returns the batch it ran with, and its quantized
        inputs.  Raises ValueError as `check`."""
        tensors = load_file(self.checkpoint / shard_name(layer.index, self.layers))
        about = self._check(layer.index, digests(tensors))
        return about["batch"], restore_layer(layer, tensors, formats, layout)

    def check(self) -> None:
        """Raises ValueError that names a tensor of a layer that the checkpoint's manifest has other than it was stored."""
        found = {name: entry["blake2b"] for name, entry in (read_manifest(self.checkpoint) or {}).items()}
        for index in self.numbers:
            self._check(index, found)

    def _check(self, index: int, found: Mapping[str, str]) -> dict:
        """What is noted of a layer."""
        about = json.loads(self._record_path(index).read_text())
        changed = sorted(name for name, digest in about["stored"].items() if found.get(name) != digest)
        if changed:
            raise ValueError(
                f"{self.checkpoint}: {changed[0]} is not what was stored ({len(changed)} such tensors); the disk or another "
                f"process changed it: remove {self.folder} and begin anew"
            )
        return about

    def records(self) -> list[Record]:
        """Of all finished layers."""
        read = (json.loads(self._record_path(index).read_text())["records"] for index in self.numbers)
        return [Record(**record | {"shape": tuple(record["shape"])}) for records in read for record in records]

    def save_importance(self, weights: TokenImportance) -> None:
        """Token weights of all sequences, once the curvature is there: by them a later run knows of both."""
        save_tensors(
            self.folder / "token_importance.safetensors", {name: torch.cat(parts).cpu() for name, parts in weights.items()}
        )

    def load_importance(self) -> dict[str, Tensor] | None:
        """By name, (sequences, length); None where they were not finished."""
        path = self.folder / "token_importance.safetensors"
        return load_file(path) if path.is_file() else None

    def finish(self) -> None:
        """The checkpoint becomes the output, all of it on the disk for good; nothing else stays.

        Killed before the output has its name, a later run goes on; killed after, it finds that all is `complete`.
        """
        if not self.complete:
            for path in [*self.checkpoint.rglob("*"), self.checkpoint]:
                sync(path)
            self.checkpoint.rename(self.output)
            sync(self.output.parent)
            sync(self.folder)
        self._empty()
        self.folder.rmdir()
        self._unlock()

    def close(self) -> None:
        """Lets go of the folder, and removes it before where nothing of worth is in it."""
        try:
            worthless = not any(self.folder.glob("layers/*")) and self.load_importance() is None
            if self._lock is not None and worthless and self.folder.exists():
                shutil.rmtree(self.folder)
        finally:
            self._unlock()

    @contextmanager
    def writer(self, formats: Formats, layout: Layout) -> Iterator["LayerWriter"]:
        """Writes layers while the next ones are worked on; all are on the disk when the block is left."""
        with ThreadPoolExecutor(1) as pool:
            writer = LayerWriter(self, pool, formats, layout)
            yield writer
            writer.wait()


class LayerWriter:
    """Writes a layer in another thread; at most one waits."""

    def __init__(self, unfinished: Unfinished, pool: ThreadPoolExecutor, formats: Formats, layout: Layout):
        self._unfinished, self._pool, self._formats, self._layout = unfinished, pool, formats, layout
        self._last: Future | None = None

    def write(self, done: LayerResult) -> None:
        """Raises what writing the layer before raised."""
        tensors = layer_tensors(done.layer, done.quantized, self._layout)
        write = partial(self._unfinished.write_layer, done, tensors, self._formats, self._layout)
        ready = beside(write, next(iter(tensors.values())).device)
        self.wait()
        self._last = self._pool.submit(ready)

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()
            self._last = None


def unfinished_folder(output: Path) -> Path:
    return output.with_name(f"{output.name}.unfinished")


def is_complete(output: Path) -> bool:
    """Whether the output of a run is there whole, though what was beside it is not all removed."""
    folder = unfinished_folder(output)
    return output.exists() and (folder / "fingerprint.json").is_file() and not (folder / "checkpoint").exists()


def lock(folder: Path) -> int:
    """The descriptor whose close lets go of the folder.  Raises ValueError where another process has it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise BlockingIOError  # it was removed between the two calls, by the process that had it
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(f"another process is writing to {folder}") from None
    return descriptor
