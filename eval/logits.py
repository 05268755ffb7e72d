"""A model's logits on windows of tokens: run, checked, and those of the first model kept on disk."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ptq.runtime.hooks import observe_outputs

Logits = Callable[[int, Tensor], Tensor]
"""(index of the window, its token ids (n,)) -> logits (n - 1, vocabulary) of all but its first token."""


def run(model: nn.Module, name: str) -> Logits:
    """The model's logits, in the dtype it gives them.  Raises ValueError, where they are not finite, that names the layer."""

    @torch.no_grad()
    def logits(index: int, window: Tensor) -> Tensor:
        window = window.to(next(model.parameters()).device)
        result = model(window[None], use_cache=False).logits
        check_finite(result, model, window[None], f"model {name!r} gave non-finite logits in window {index}")
        return result[0, :-1]

    return logits


def is_finite(logits: Tensor) -> bool:
    """Whether all are."""
    # One pass that copies nothing (float32 sums of 16-bit values are fused): finite logits of less than 1e29 have a finite sum.
    return bool(logits.sum(dtype=torch.float32).isfinite())


def check_finite(logits: Tensor, model: nn.Module, tokens: Tensor, message: str) -> None:
    """Raises ValueError where a logit is not finite: `message`, and which layer made it, found by running `tokens` again."""
    if not is_finite(logits):
        raise ValueError(f"{message}; {first_non_finite(model, tokens)}")


@torch.no_grad()
def first_non_finite(model: nn.Module, tokens: Tensor) -> str:
    """In words, where a run of `tokens` (n, length) meets its first non-finite value."""
    leaves = {
        module: name
        for name, module in model.named_modules()
        if not any(module.children()) and (hasattr(module, "in_features") or any(True for _ in module.parameters()))
    }
    found: list[str] = []

    def observe(module: nn.Module, x: Tensor, y: Tensor) -> None:
        if found:
            return
        if not x.isfinite().all():
            found.append(f"the first non-finite values go into {leaves[module]}")
        elif not y.isfinite().all():
            bad = sum(int((~p.isfinite()).sum()) for p in module.parameters() if p.is_floating_point())
            own = f", whose parameters hold {bad} such values" if bad else ""
            found.append(f"the first non-finite values come out of {leaves[module]}{own}")

    with observe_outputs(leaves, observe):
        model(tokens, use_cache=False)
    return found[0] if found else "a second run gave none, so the machine or a kernel is at fault"


class KeptLogits:
    """Logits computed once for each window and then read from a temporary file in `folder`, which vanishes with this object.

    They are stored in the dtype they come in, so that what is read equals what was computed, bit for bit; no more than one
    window's are in memory.  Raises ValueError before the first is written where `count` windows do not fit on the disk.
    """

    def __init__(self, compute: Logits, folder: Path, count: int):
        self._compute, self._folder, self._count = compute, folder, count
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # lives as long as the object
        self._kept: dict[int, tuple[int, torch.Size, torch.dtype]] = {}

    @property
    def complete(self) -> bool:
        """Whether every window's are there, so that what computes them is needed no longer."""
        return len(self._kept) == self._count

    def __call__(self, index: int, window: Tensor) -> Tensor:
        if index not in self._kept:
            return self._keep(index, self._compute(index, window))
        offset, shape, dtype = self._kept[index]
        self._file.seek(offset)
        stored = np.fromfile(self._file, np.uint8, shape.numel() * dtype.itemsize)
        return torch.from_numpy(stored).view(dtype).view(shape)

    def _keep(self, index: int, logits: Tensor) -> Tensor:
        stored = logits.contiguous().view(torch.uint8).cpu()
        needed, free = self._count * stored.numel(), shutil.disk_usage(self._folder).free
        if not self._kept and needed > free:
            raise ValueError(
                f"the first model's logits take {needed / 1e9:.1f} GB and {self._folder} has {free / 1e9:.1f} GB free; give "
                "--logits a folder with room, --logits again to run that model anew beside every other, or fewer --windows"
            )
        offset = self._file.seek(0, 2)
        stored.numpy().tofile(self._file)
        self._kept[index] = offset, logits.shape, logits.dtype
        return logits
