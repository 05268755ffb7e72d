"""The form of a checkpoint, as data and functions: all that knows what a quantized weight is called and how it is packed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ptq.core.formats import Format
from ptq.core.packing import Quantized


class Layout(Protocol):
    """How checkpoints of one kind store quantized linears.  Writing, reading back and resuming go through it alone."""

    @property
    def name(self) -> str:
        """What a user calls it."""
        ...

    def pack(self, name: str, quantized: Quantized) -> dict[str, Tensor]:
        """What is stored for the linear of that full name, by tensor name, on the weight's device."""
        ...

    def unpack(self, name: str, tensors: Mapping[str, Tensor], format: Format) -> Quantized | None:
        """The inverse of `pack`; None where `tensors` hold no quantized weight of that name."""
        ...

    def config_files(self, formats: Mapping[str, Format], ignored: tuple[str, ...]) -> dict[str, dict]:
        """By file name, JSON that says what is quantized and how; what is there for config.json is added to the model's.

        `formats`: of each quantized linear, by full name.  `ignored`: linears left alone.
        """
        ...

    def finish(self, folder: Path) -> None:
        """What is left to write once all tensors are in the folder."""
        ...
