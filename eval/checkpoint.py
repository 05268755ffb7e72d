"""Any checkpoint that transformers loads, quantized or not, for evaluation; and what it takes on disk."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ptq.export.index import header
from ptq.models.configuration import one_line
from ptq.models.families import FAMILIES
from ptq.models.loading import check_fit, weight_arguments
from ptq.models.location import fetch, locate


@dataclass(frozen=True)
class Loaded:
    """`seconds`: to load the weights.  `files`: the weight files, here or in the hub's cache."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seconds: float
    files: list[Path]


def load_any(source: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Loaded:
    """A model in eval mode from a folder, a hub id or a GGUF file.

    dtype: to run an unquantized model in; None, as stored (GGUF: float32).  Quantized ones run in the dtype they were stored for.
    Raises ValueError for what cannot be loaded, also where weights are missing (they would be random), and for a tokenizer with
    more words than the model has embeddings.
    """
    where, extra = locate(source)
    where = str(fetch(where)[0])
    with one_line(f"{source} cannot be loaded"):
        config = AutoConfig.from_pretrained(where, trust_remote_code=False, **extra)
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=False, **extra)
        begin = time.perf_counter()
        check_experts(source, config)
        attention = FAMILIES[config.model_type].attention if config.model_type in FAMILIES else "sdpa"
        model, info = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, with output_loading_info
            where, config=config, trust_remote_code=False, attn_implementation=attention, output_loading_info=True,
            **arguments(config, dtype, extra),
        )  # fmt: skip
        model = model.to(device).eval()
        seconds = time.perf_counter() - begin
    absent = [*info["missing_keys"], *info["mismatched_keys"]]
    if absent:
        raise ValueError(f"{source} lacks {len(absent)} tensors of the model, among them {sorted(map(str, absent))[0]}")
    check_fit(tokenizer.vocab_size - 1, model, source)
    return Loaded(model, tokenizer, seconds, weight_files(where, extra))


def check_experts(source: str, config: Any) -> None:
    """Raises ValueError for a mixture in NVFP4, of whose experts transformers 5.23 leaves the global scales out: it loads
    without a word and is another model."""
    quantized = getattr(config, "quantization_config", None) or {}
    parts = [quantized, *(quantized.get("config_groups") or {}).values()]
    formats = sorted({str(part.get("format")) for part in parts if "nvfp4" in str(part.get("format"))})
    family = FAMILIES.get(config.model_type)
    if family and family.experts and formats:
        raise ValueError(
            f"{source} is a mixture of experts in {formats[0]}, which transformers does not load right; quantize with "
            "--evaluate, which scores it with experts as plain linears, or serve it with vLLM"
        )


def arguments(config: Any, dtype: torch.dtype | None, extra: dict[str, str]) -> dict[str, Any]:
    """What from_pretrained is told besides the place."""
    if "gguf_file" in extra:
        return weight_arguments(extra) | {"dtype": dtype or torch.float32}
    quantized = getattr(config, "quantization_config", None)
    return {"dtype": "auto" if quantized or dtype is None else dtype}


def weight_files(where: str, extra: Mapping[str, str]) -> list[Path]:
    """The files of that folder that hold the weights."""
    if "gguf_file" in extra:
        return [Path(where) / extra["gguf_file"]]
    folder = Path(where)
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))


def size_on_disk(files: Sequence[Path]) -> int | None:
    """Bytes of the weight files."""
    return sum(path.stat().st_size for path in files) or None


def bits_per_weight(model: nn.Module, files: Sequence[Path]) -> float | None:
    """Stored bits of the linears over their weights: codes, scales and zero points, no biases, not the output embedding.

    From the headers of the files; None where those name the linears otherwise than the model does.
    """
    if files and files[0].suffix == ".gguf":
        return gguf_bits(files[0])
    stored: dict[str, int] = {}
    for path in files:
        if path.suffix == ".safetensors":
            for name, about in header(path).items():
                linear, _, part = name.rpartition(".")
                if part != "bias":
                    begin, end = about["data_offsets"]
                    stored[linear] = stored.get(linear, 0) + end - begin
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    shapes = {
        name: (int(module.in_features), int(module.out_features))  # type: ignore[arg-type]
        for name, module in model.named_modules()
        if hasattr(module, "in_features") and hasattr(module, "out_features") and module is not head
    }
    if not shapes or not shapes.keys() <= stored.keys():
        return None
    return 8 * sum(stored[name] for name in shapes) / sum(math.prod(shape) for shape in shapes.values())


def gguf_bits(path: Path) -> float:
    """The same of a GGUF file: its matrices named blk.N."""
    from gguf import GGUFReader

    linears = [tensor for tensor in GGUFReader(path).tensors if tensor.name.startswith("blk.") and len(tensor.shape) == 2]
    return 8 * sum(int(tensor.n_bytes) for tensor in linears) / sum(int(tensor.n_elements) for tensor in linears)
