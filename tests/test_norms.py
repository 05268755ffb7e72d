"""RMSNorm as one kernel: what torch gives, and only where a module is one."""

import pytest
import torch

from ptq.calibrate.norms import eps_of, fused_norms, rms_norm
from ptq.kernels import norm as kernels

from .tiny import tiny_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of a sum of squares in another order the root is at most one step of float32 off, which may turn a rounding of the output over,
# and the product with the weight a second one.
STEPS = {torch.float32: 4 * 2**-23, torch.bfloat16: 2 * 2**-8, torch.float16: 2 * 2**-11}


@pytest.mark.parametrize("dtype", STEPS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 576), (7, 64), (2, 3, 4, 16), (1, 6000)])
def test_the_kernel_gives_what_torch_does(shape, dtype):
    torch.manual_seed(0)
    x, weight = (
        (torch.randn(*shape) * torch.logspace(-3, 2, shape[-1])).to(DEVICE, dtype),
        torch.randn(shape[-1]).to(DEVICE, dtype),
    )
    ours, theirs = kernels.rms_norm(x, weight, 1e-5).double(), rms_norm(x, weight, 1e-5).double()
    assert ((ours - theirs).abs() <= STEPS[dtype] * theirs.abs() + 2.0**-24).all()


@pytest.mark.parametrize(
    "family, kind", [("llama", True), ("qwen3", True), ("mixtral", True), ("gemma2", False), ("cohere2", False)]
)
def test_only_what_does_the_same_is_replaced(family, kind):
    """Gemma's multiplies by 1 + weight, Cohere's takes the mean away."""
    model = tiny_model(family, torch.bfloat16)
    norms = [part for part in model.modules() if "norm" in type(part).__name__.lower()]
    torch.manual_seed(0)
    for part in norms:
        part.weight.data = torch.rand_like(part.weight)
    assert norms and all((eps_of(part) is not None) == kind for part in norms)
    model = model.to(DEVICE)
    with fused_norms(model), fused_norms(model):  # of one model under two names
        assert all(("forward" in vars(part)) == (kind and DEVICE == "cuda") for part in norms)
    assert not any("forward" in vars(part) for part in norms)
