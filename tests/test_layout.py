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

# A module may import ours of smaller rank only.
RANK = {
    "ptq": 0,
    "ptq.formats": 1,
    "ptq.adapter": 1,
    "ptq.packing": 2,
    "ptq.scales": 2,
    "ptq.watch": 1,
    "ptq.linalg": 1,
    "ptq.kernels.rounding": 1,
    "ptq.kernels.pairs": 2,
    "ptq.kernels.matmul": 2,
    "ptq.kernels.hessian": 2,
    "ptq.kernels.quantize": 3,
    "ptq.kernels.search": 4,
    "ptq.kernels.panel": 5,
    "ptq.kernels.int4": 5,
    "ptq.kernels.sweep": 6,
    "ptq.kernels.functional": 5,
    "ptq.hessian": 6,
    "ptq.token_weights": 7,
    "ptq.presets": 5,
    "ptq.calibration": 6,
    "ptq.functional": 7,
    "ptq.methods.solution": 7,
    "ptq.methods.rtn": 8,
    "ptq.methods.gptq": 8,
    "ptq.methods": 9,
    "ptq.config": 10,
    "ptq.plan": 11,
    "ptq.clock": 1,
    "ptq.distributed": 1,
    "ptq.activations": 2,
    "ptq.drift": 7,
    "ptq.held_out": 2,
    "ptq.collect": 8,
    "ptq.estimate": 12,
    "ptq.preview": 14,
    "ptq.summary": 1,
    "ptq.stage": 12,
    "ptq.runner": 13,
    "ptq.shared_hessians": 12,
    "ptq.export": 13,
    "ptq.unfinished": 14,
    "ptq.job": 15,
    "ptq.models.llama": 13,
    "ptq.models.shards": 13,
    "ptq.models.streaming": 14,
    "ptq.models.random": 15,
    "ptq.models.loading": 15,
    "ptq.eval.logits": 14,
    "ptq.eval": 15,
    "ptq.eval.checkpoint": 16,
    "ptq.eval.checked": 16,
    "ptq.eval.harness": 17,
    "ptq.eval.report": 16,
    "ptq.eval.text": 17,
    "scripts": 18,
}
ONLY_IN = {
    "transformers": ("ptq.models", "ptq.eval", "ptq.export", "scripts"),
    "triton": ("ptq.kernels", "scripts.bench_kernels"),
    "lm_eval": ("ptq.eval.harness", "ptq.eval.checked"),
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return f"ptq.{name}" if name.split(".")[0] in LINKED else name


def rank(module: str) -> int:
    while module not in RANK:
        module = module.rpartition(".")[0]
        assert module, "add the module to RANK"
    return RANK[module]


def imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return found | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


@pytest.mark.parametrize("folder", LINKED)
def test_root_folders_are_linked_and_have_no_init(folder):
    link = ROOT / "ptq" / folder
    assert link.is_symlink() and os.readlink(link) == f"../{folder}"
    assert not (ROOT / folder / "__init__.py").exists(), "it would shadow or be shadowed by Hugging Face's package `kernels`"


def test_transformers_imports_from_the_root(tmp_path):
    """A top-level `kernels` folder must not break transformers' search for the package of that name."""
    code = "import transformers.integrations.hub_kernels, ptq.models.llama"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_down(path):
    name = module_name(path)
    for module in imports(path):
        if module.split(".")[0] == "ptq":
            assert rank(module) < rank(name) or name == "ptq", f"{name} may not import {module}"
        allowed = ONLY_IN.get(module.split(".")[0])
        assert allowed is None or name.startswith(allowed), f"{name} may not import {module}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_files_stay_short(path):
    ceiling = 350 if "kernels" in path.parts else 300
    assert len(path.read_text().splitlines()) <= ceiling
