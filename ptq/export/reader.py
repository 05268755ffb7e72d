"""A checkpoint that somebody wrote, seen as quantized linears: which layout it has, and what each linear is.

Recognised are compressed-tensors (NVFP4, MXFP4, INT4), ModelOpt's NVFP4 and GPTQ's versions 1 and 2.  What a linear is, its
tensors say (names, dtypes, shapes in the files' headers); which layout and which version, config.json.  No code that comes
with a checkpoint is run.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from ptq.core.formats import BF16, INT4_G128, MXFP4, NVFP4, Format, ScaleGrid
from ptq.core.packing import Quantized
from ptq.export.compressed_tensors import CompressedTensors
from ptq.export.finding import matches_compressed
from ptq.export.gptq_layout import STORED_ZERO, VERSION_1, GPTQLayout
from ptq.export.index import header, read_tensors
from ptq.export.layout import Layout
from ptq.export.modelopt import ModelOpt

# Scales of others' INT4: any positive number of the dtype.
F16 = ScaleGrid(torch.float16, first_code=1, count=0x7C00 - 1, halves_from=2.0**-13)
F32 = ScaleGrid(torch.float32, first_code=1, count=0x7F800000 - 1, halves_from=2.0**-125)
INT4_GRIDS = {"BF16": BF16, "F16": F16, "F32": F32}


@dataclass(frozen=True)
class Parts:
    """Names of a linear's tensors: the one that tells a quantized linear, the scales, and all of them."""

    mark: str
    codes: str
    scales: str
    all: tuple[str, ...]
    divisors: bool = False
    tensor_scale: str = ""
    input_scale: str = ""


PARTS = {
    "compressed-tensors": Parts(
        "weight_packed",
        "weight_packed",
        "weight_scale",
        ("weight_packed", "weight_scale", "weight_global_scale", "weight_shape", "input_global_scale"),
        True,
        "weight_global_scale",
        "input_global_scale",
    ),
    "modelopt": Parts(
        "weight_scale_2",
        "weight",
        "weight_scale",
        ("weight", "weight_scale", "weight_scale_2", "input_scale"),
        False,
        "weight_scale_2",
        "input_scale",
    ),
    "gptq": Parts("qweight", "qweight", "scales", ("qweight", "qzeros", "scales", "g_idx")),
}
PARTS["gptq-v2"] = PARTS["gptq"]


@dataclass(frozen=True)
class Checkpoint:
    """`about`: safetensors' header of each tensor (dtype, shape).  `linears`: full names of the quantized ones.
    `quantization`: what the configuration says of it.  `activations`: whether inputs are quantized too."""

    folder: Path
    layout: Layout
    config: dict
    quantization: dict
    files: dict[str, Path]
    about: dict[str, dict] = field(repr=False)
    linears: tuple[str, ...] = field(repr=False)
    activations: bool = False

    @property
    def parts(self) -> Parts:
        return PARTS[self.layout.name]

    def names(self, linear: str) -> tuple[str, ...]:
        """The tensors there are of a linear."""
        return tuple(name for part in self.parts.all if (name := f"{linear}.{part}") in self.files)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return read_tensors(self.files, names)

    def format(self, linear: str) -> Format:
        """Raises ValueError where the tensors are those of no format here."""
        return format_of(linear, self.about, self.layout.name)

    def quantized(self, linear: str) -> Quantized:
        """Codes and scales.  Raises ValueError where a layout's rules are broken."""
        tensors = self.read(self.names(linear))
        divisor = f"{linear}.{self.parts.tensor_scale}"
        if self.parts.divisors and divisor in tensors:
            tensors[divisor] = tensors[divisor].reshape(1)
        found = self.layout.unpack(linear, tensors, self.format(linear))
        assert found is not None, linear
        return self.in_model_dtype(found)

    def in_model_dtype(self, quantized: Quantized) -> Quantized:
        """INT4 scales in bfloat16 where the model is and that is exact: readers multiply in the dtype scales are stored in."""
        grid, scales = quantized.format.grid, quantized.scales
        model = str(self.config.get("dtype") or self.config.get("torch_dtype"))
        if grid.dtype.itemsize == 1 or model != "bfloat16" or not torch.equal(scales.to(torch.bfloat16).float(), scales):
            return quantized
        return replace(quantized, format=replace(quantized.format, grid=BF16))

    def rounds_inputs(self, linear: str) -> bool:
        """Whether the configuration has this linear's inputs in 4 bits."""
        groups = self.quantization.get("config_groups", {}).values()
        matching = (g for g in groups if any(matches_compressed(target, linear) for target in g.get("targets", [])))
        group = next(matching, None)
        return self.activations if group is None or self.layout.name != "compressed-tensors" else in_four_bits(group)

    def dense(self) -> list[str]:
        """Names of the modules whose weight is a matrix in 16 or 32 bits, embeddings aside."""
        ends = ".weight"
        matrices = [
            name
            for name, about in self.about.items()
            if name.endswith(ends) and len(about["shape"]) == 2 and about["dtype"] in ("BF16", "F16", "F32")
        ]
        modules = [name.removesuffix(ends) for name in matrices]
        return sorted(name for name in modules if name not in self.linears and "embed" not in name.rpartition(".")[2])


