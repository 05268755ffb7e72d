"""What README.md and docs/library.md show of Python runs as it stands, on a tiny model under the name they use."""

import re
from pathlib import Path

import pytest
import torch

import ptq

from .conftest import ROOT
from .tiny import save_tiny


def blocks(name: str) -> list[str]:
    """Python in a Markdown file."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), flags=re.M | re.S)


@pytest.mark.slow
def test_the_readmes_python_runs(tmp_path, monkeypatch, capsys):
    from huggingface_hub import HfApi, RepoUrl

    save_tiny(tmp_path / "HuggingFaceTB" / "SmolLM2-135M", max_position_embeddings=512)
    monkeypatch.chdir(tmp_path)
    uploaded = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **how: RepoUrl(f"https://huggingface.co/{repo}"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **how: uploaded.append(sorted(how["folder_path"].iterdir())))
    code = blocks("README.md")
    assert len(code) == 2
    scope: dict = {}
    for block in code:
        exec(block, scope)
    assert (Path("SmolLM2-135M-NVFP4") / "report.json").is_file() and "README.md" in {path.name for path in uploaded[0]}
    assert "relative output error" in capsys.readouterr().out and scope["logits"].isfinite().all()


def test_the_librarys_python_runs(tmp_path):
    save_tiny(tmp_path / "model")
    tokens = torch.randint(0, 28, (12, 32))
    scope: dict = {"model": tmp_path / "model", "W": torch.randn(32, 64), "X": torch.randn(128, 64), "rows": 32}
    scope["H"] = scope["X"].T @ scope["X"] / 128
    first, rules, *others = blocks("docs/library.md")
    exec(first.replace("…", "calibration=tokens, device='cpu', progress=False"), scope | {"tokens": tokens})
    for block in (rules, *others):
        exec(block, scope)
    assert scope["Q"].shape == scope["dequant"].reshape(32, 64).shape == (32, 64)
    chosen = {"calibration": tokens, "rules": scope["rules"], "method": "rtn", "device": "cpu", "progress": False}
    assert len(ptq.quantize(tmp_path / "model", **chosen).report.linears) == 8  # a layer, and lm_head
