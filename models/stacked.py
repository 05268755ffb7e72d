"""Experts that are stacked in one tensor, taken apart into one tensor an expert and projection.

transformers keeps them so (gate_up_proj (E, 2m, d), down_proj (E, d, m), and biases), and some families' checkpoints do too.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ptq.models.families import Stacking
from ptq.models.shards import Shards, Stored


class UnstackedShards:
    """`shards` (ptq.models.shards), in which the experts of a layer have one tensor each, as engines name them.

    Tensors that are read are views of the stacked ones.
    """

    def __init__(self, shards: Shards, stacking: Stacking):
        self._shards, self._stacking, self._parameters = shards, stacking, dict(stacking.ends)
        self.folder, self.dtype = shards.folder, shards.dtype
        self.tensors: dict[str, Stored] = {}
        self._places: dict[str, tuple[str, str, int]] = {}
        for name, stored in shards.tensors.items():
            end = self._end_of(name)
            if end is None:
                self.tensors[name] = stored
                continue
            like = stacking.parts(self._parameters[end], torch.empty(stored.shape, device="meta"))
            before = f"{name.removesuffix(end)}{end.split('.')[0]}.experts"
            for part, tensor in like.items():
                for number, one in enumerate(tensor):
                    full = f"{before}.{number}.{part}"
                    self.tensors[full] = replace(stored, shape=tuple(one.shape))
                    self._places[full] = name, part, number

    def read(self, names: Iterable[str], *, pin: bool = False) -> dict[str, Tensor]:
        """As `Shards.read`; what is in one stacked tensor is read at once."""
        names = list(names)
        there = dict.fromkeys(self._places[name][0] if name in self._places else name for name in names)
        whole = self._shards.read(there, pin=pin)
        parts = {}
        for name in there:
            end = self._end_of(name)
            if end is not None:
                parts[name] = self._stacking.parts(self._parameters[end], whole[name])
        found = {}
        for name in names:
            stacked, part, number = self._places.get(name, (name, "", 0))
            found[name] = parts[stacked][part][number] if part else whole[name]
        return found

    def _end_of(self, name: str) -> str | None:
        return next((end for end in self._parameters if name.endswith(f".{end}")), None)
