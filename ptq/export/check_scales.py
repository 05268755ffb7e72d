"""The numbers: scales that are not finite, that differ within what engines fuse, that vLLM's Marlin sets to zero."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ptq.core.formats import E8M0, decode_scales
from ptq.export.finding import ERROR, NOTE, WARNING, Finding, fused_groups
from ptq.export.marlin import SMALLEST, factor, flushed
from ptq.export.reader import Checkpoint

SAME = "quantize again with one tensor_scale for what engines fuse (ptq does)"


def check_scales(checkpoint: Checkpoint, linears: Sequence[str]) -> Iterator[Finding]:
    """`linears`: those whose tensors can be read."""
    lost = total = layers = 0
    worst, share = "", 0.0
    for group in fused_groups(linears):
        scales = {name: block_scales(checkpoint, name) for name in group}
        for name, values in scales.items():
            yield from check_values(checkpoint, name, values)
        yield from check_fused(checkpoint, group)
        if all(checkpoint.format(name).tensor_scale for name in group):
            together = torch.cat([values.flatten() for values in scales.values()]).nan_to_num(0.0).clamp(min=0)
            gone = int(flushed(together).sum())
            lost, total, layers = lost + gone, total + together.numel(), layers + (gone > 0)
            if gone / together.numel() > share:
                worst, share = group[0], gone / together.numel()
                smallest = SMALLEST / factor(together).item()
    if lost:
        sentence = (
            f"{lost} of {total} block scales in {layers} fused layers are set to zero by vLLM's Marlin kernel (GPUs before "
            f"Blackwell), most here, {share:.2%}, all below {smallest:g}"
        )
        yield Finding(
            NOTE if lost / total < 1e-3 else WARNING,
            worst,
            sentence,
            "see what it costs (docs/formats.md), or raise small scales",
        )


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
    needs = checkpoint.activations and checkpoint.format(name).tensor_scale
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
