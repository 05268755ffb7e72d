"""One layout of a checkpoint into another, without quantizing again: the same codes, the same scales, bit for bit.

What the other layout cannot hold is refused by name before anything stands at the target.  So is a tensor_scale whose
reciprocal does not come back: compressed-tensors stores 1 / tensor_scale and ModelOpt tensor_scale, both in float32, and for
about one value in seven there is no float32 whose reciprocal it is.  Ours are powers of two, which have one.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ptq.core.formats import Format
from ptq.core.packing import Quantized
from ptq.export.files import check_output, save_tensors, save_text
from ptq.export.gguf_layout import GGUF
from ptq.export.index import INDEX
from ptq.export.layout import Layout
from ptq.export.layouts import get_layout
from ptq.export.manifest import MANIFEST, write_manifest
from ptq.export.modelopt import ModelOpt
from ptq.export.reader import PARTS, Checkpoint, open_checkpoint

OURS_TO_WRITE = {"config.json", "hf_quant_config.json", "quantize_config.json", INDEX, MANIFEST}
NOT_CARRIED = {
    "weight_zero_point": "it is asymmetric",
    "weight_g_idx": "it is in activation order",
    "k_scale": "its cache is quantized",
    "v_scale": "its cache is quantized",
    "weight_scale": "it is quantized in a format that is not 4-bit",
}


@dataclass(frozen=True)
class Conversion:
    """What was done: between which layouts, how many linears of each format, and where it is."""

    source: Path
    target: Path
    from_layout: str
    to_layout: str
    linears: dict[str, int]


def convert(source: Path | str, target: Path | str, layout: str) -> Conversion:
    """Writes the checkpoint in `source` to `target`, a folder that must not exist, in the layout of that name.

    Tensors that are not quantized, tokenizer and all other files are copied.  Nothing is at the target until everything is.
    Raises ValueError that names the tensor, the value and the remedy where the layout cannot hold what there is.
    """
    source, target = Path(source), Path(target)
    checkpoint, wanted = open_checkpoint(source), get_layout(layout)
    if checkpoint.activations and isinstance(wanted, ModelOpt):
        wanted = replace(wanted, activations=True)
    formats = {name: checkpoint.format(name) for name in checkpoint.linears}
    refuse_what_is_lost(checkpoint)
    configs = wanted.config_files(formats, tuple(checkpoint.dense()))
    check_output(target, sum(path.stat().st_size for path in set(checkpoint.files.values())))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.absolute().parent))
    try:
        for path in sorted(set(checkpoint.files.values())):
            save_tensors(staging / path.name, converted(checkpoint, path, wanted, formats))
        copy_the_rest(checkpoint, staging, configs)
        wanted.finish(staging)
        if not isinstance(wanted, GGUF):
            write_manifest(staging)
        staging.chmod(0o755)  # mkdtemp's are for the owner alone
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    count = {name: sum(format.name == name for format in formats.values()) for name in {f.name for f in formats.values()}}
    return Conversion(source, target, checkpoint.layout.name, wanted.name, count)


def converted(checkpoint: Checkpoint, path: Path, wanted: Layout, formats: Mapping[str, Format]) -> dict[str, Tensor]:
    """The tensors of one file in the other layout; a linear goes where its codes are."""
    codes = f".{checkpoint.parts.codes}"
    here = [name for name, file in checkpoint.files.items() if file == path]
    linears = [name for name in formats if checkpoint.files[f"{name}{codes}"] == path]
    quantized = {part for name in formats for part in checkpoint.names(name)}
    tensors = checkpoint.read(name for name in here if name not in quantized)
    for name in linears:
        tensors |= repacked(name, checkpoint.quantized(name), wanted)
        tensors |= input_scale(name, checkpoint, wanted)
    return tensors


def repacked(name: str, quantized: Quantized, wanted: Layout) -> dict[str, Tensor]:
    """Raises ValueError where codes or scales do not come back from the other layout."""
    tensors = wanted.pack(name, quantized)
    back = wanted.unpack(name, tensors, quantized.format)
    assert back is not None and torch.equal(back.codes, quantized.codes), name
    for what, stored, value in (
        ("scale", back.scales, quantized.scales),
        ("tensor_scale", back.tensor_scale.reshape(1), quantized.tensor_scale.reshape(1)),
    ):
        wrong = stored != value
        if wrong.any():
            raise ValueError(
                f"{name} has {what} {value[wrong][0].item():.9g}, which the layout {wanted.name} would give back as "
                f"{stored[wrong][0].item():.9g}: keep the layout it has, or choose one that holds it (docs/formats.md)"
            )
    return tensors


def input_scale(name: str, checkpoint: Checkpoint, wanted: Layout) -> dict[str, Tensor]:
    """The linear's input scale under its name in the other layout; llama.cpp quantizes activations in its own way, without."""
    stored = f"{name}.{checkpoint.parts.input_scale}"
    there = PARTS.get(wanted.name)
    if not checkpoint.activations or stored not in checkpoint.files or there is None:
        return {}
    value = checkpoint.read([stored])[stored]
    if there.divisors != checkpoint.parts.divisors:
        value, before = 1 / value, value
        if not torch.equal(1 / value, before):
            raise ValueError(
                f"{stored} is {before.item():.9g}, whose reciprocal does not come back in float32, and the layout "
                f"{wanted.name} stores the reciprocal: keep the layout it has"
            )
    return {f"{name}.{there.input_scale}": value.reshape([1] if there.divisors else [])}


