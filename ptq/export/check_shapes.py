"""Shapes and dtypes of a linear's tensors, and whether the linears can be split over 2 to 8 GPUs."""

from collections.abc import Iterator

from ptq.export.finding import ERROR, WARNING, Finding
from ptq.export.reader import PARTS, Checkpoint, d_in_of

DTYPES = {
    "compressed-tensors": {"weight_scale": ("F8_E4M3", "U8", "BF16", "F16", "F32"), "weight_global_scale": ("F32",)},
    "modelopt": {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": ("F32",), "input_scale": ("F32",)},
    "gptq": {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32",)},
}
DTYPES["gptq-v2"] = DTYPES["gptq"]
BY_ROWS = ("o_proj", "down_proj", "w2")
"""Split along their inputs; all others along their outputs."""


def check_shapes(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Per linear the first thing that is wrong."""
    for name in checkpoint.linears:
        sentence = wrong_dtype(checkpoint, name) or wrong_shape(checkpoint, name)
        if sentence:
            yield Finding(ERROR, name, sentence, "export it again, or copy its file again")
    for name in checkpoint.files:
        linear, _, part = name.rpartition(".")
        eight_bits = checkpoint.about.get(f"{linear}.weight", {}).get("dtype") in ("F8_E4M3", "I8")  # not looked at here
        if part in ("weight_scale", "qzeros", "weight_global_scale") and linear not in checkpoint.linears and not eight_bits:
            missing = PARTS[checkpoint.layout.name].mark
            yield Finding(ERROR, name, f"it is there and {linear}.{missing} is not", "copy the file with the missing tensor")


def wrong_dtype(checkpoint: Checkpoint, name: str) -> str:
    about, layout = checkpoint.about, checkpoint.layout.name
    needed = {"compressed-tensors": ("weight_scale",), "modelopt": ("weight", "weight_scale")}.get(layout, ("qzeros", "scales"))
    for part in needed:
        if f"{name}.{part}" not in about:
            return f"it has no {part}"
    for part, allowed in DTYPES[layout].items():
        dtype = about.get(f"{name}.{part}", {}).get("dtype", allowed[0])
        if dtype not in allowed:
            return f"{part} is stored as {dtype}; readers take {' or '.join(allowed)}, anything else is read wrongly or refused"
    try:
        checkpoint.format(name)
    except ValueError as error:
        return str(error)
    return ""


def wrong_shape(checkpoint: Checkpoint, name: str) -> str:
    about, parts, layout = checkpoint.about, checkpoint.parts, checkpoint.layout.name
    format, codes = checkpoint.format(name), about[f"{name}.{parts.codes}"]
    d_in = d_in_of(codes, layout)
    d_out = codes["shape"][1 if layout.startswith("gptq") else 0]
    if d_in % format.block:
        return f"its {d_in} inputs are no multiple of the block of {format.block}"
    due = [d_out, d_in // format.block]
    due = due[::-1] if layout.startswith("gptq") else due
    if about[f"{name}.{parts.scales}"]["shape"] != due:
        return f"{parts.scales} has shape {about[f'{name}.{parts.scales}']['shape']}, and its codes call for {due}"
    divisor = about.get(f"{name}.weight_global_scale")
    if divisor and divisor["shape"] != [1]:
        return f"weight_global_scale has shape {divisor['shape']}; transformers loads [1] only"
    if layout == "compressed-tensors" and codes["dtype"] == "I32" and f"{name}.weight_shape" not in about:
        return "it has no weight_shape, which readers of pack-quantized need"
    return ""


def check_parallel(checkpoint: Checkpoint) -> Iterator[Finding]:
    """For each number of GPUs that divides the heads, the first linear whose share is no whole number of blocks or words."""
    heads = checkpoint.config.get("num_attention_heads") or 1
    for size in range(2, 9):
        if heads % size:
            continue
        sentences = ((name, cannot_split(checkpoint, name, size)) for name in checkpoint.linears)
        bad = [(name, sentence) for name, sentence in sentences if sentence]
        if bad:
            more = f" (and {len(bad) - 1} more linears)" if len(bad) > 1 else ""
            remedy = f"serve on another number of GPUs than {size}, or leave it in 16 bits"
            yield Finding(WARNING, bad[0][0], f"tensor parallel {size} is not possible: {bad[0][1]}{more}", remedy)


def cannot_split(checkpoint: Checkpoint, name: str, size: int) -> str:
    codes, layout = checkpoint.about[f"{name}.{checkpoint.parts.codes}"], checkpoint.layout.name
    try:
        block = checkpoint.format(name).block
    except ValueError:
        return ""  # check_shapes has said so
    d_in = d_in_of(codes, layout)
    d_out = codes["shape"][1 if layout.startswith("gptq") else 0]
    unit, whole, what = (block, d_in, "inputs") if name.endswith(BY_ROWS) else (1, d_out, "outputs")
    if whole == block and what == "inputs":  # one scale a row: it is repeated on each GPU
        unit = 8 if codes["dtype"] == "I32" else 2
    if name.endswith(("k_proj", "v_proj")) and (checkpoint.config.get("num_key_value_heads") or size) < size:
        return ""  # engines repeat the heads
    unit = max(unit, 8) if layout.startswith("gptq") else unit
    if whole % (size * unit):
        share = f"{whole / size:g}"
        return (
            f"{share} of {whole} {what} on each is no multiple of {unit}" if unit > 1 else f"{whole} {what} are not divisible"
        )
    return ""
