"""Ours against other people's code, where an environment for it is there (scripts/compare_peers.py makes them)."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from ptq.core.formats import INT4_G128
from ptq.methods.gptq import gptq, visit_order

from .conftest import ROOT
from .test_evaluate import module_of
from .tiny import TEXT, save_tiny

PEERS = ROOT / "build" / "peers"


def python_of(peer: str) -> str:
    python = PEERS / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{python} is not there; scripts/compare_peers.py makes it")
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["absmax", "mse", "local", "joint"])
def test_int4_gptq_has_the_codes_of_llm_compressor(tmp_path, rule):
    """Same W, H, damping and scales: those our loop chose, which theirs takes as given.

    Both sum in float32, in another order, so that a value within rounding noise of a midpoint may fall to the other side, and what
    follows it in its row with it; everywhere else the codes are the same.
    """
    python = python_of("llm-compressor")
    random = torch.Generator().manual_seed(0)
    d_out, d_in, damp = 48, 512, 0.01
    W = 0.02 * torch.randn(d_out, d_in, generator=random)
    X = torch.randn(2048, 64, generator=random) @ torch.randn(64, d_in, generator=random) + torch.randn(
        2048, d_in, generator=random
    )
    H = X.T @ X / len(X)
    ours = gptq(W, H, INT4_G128, rule=rule, tensor_scale=torch.ones(()), damp=damp).quantized
    # Blocks are visited by falling mean diag(H), whole ones: the same as permuting W, H and the scales, and going left to right.
    order = visit_order(H, 128)
    blocks = order.view(-1, 128)[:, 0] // 128
    given = {"W": W[:, order], "H": H[order][:, order], "scales": ours.scales[:, blocks], "damp": torch.tensor(damp)}
    np.savez(tmp_path / "in.npz", **{name: value.numpy() for name, value in given.items()})
    command = [python, str(ROOT / "scripts" / "peers" / "gptq_codes.py"), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True, capture_output=True)
    theirs = torch.from_numpy(np.load(tmp_path / "out.npz")["Q"])
    steps = (theirs / given["scales"].repeat_interleave(128, 1)).round() - (ours.codes[:, order].float() - 8)
    first = steps.ne(0).float().argmax(1)
    for row in steps.any(1).nonzero().flatten().tolist():
        assert steps[row, first[row]].abs() == 1, f"row {row} starts to differ by more than a step"
    assert steps.any(1).float().mean() < 0.1


@pytest.mark.slow
def test_a_recipe_that_fails_is_named_and_the_others_go_on(python, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", python)  # which runs our own recipes
    script = module_of("compare_peers")
    save_tiny(tmp_path / "model", dtype=torch.bfloat16)
    (tmp_path / "text.txt").write_text(TEXT)
    recipes = ["ptq-nvfp4-rtn", "ptq-int4"]  # 64 input columns are no multiple of 128
    calibration = ["--calibration", str(tmp_path / "text.txt"), "--sequences", "4", "--length", "32"]
    given = [str(tmp_path / "model"), "--recipes", *recipes, *calibration, "--work", str(tmp_path / "work")]
    evaluation = ["--text", str(tmp_path / "text.txt"), "--length", "64", "--windows", "3", "--device", "cpu"]
    assert script.main([*given, "--output", str(tmp_path / "out" / "run"), "--", *evaluation]) == 0
    printed = capsys.readouterr().out
    assert "no ptq-int4: error: model.layers.0" in printed and "use --block 64" in printed
    result = json.loads((tmp_path / "out" / "run.ptq-nvfp4-rtn.json").read_text())
    assert result["made_by"] == "ptq nvfp4, rtn, absmax, none" and result["text"]["kl"] > 0
    tokens = np.load(tmp_path / "work" / "tokens.npy")
    assert tokens.shape == (4, 32)
    assert script.main([*given, "--seed", "1"]) == 1
    assert "was made with other settings" in capsys.readouterr().err


def test_an_unknown_recipe_lists_those_there_are(capsys):
    with pytest.raises(SystemExit):
        module_of("compare_peers").main(["model", "--recipes", "ptq-nvfp5", "--work", "x"])
    assert "recipe 'ptq-nvfp5': there are ptq-nvfp4-rtn" in capsys.readouterr().err
