"""Shared fixtures.  Without a GPU, Triton's kernels run under its interpreter, which must be chosen before they are imported."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

gc.disable()  # while 3,000 modules are imported, of which nothing becomes garbage

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # the tensors are tiny

settings.register_profile(
    "suite", max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.register_profile("long", settings.get_profile("suite"), max_examples=2000, derandomize=False)
settings.load_profile("suite")

ROOT = Path(__file__).resolve().parent.parent
PYTHONPATH = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # of processes that tests start
SHARED = ROOT.parent / "shared" / "data"
SMOLLM2 = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: no more than there is memory for, as each imports torch and transformers."""
    return min(len(os.sched_getaffinity(0)), 8)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object):
    """Tests go to workers one by one, but those of a file that share a torchrun together.

    (`--dist loadgroup` would do it by a mark, but pytest-xdist 3.8 writes groups where pytest 9.2 does not read them.)"""
    from xdist.scheduler import LoadScopeScheduling

    class OneByOne(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if file.endswith("test_distributed.py") else nodeid

    return OneByOne(config, log)


def pytest_collection_finish() -> None:
    gc.freeze()  # nor until the end
    gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if hasattr(config, "workerinput"):  # so that no worker begins a long test when the others are done
        items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@contextmanager
def disk_full_at(index: int) -> Iterator[None]:
    """Inside the block the disk is full when the layer of that number is to be written."""
    from ptq.run.resume import Unfinished

    write = Unfinished.write_layer

    def full(self: Unfinished, done: Any, *arguments: Any) -> None:
        if done.layer.index == index:
            raise OSError(28, "No space left on device")
        write(self, done, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "write_layer", full)
        yield


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter() -> None:
    if not torch.cuda.is_available():  # what it keeps of one compilation is not for the next
        from .interpreter import make_quicker

        make_quicker()


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """What runs a script in a process of its own; a fresh Python only where there is a GPU, which no fork may use."""
    if torch.cuda.is_available():
        yield sys.executable
        return
    import compressed_tensors.compressors  # noqa: F401

    import ptq.pipeline.run  # noqa: F401

    from .preloaded import preloaded

    with preloaded() as python:
        yield python


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and torch.empty_like give NaN (or 255), so that a cell a kernel leaves unwritten shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poison(empty(*args, **kwargs)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: poison(empty_like(*args, **kwargs)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and texts that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED
