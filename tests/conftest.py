"""Shared fixtures.  Without a GPU, Triton's kernels run under its interpreter, which must be chosen before they are imported."""

import inspect
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)  # the tensors are tiny

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
SMOLLM2 = ROOT / "build" / "demo" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def quicker_interpreter() -> None:
    """Triton's interpreter patches triton.language anew in every call of a kernel's helper, half of all its time.

    The launch around it has done so already, unless the helper sees another module (those of triton.language see its core)."""
    import triton.language as tl
    from triton.runtime import interpreter

    patch: Callable | None = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return

    def patch_once(fn):
        seen = [value for value in fn.__globals__.values() if inspect.ismodule(value) and value in (tl, tl.core)]
        patched = seen and not any(tl.core.is_builtin(module.load) for module in seen)
        return interpreter._LangPatchScope() if patched else patch(fn)

    interpreter._patch_lang = patch_once


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


@pytest.fixture
def gguf_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers parses a GGUF file's fields three times, and makes its table of names for every module: 40 seconds."""
    import gguf

    for name in ("GGUFReader", "get_tensor_name_map"):
        monkeypatch.setattr(gguf, name, cache(getattr(gguf, name)))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real models and texts that are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    return SHARED
