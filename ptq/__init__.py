"""ptq: layerwise post-training quantization of Llama-family models to 4-bit block-scaled formats.

    import ptq

    result = ptq.quantize("meta-llama/Llama-3.2-1B")
    print(result.report)
    result.save("Llama-3.2-1B-NVFP4")

settings   what a run is asked to do; api and cli (the command `ptq`) are the two doors to pipeline, the whole run
core       what NVFP4, MXFP4 and INT4 are, the plain-torch reference that rounds to them, how a block's scale is chosen
calibrate  H, what tokens count for, what earlier layers lost
methods    rtn and gptq
run        layer by layer through a model, by way of an adapter (ptq.models); unfinished runs
export     checkpoints that vLLM and transformers load
functional the API of the package this grew from (qwantize)

`ptq.kernels`, `ptq.models` and `ptq.eval` are links to the folders of those names at the root.
"""

from typing import TYPE_CHECKING, Any

from ptq.settings import Settings

if TYPE_CHECKING:
    from ptq.api import Report, Result, quantize

__version__ = "0.1.0"
__all__ = ["Report", "Result", "Settings", "quantize"]


def __getattr__(name: str) -> Any:
    """What takes torch to import is imported when it is asked for."""
    if name not in ("Report", "Result", "quantize"):
        raise AttributeError(f"module 'ptq' has no attribute {name!r}")
    from ptq import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
