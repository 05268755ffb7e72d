"""Row feedback by antidiagonals of tiles against one row panel after the other."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ptq.core.formats import INT4_G128, NVFP4
from ptq.core.linalg import damped, inverse_factor
from ptq.kernels.sweep import sweep
from ptq.kernels.wavefront import sweep_tiles
from ptq.methods.gptq import sweep_one_by_one

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL_INT4 = replace(INT4_G128, name="int4 in blocks of 32", block=32)


def factor(n, generator):
    """The damped second moments of correlated inputs, and their inverse factor."""
    X = torch.randn(4 * n, n, generator=generator) @ (torch.eye(n) + 0.3 * torch.randn(n, n, generator=generator) / n**0.5)
    A = damped(X.T @ X / len(X), 0.01)
    return A.to(DEVICE), inverse_factor(A.double()).float().to(DEVICE)


@pytest.mark.parametrize(
    "rows,format,panel",
    [(24, NVFP4, 32), (21, NVFP4, 32), (24, NVFP4, 64), (24, SMALL_INT4, 32)],
    ids=lambda value: getattr(value, "name", value),
)
def test_tiles_are_the_row_panels(rows, format, panel):
    generator = torch.Generator().manual_seed(0)
    (A, U), (_, V) = factor(64, generator), factor(rows, generator)
    x = torch.randn(rows, 64, generator=generator).to(DEVICE)
    before, moved = x.clone(), x.clone()
    expected = sweep_one_by_one(before, V, 8, partial(sweep, A=A, U=U, format=format, rule="local", panel=panel))
    q, scales, loss = sweep_tiles(moved, V, 8, A, U, format, "local", panel=panel)
    assert torch.equal(q, expected[0]) and torch.equal(scales, expected[1])
    torch.testing.assert_close(moved, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, expected[2], rtol=1e-4, atol=0)
    delta = (moved - q * scales.repeat_interleave(format.block, 1)).double()
    torch.testing.assert_close(loss, ((delta @ A.double()) * delta).sum(1), rtol=1e-4, atol=0)


def test_a_batch_is_its_matrices():
    generator = torch.Generator().manual_seed(1)
    A, U = (torch.stack(part) for part in zip(factor(64, generator), factor(64, generator), strict=True))
    _, V = (torch.stack(part) for part in zip(factor(16, generator), factor(16, generator), strict=True))
    x = torch.randn(2, 16, 64, generator=generator).to(DEVICE)
    moved, run = x.clone(), partial(sweep_tiles, row_panel=8, format=NVFP4, rule="local", panel=32)
    found = run(moved, V, A=A, U=U)
    for i in range(2):
        alone = x[i].clone()
        expected = run(alone, V[i], A=A[i], U=U[i])
        assert torch.equal(moved[i], alone) and all(torch.equal(a[i], b) for a, b in zip(found, expected, strict=True))
