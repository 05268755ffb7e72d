"""The shape of the repository: links, import directions, file sizes."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("kernels", "models", "eval")
SOURCES = sorted(path for folder in ("ptq", *LINKED, "scripts") for path in (ROOT / folder).glob("**/*.py") if path.is_file())

# From the ground up: a folder may import those below it, and itself.  CONTRIBUTING.md says what each is for.
FLOORS = (
    ("settings",),
    ("core", "runtime", "data"),
    ("kernels",),
    ("methods", "calibrate", "models"),
    ("export", "functional"),
    ("run", "eval"),
    ("cost",),
    ("pipeline",),
    ("api",),
    ("cli",),
    ("scripts",),
)
FLOOR = {folder: floor for floor, folders in enumerate(FLOORS) for folder in folders} | {"": len(FLOORS)}
ONLY_IN = {
    "transformers": ("ptq.models", "ptq.eval", "ptq.export", "ptq.pipeline", "ptq.api", "ptq.cli", "scripts"),
    "triton": ("ptq.kernels", "scripts.bench_kernels"),
    "lm_eval": ("ptq.eval.harness", "ptq.eval.checked"),
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"ptq.{name}" if name.split(".")[0] in LINKED else name


def folder_of(module: str) -> str:
    """The folder (or file) right inside ptq/ that the module is in, "scripts" for a script, "" for ptq itself."""
    parts = module.split(".")
    return parts[0] if parts[0] == "scripts" else parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.skipif(not (ROOT / "kernels").exists(), reason="an sdist has the folders themselves in ptq/, and no links")
@pytest.mark.parametrize("folder", LINKED)
def test_root_folders_are_linked_and_have_no_init(folder):
    link = ROOT / "ptq" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow or be shadowed by Hugging Face's package `kernels`"


@pytest.mark.slow
def test_transformers_imports_from_the_root(tmp_path):
    """A top-level `kernels` folder must not break transformers' search for the package of that name."""
    code = "import transformers.integrations.hub_kernels, ptq.models.adapter"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    for module in imports(path):
        if module.split(".")[0] == "ptq" and folder_of(module) and folder_of(module) != folder_of(name):
            assert FLOOR[folder_of(module)] < FLOOR[folder_of(name)], f"{name} may not import {module}"
        allowed = ONLY_IN.get(module.split(".")[0])
        assert allowed is None or name.startswith(allowed), f"{name} may not import {module}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_stay_short(path):
    ceiling = 350 if "kernels" in path.parts else 300
    assert len(path.read_text().splitlines()) <= ceiling