def read_json(path: Path) -> dict:
    """Empty where there is no such file.  Raises ValueError where it is not JSON."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}): copy it again") from None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Raises ValueError where there is no checkpoint or none in a layout known here."""
    config = read_json(folder / "config.json")
    files: dict[str, Path] = {}
    about: dict[str, dict] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found = header(path)
        files |= dict.fromkeys(found, path)
        about |= found
    if not config or not files:
        raise ValueError(f"{folder} has no {'config.json' if not config else 'safetensors file'}: name a checkpoint's folder")
    said = config.get("quantization_config") or read_json(folder / "hf_quant_config.json")
    said = said or read_json(folder / "quantize_config.json")
    layout = layout_of(folder, said)
    mark = f".{PARTS[layout.name].mark}"
    linears = tuple(sorted(name.removesuffix(mark) for name in files if name.endswith(mark)))
    if not linears:
        raise ValueError(
            f"{folder} has no tensor {mark!r}, so no linear quantized in the layout {layout.name}: is the config its own?"
        )
    return Checkpoint(folder, layout, config, said, files, about, linears, has_activations(said))


def layout_of(folder: Path, said: dict) -> Layout:
    method = str(said.get("quant_method") or said.get("producer", {}).get("name") or "none").lower()
    if method == "compressed-tensors":
        return CompressedTensors()
    if method.startswith("modelopt"):
        return ModelOpt(activations=has_activations(said))
    if method == "gptq" or (method == "auto-round" and "gptq" in str(said.get("packing_format", "gptq"))):
        version = said.get("checkpoint_format", VERSION_1)
        if version not in STORED_ZERO:
            raise ValueError(f"{folder} has checkpoint_format {version!r}; GPTQ's known here are {', '.join(STORED_ZERO)}")
        return GPTQLayout(version)
    raise ValueError(
        f"{folder} is quantized by {method!r}; layouts read here are compressed-tensors, modelopt, gptq and gptq-v2"
    )


def has_activations(said: dict) -> bool:
    """Whether the configuration has inputs in 4 bits too."""
    inner = said.get("quantization", said)
    if "quant_algo" in inner:
        return str(inner["quant_algo"]).upper() == "NVFP4"
    return any(in_four_bits(group) for group in said.get("config_groups", {}).values())


def in_four_bits(group: dict) -> bool:
    return (group.get("input_activations") or {}).get("num_bits") == 4


def format_of(linear: str, about: dict[str, dict], layout: str) -> Format:
    parts = PARTS[layout]
    codes, scales = about[f"{linear}.{parts.codes}"], about.get(f"{linear}.{parts.scales}")
    if scales is None:
        raise ValueError(f"{linear} has no {parts.scales}: copy its file again")
    if codes["dtype"] == "U8":
        return NVFP4 if f"{linear}.{parts.tensor_scale}" in about else MXFP4
    if codes["dtype"] != "I32" or scales["dtype"] not in INT4_GRIDS:
        raise ValueError(
            f"{linear} has codes in {codes['dtype']} and scales in {scales['dtype']}, which no 4-bit format here has"
        )
    d_in, blocks = d_in_of(codes, layout), scales["shape"][0 if layout.startswith("gptq") else 1]
    return replace(INT4_G128, block=d_in // blocks, grid=INT4_GRIDS[scales["dtype"]])


def d_in_of(codes: dict, layout: str) -> int:
    """Inputs of a linear, by the header of its codes."""
    if layout.startswith("gptq"):
        return codes["shape"][0] * 8
    return codes["shape"][1] * (8 if codes["dtype"] == "I32" else 2)
