"""`check`: a checkpoint, anyone's, against what readers and serving engines impose.

Only headers, scales and configuration are read, one linear at a time, and no code that comes with the checkpoint.  What engines
do is said where it is tested for; it was read in vLLM 0.26.0.
"""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from ptq.export.check_files import check_files, check_manifest, check_tokenizer
from ptq.export.check_scales import check_scales
from ptq.export.check_shapes import check_parallel, check_shapes
from ptq.export.finding import ERROR, NOTE, WARNING, Finding, matcher
from ptq.export.reader import Checkpoint, open_checkpoint, read_json

ORDER = (ERROR, WARNING, NOTE)


def check(folder: Path | str) -> list[Finding]:
    """What is wrong with the checkpoint in `folder`, worst first; empty where nothing is.

    Raises ValueError where the folder holds no checkpoint at all, or none in compressed-tensors, ModelOpt or GPTQ layout.
    """
    folder = Path(folder)
    damaged = list(check_files(folder))
    if any(finding.severity == ERROR for finding in damaged):  # nothing more can be read
        return damaged
    checkpoint = open_checkpoint(folder)
    shapes = list(check_shapes(checkpoint))
    broken = {finding.place for finding in shapes if finding.severity == ERROR}
    found = chain(
        damaged,
        shapes,
        check_scales(checkpoint, [name for name in checkpoint.linears if name not in broken]),
        check_parallel(checkpoint),
        check_names(checkpoint),
        check_embeddings(checkpoint),
        check_two_configs(checkpoint),
        check_tokenizer(folder),
        check_manifest(folder),
    )
    return sorted(found, key=lambda finding: ORDER.index(finding.severity))


def check_names(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Patterns that match nothing, and linears that the configuration and the tensors disagree about."""
    if checkpoint.layout.name not in ("compressed-tensors", "modelopt"):
        return
    inner = checkpoint.quantization.get("quantization", checkpoint.quantization)
    ignored = list(inner.get("ignore") or inner.get("exclude_modules") or [])
    matches = matcher(checkpoint.layout.name)
    dense = checkpoint.dense()
    for pattern in ignored:
        # Everyone writes lm_head, and a model with tied embeddings has none; modules without a matrix have no name here.
        if pattern != "lm_head" and not any(matches(pattern, name) for name in (*modules(checkpoint), *checkpoint.linears)):
            yield Finding(WARNING, "config.json", f"ignore pattern {pattern!r} matches nothing", "correct its spelling")
    for name in checkpoint.linears:
        pattern = next((pattern for pattern in ignored if matches(pattern, name)), None)
        if pattern:
            remedy = "take it out of ignore, or readers look for a plain weight"
            yield Finding(ERROR, name, f"it is quantized, and ignored by {pattern!r}", remedy)
    for name in dense:
        if not any(matches(pattern, name) for pattern in ignored) and targeted(checkpoint, name):
            yield Finding(ERROR, name, "its weight is not quantized, and the configuration says it is", "put it into ignore")


def check_embeddings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Which only transformers reads in FP8."""
    for name, about in checkpoint.about.items():
        if name.endswith("embed_tokens.weight") and about["dtype"] == "F8_E4M3":
            sentence = "its rows are in FP8, which transformers reads and vLLM 0.26.0 does not"
            yield Finding(WARNING, name.removesuffix(".weight"), sentence, "leave embeddings in 16 bits to serve it there")


def modules(checkpoint: Checkpoint) -> set[str]:
    """Every module with tensors, and every module around one."""
    found: set[str] = set()
    for name in checkpoint.files:
        while name := name.rpartition(".")[0]:
            found.add(name)
    return found


def targeted(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a linear that is not ignored counts as quantized."""
    groups = checkpoint.quantization.get("config_groups", {}).values()
    targets = [target for group in groups for target in group.get("targets", [])]
    return not targets or any(matcher("compressed-tensors")(target, name) for target in targets)


def check_two_configs(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Where quantization is said twice it must be said alike."""
    twice = {"modelopt": "hf_quant_config.json", "gptq": "quantize_config.json", "gptq-v2": "quantize_config.json"}
    file = twice.get(checkpoint.layout.name)
    said = checkpoint.config.get("quantization_config")
    if file is None:
        return
    other = read_json(checkpoint.folder / file)
    if not other or not said:
        missing = "config.json's quantization_config" if not said else file
        yield Finding(NOTE, missing, "it is not there, and some readers look only there", "write it too")
        return
    other = other.get("quantization", other)
    for key in ("quant_algo", "group_size", "bits", "sym", "desc_act", "checkpoint_format"):
        if key in said and key in other and said[key] != other[key]:
            sentence = f"{key} is {said[key]!r} in config.json and {other[key]!r} here"
            yield Finding(ERROR, file, sentence, "make them the same; readers differ in which they believe")
