"""The numbers: scales that are not finite, that differ within what engines fuse, that vLLM's Marlin sets to zero."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ptq.core.formats import E8M0, decode_scales
from ptq.export.finding import ERROR, NOTE, WARNING, Finding, engine_layers, fused_groups
from ptq.export.marlin import flushed, smallest_kept
from ptq.export.reader import Checkpoint

SAME = "quantize again with one tensor_scale for what engines fuse (ptq does)"


def check_scales(checkpoint: Checkpoint, linears: Sequence[str]) -> Iterator[Finding]:
    """`linears`: those whose tensors can be read."""
    for group in fused_groups(linears):
        for name in group:
            yield from check_values(checkpoint, name, block_scales(checkpoint, name))
        yield from check_fused(checkpoint, group)
    yield from check_marlin(checkpoint, [name for name in linears if checkpoint.format(name).tensor_scale])


def check_marlin(checkpoint: Checkpoint, linears: Sequence[str]) -> Iterator[Finding]:
    """How many block scales vLLM's Marlin sets to zero, and where most of them are."""
    model = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype"))
    lost = total = 0
    layers: list[tuple[float, str, float]] = []
    for layer in engine_layers(linears):
        scales = torch.cat([block_scales(checkpoint, name).flatten() for name in layer]).nan_to_num(0.0).clamp(min=0)
        gone = int(flushed(scales, model).sum())
        lost, total = lost + gone, total + scales.numel()
        if gone:
            layers.append((gone / scales.numel(), layer[0], smallest_kept(scales, model)))
    if lost:
        share, worst, smallest = max(layers)
        sentence = (
            f"{lost} of {total} block scales in {len(layers)} fused layers are set to zero by vLLM's Marlin kernel (GPUs "
            f"before Blackwell), most here, {share:.2%}, all below {smallest:g}"
        )
        remedy = "see what it costs (docs/formats.md), or quantize again with larger small scales"
        yield Finding(NOTE if lost / total < 1e-3 else WARNING, worst, sentence, remedy)


def block_scales(checkpoint: Checkpoint, name: str) -> Tensor:
    """Of one linear, float32; not-a-number where the stored code means that."""
    stored = next(iter(checkpoint.read([f"{name}.{checkpoint.parts.scales}"]).values()))
    if stored.dtype != torch.uint8:
        return stored.float()
    return torch.where(stored == 255, torch.nan, decode_scales(stored, E8M0))


def check_values(checkpoint: Checkpoint, name: str, scales: Tensor) -> Iterator[Finding]:
    again = "quantize it again: its calibration or its weights were not finite"
    place = f"{name}.{checkpoint.parts.scales}"
    bad, negative = int((~scales.isfinite()).sum()), int((scales < 0).sum())
    zero = int((scales == 0).sum())
    if bad:
        yield Finding(ERROR, place, f"{bad} of {scales.numel()} scales are not finite", again)
    if (
        negative and checkpoint.format(name).tensor_scale
    ):  # INT4's may be: AutoRound puts the longer side of -8 … 7 where it is needed
        yield Finding(
            ERROR, place, f"{negative} scales are negative; vLLM's Marlin takes them for positive", "quantize it again"
        )
    if zero:
        sentence = f"{zero} of {scales.numel()} scales are zero, so their blocks read as zeros"
        yield Finding(
            NOTE, place, sentence, "nothing, if the original's blocks are zeros; else quantize with another scale rule"
        )
    for part in (checkpoint.parts.tensor_scale, checkpoint.parts.input_scale):
        if part and f"{name}.{part}" in checkpoint.files:
            value = single(checkpoint, f"{name}.{part}")
            if not (0 < value < float("inf")):
                yield Finding(ERROR, f"{name}.{part}", f"it is {value}, not a positive number", again)
    needs = checkpoint.rounds_inputs(name) and checkpoint.format(name).tensor_scale
    if needs and f"{name}.{checkpoint.parts.input_scale}" not in checkpoint.files:
        sentence = (
            f"activations are quantized and there is no {checkpoint.parts.input_scale}; vLLM computes with uninitialised memory"
        )
        yield Finding(ERROR, name, sentence, "export it again with calibrated inputs, or for weights only")


def check_fused(checkpoint: Checkpoint, group: Sequence[str]) -> Iterator[Finding]:
    """One scheme and one global scale: vLLM keeps the largest stored number of a fused layer, and warns once."""
    place = ", ".join(name.rpartition(".")[2] for name in group)
    place = f"{group[0].rpartition('.')[0]}.({place})" if len(group) > 1 else group[0]
    formats = {f"{checkpoint.format(name).name} in blocks of {checkpoint.format(name).block}" for name in group}
    unquantized = [name for name in partners(checkpoint, group) if f"{name}.weight" in checkpoint.files]
    if len(formats) > 1 or unquantized:
        kinds = sorted(formats) + (["16 bits"] if unquantized else [])
        sentence = f"engines fuse them and they are {' and '.join(kinds)}; vLLM refuses to load that"
        yield Finding(ERROR, place, sentence, "give them one format (ptq plans it so)")
        return
    for part, what in ((checkpoint.parts.tensor_scale, "weights"), (checkpoint.parts.input_scale, "inputs")):
        names = [f"{name}.{part}" for name in group if f"{name}.{part}" in checkpoint.files] if part else []
        values = {single(checkpoint, name) for name in names}
        if len(values) > 1:
            off = max(values) / min(values)
            sentence = f"{part} differs by up to {off:.3g} times; vLLM keeps the largest, so the others' {what} are off as much"
            yield Finding(ERROR if off > 1.001 else WARNING, place, sentence, SAME)


def partners(checkpoint: Checkpoint, group: Sequence[str]) -> list[str]:
    """Linears in 16 bits that engines fuse with those of the group."""
    parent = group[0].rpartition(".")[0]
    siblings = [name for name in checkpoint.dense() if name.rpartition(".")[0] == parent]
    return [name for name in siblings if len(list(fused_groups([group[0], name]))) == 1]


def single(checkpoint: Checkpoint, name: str) -> float:
    return float(checkpoint.read([name])[name].reshape(-1)[0])
