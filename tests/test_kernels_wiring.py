"""The paths that a GPU takes through the methods, run where the tests run: under the interpreter where there is none."""

import sys

import pytest
import torch

from ptq.core.formats import MXFP4, NVFP4, choose_tensor_scale
from ptq.core.linalg import block_diagonal, damped
from ptq.kernels.sweep import sweep
from ptq.methods.gptq import gptq
from ptq.methods.rtn import rtn, rtn_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(rows: int, columns: int):
    X = torch.randn(300, columns) * torch.exp(0.7 * torch.randn(columns))
    return (0.02 * torch.randn(rows, columns)).to(DEVICE), (X.T @ X / 300).to(DEVICE)


@pytest.mark.parametrize("rule", ["absmax", "mse", "local"])
@pytest.mark.parametrize("format", [NVFP4, MXFP4], ids=lambda f: f.name)
def test_rtn(format, rule):
    W, H = problem(5, 64)
    scale = choose_tensor_scale(W, format)
    blocks = block_diagonal(damped(H, 0.01), format.block)
    ours = rtn_kernels(W, blocks, format, rule, scale).quantized
    reference = rtn(W.cpu(), H.cpu(), format, rule=rule, tensor_scale=scale.cpu()).quantized
    assert torch.equal(ours.scales.cpu(), reference.scales) and torch.equal(ours.codes.cpu(), reference.codes)


def test_rtn_refuses_rules_that_it_cannot_follow():
    """As the reference does, rather than searching for another rule's scales."""
    W, _ = problem(2, 32)
    for rule, message in (
        ("local", "needs the block Hessians"),
        ("joint", "needs the factor U"),
        ("best", "unknown scale rule"),
    ):
        with pytest.raises(ValueError, match=message):
            rtn_kernels(W, None, NVFP4, rule, choose_tensor_scale(W, NVFP4))


def test_gptq(monkeypatch):
    """The kernel's sweep in the place of the reference: same codes, and the loss identity holds."""
    W, H = problem(5, 64)
    scale = choose_tensor_scale(W, NVFP4)
    reference = gptq(W.cpu(), H.cpu(), NVFP4, rule="joint", tensor_scale=scale.cpu())
    monkeypatch.setattr(sys.modules[gptq.__module__], "sweep", sweep)
    ours = gptq(W, H, NVFP4, rule="joint", tensor_scale=scale)
    assert torch.equal(ours.quantized.codes.cpu(), reference.quantized.codes)
    assert torch.equal(ours.quantized.scales.cpu(), reference.quantized.scales)
    assert ours.accumulated is not None and ours.measured is not None
    assert torch.allclose(ours.accumulated, ours.measured, rtol=2e-5)