def refuse_what_is_lost(checkpoint: Checkpoint) -> None:
    """Raises ValueError for what no other layout here would say."""
    said = checkpoint.quantization
    inner = said.get("quantization", said)
    for key in ("kv_cache_scheme", "kv_cache_quant_algo", "transform_config", "sparsity_config"):
        if inner.get(key):
            raise ValueError(f"{checkpoint.folder} has {key} {inner[key]}, which only its own layout says: keep it")
    if "lm_head" in checkpoint.linears:
        raise ValueError(
            f"{checkpoint.folder} has a quantized lm_head, which no conversion here carries over: keep the layout it has"
        )
    kept = {part for name in checkpoint.linears for part in checkpoint.names(name)}
    for name in checkpoint.files:
        reason = NOT_CARRIED.get(name.rpartition(".")[2])
        if reason and name not in kept:
            raise ValueError(f"{name} is there: {reason}, which no other layout here holds: keep the layout it has")
    for group in said.get("config_groups", {}).values():
        weights = group.get("weights") or {}
        if weights.get("num_bits", 4) != 4 or not weights.get("symmetric", True):
            raise ValueError(f"{checkpoint.folder} has weights {weights}; only symmetric 4-bit ones are converted")


def copy_the_rest(checkpoint: Checkpoint, folder: Path, configs: Mapping[str, dict]) -> None:
    """All other files as they are; config.json with what the new layout says instead of what the old one said."""
    for path in sorted(checkpoint.folder.iterdir()):
        if path.is_file() and path.name not in OURS_TO_WRITE and path.suffix not in (".safetensors", ".gguf"):
            shutil.copy2(path, folder / path.name)
    config = {key: value for key, value in checkpoint.config.items() if key != "quantization_config"}
    files: dict[str, dict] = {"config.json": config}
    for name, content in configs.items():
        files[name] = files.get(name, {}) | content
    if checkpoint.activations:
        add_activations(files["config.json"].get("quantization_config", {}))
    for name, content in files.items():
        save_text(folder / name, json.dumps(content, indent=2, sort_keys=True) + "\n")


def add_activations(said: dict) -> None:
    """Inputs quantized like weights, block by block as they come; NVFP4's within the stored input scale."""
    if said.get("quant_method") != "compressed-tensors":
        return
    for group in said["config_groups"].values():
        group["input_activations"] = group["weights"] | {"dynamic": "local" if group["weights"]["group_size"] == 16 else True}
