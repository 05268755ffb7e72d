"""The layouts by name."""

from ptq.export.compressed_tensors import CompressedTensors
from ptq.export.gguf_layout import GGUF
from ptq.export.gptq_layout import VERSION_1, VERSION_2, GPTQLayout
from ptq.export.layout import Layout
from ptq.export.modelopt import ModelOpt

_ALL: tuple[Layout, ...] = (CompressedTensors(), ModelOpt(), GPTQLayout(VERSION_1), GPTQLayout(VERSION_2), GGUF())
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _ALL}


def get_layout(name: str) -> Layout:
    """The layout of that name.  Raises ValueError that lists them."""
    if name not in LAYOUTS:
        raise ValueError(f"unknown layout {name!r}; there are {', '.join(LAYOUTS)}")
    return LAYOUTS[name]
