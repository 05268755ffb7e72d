"""A model and its tokenizer from a local folder, a hub id or a GGUF file."""

import io
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptq.models.llama import check_family


def load_model(
    source: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in eval mode, tokenizer).  dtype None: as stored; for a GGUF file, float32.

    Raises ValueError, before weights are read, for a source that is not there, an unsupported model type, a damaged file and a
    model that is quantized already.
    """
    where, extra = locate(source)
    try:
        config = AutoConfig.from_pretrained(where, **extra)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from None
    check_family(config, source)
    if getattr(config, "quantization_config", None):
        raise ValueError(f"{source} is quantized already ({config.quantization_config.get('quant_method')}); give the original")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **extra)
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} has no tokenizer that loads: {str(error).splitlines()[0]}") from None
    weights = weight_arguments(extra)
    dtype = dtype or (torch.float32 if "gguf_file" in extra else "auto")  # type: ignore[assignment]
    try:
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, attn_implementation="sdpa", **weights)
    except OSError as error:
        raise ValueError(f"{source} cannot be loaded: {str(error).splitlines()[0]}") from None
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def weight_arguments(extra: dict[str, str]) -> dict[str, Any]:
    """What from_pretrained needs besides the place: for a GGUF file, the order to unpack it where transformers would not."""
    if "gguf_file" in extra and hasattr(transformers, "GgufConfig"):
        return {**extra, "quantization_config": transformers.GgufConfig(dequantize=True)}
    return dict(extra)


def locate(source: str) -> tuple[str, dict[str, str]]:
    """(folder or hub id, extra arguments of from_pretrained)."""
    path = Path(source).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{source}: no such GGUF file")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"{source} holds no config.json; give a model folder, a .gguf file or a hub id")
        check_files(path)
        return str(path), {}
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ValueError(f"{source}: no such folder; give a model folder, a .gguf file or a hub id")
    return source, {}


def check_files(folder: Path) -> None:
    """Raises ValueError that names a .safetensors file whose header and length do not fit."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None


def quiet() -> AbstractContextManager:
    """Keeps the progress bars that other libraries draw out of a log; a terminal may show them."""
    return nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
