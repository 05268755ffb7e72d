"""What the bytes of a result depend on: a run goes on only where all of it is the same."""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import ptq


def code_version() -> str:
    """Hash of the sources that the result depends on, and the versions of ours and of what computes."""
    root = Path(ptq.__file__).parent
    digest = hashlib.sha256()
    folders = [folder for folder in root.iterdir() if folder.name not in ("cost", "eval", "cli")]
    for path in sorted(path for folder in [root, *folders] for path in folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    packages = ", ".join(f"{name} {installed(name)}" for name in ("torch", "transformers", "triton"))
    return f"{ptq.__version__} {digest.hexdigest()[:16]}, {packages}"


def installed(package: str) -> str:
    """The version; "none" for a package that is not there under that name."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def fingerprint(
    model: Mapping[str, object], calibration: Tensor | None, settings: Mapping[str, object], device: torch.device | str = "cpu"
) -> dict:
    """What the bytes of the result depend on.  `model`: by file, what identifies it (ptq.models.identity)."""
    digest = None if calibration is None else hashlib.sha256(calibration.cpu().contiguous().numpy().tobytes()).hexdigest()
    shape = None if calibration is None else list(calibration.shape)
    place = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"
    about = {"model": dict(model), "calibration": {"tokens": shape, "sha256": digest}, "settings": dict(settings)}
    return json.loads(json.dumps(about | {"code": {"version": code_version()}, "device": {"name": place}}))


def differences(before: dict, after: dict) -> list[str]:
    """What differs between two fingerprints, in words."""
    found = []
    for part in sorted(before.keys() | after.keys()):
        old, new = before.get(part, {}), after.get(part, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                found.append(f"{part}: {key} was {old.get(key)} and is {new.get(key)}")
    return found
