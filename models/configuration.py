"""What a stranger's config may say: held against the weight files before anything is made from it."""

import json
import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ptq.models.shards import Stored, layers_of

LARGEST_CONFIG = 10**7  # bytes
WIDTHS = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_intermediate_size")
# What transformers raises of files that make no sense; it has no class of its own for them.
UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, ImportError,
    MemoryError, EOFError, pickle.UnpicklingError, StrictDataclassError,
)  # fmt: skip


@contextmanager
def one_line(problem: str) -> Iterator[None]:
    """Raises ValueError, `problem` and the reason in one line, for what transformers raises of a file it cannot read."""
    try:
        yield
    except UNREADABLE as error:
        kind = "" if isinstance(error, OSError | ValueError) and str(error) else f"{type(error).__name__} "
        raise ValueError(f"{problem}: {kind}{' '.join(str(error).split())[:300]}") from error


def read_config(path: Path) -> dict[str, Any]:
    """Raises ValueError for what is no JSON object of a config's size."""
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, too many for a config")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object")
    return config


def check_config(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Raises ValueError that names a size in the folder's config.json that is none, or that its weight files belie, and for a
    config that names a file of weights: transformers would read that one, whatever else the folder holds."""
    path = folder / "config.json"
    config = read_config(path)
    if config.get("transformers_weights"):
        raise ValueError(
            f"{path} has transformers_weights {str(config['transformers_weights'])[:99]!r}; remove it, and name that file "
            "model.safetensors if it holds the model"
        )
    stored = sum(file.stat().st_size for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern))
    if not stored:
        raise ValueError(f"{folder} cannot be loaded: it holds no weights (.safetensors, or .bin)")
    shapes = [tensor.shape for tensor in tensors.values()]
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            check_sizes(str(path), part, shapes, layers_of(tensors) if tensors else None, stored)


def check_sizes(
    where: str, sizes: Mapping[str, Any], shapes: Iterable[tuple[int, ...]], layers: int | None, stored: int
) -> None:
    """Raises ValueError for sizes that are no whole numbers, more `layers` than the files have (None: not known), a width that
    no tensor of `shapes` has, and more layers than `stored` bytes hold."""
    largest = max((max(shape, default=1) for shape in shapes), default=stored)
    bounds: dict[str, tuple[int, int]] = {name: (1, largest) for name in WIDTHS} | {name: (0, largest) for name in COUNTS}
    if sizes.get("moe_intermediate_size"):  # the width of dense layers, of which a mixture may have none
        bounds["intermediate_size"] = (1, stored)
    bounds["num_hidden_layers"] = (1, stored if layers is None else layers)
    for name, (low, high) in bounds.items():
        value = sizes.get(name)
        if value is None:
            continue
        if type(value) is not int or value < low:
            raise ValueError(f"{where}: {name} is {repr(value)[:50]}, not a whole number from {low} up; correct it")
        if value > high:
            unit = "bytes" if high == stored else "layers" if name == "num_hidden_layers" else "as their largest dimension"
            raise ValueError(
                f"{where}: {name} is {str(value)[:50]}, but the weight files have {high} {unit}; it is not their config"
            )
    experts = max(sizes.get(name) or 1 for name in COUNTS[:3])
    parts = (sizes.get("num_hidden_layers") or 1) * experts * (sizes.get("hidden_size") or 1)
    if parts > stored:  # a byte for each weight of one norm a layer is far less than any format takes
        raise ValueError(f"{where}: its layers cannot be in the {stored} bytes of the weight files; it is not their config")


def remote_code(folder: Path) -> str:
    """What to add to an error where the model brings code of its own, which is never run; else nothing."""
    path = folder / "config.json"
    brings = path.is_file() and read_config(path).get("auto_map")
    return "; the code it brings (auto_map) is never run, and no flag runs it" if brings else ""
