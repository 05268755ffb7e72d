"""A layer's RMSNorms in one kernel each, while it is calibrated on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from ptq.kernels import norm as kernels


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., d) over the root of its mean square, in float32 and rounded to x's dtype; times weight (d,)."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def eps_of(module: nn.Module) -> float | None:
    """That of a module that does what `rms_norm` does, to the bit, on a small input; None for any other."""
    eps, weight = getattr(module, "variance_epsilon", None), getattr(module, "weight", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or weight.dim() != 1 or list(module.children()):
        return None
    x = torch.linspace(-3, 3, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(2, -1)
    return eps if torch.equal(module(x), rms_norm(x, weight, eps)) else None


@contextmanager
def fused_norms(module: nn.Module) -> Iterator[None]:
    """Inside the block the RMSNorms in `module` that are on a GPU run as one kernel, those that do already left alone; sums of
    squares in another order."""
    norms = [part for part in module.modules() if "norm" in type(part).__name__.lower()]
    on_gpu = [part for part in norms if "forward" not in vars(part) and all(weight.is_cuda for weight in part.parameters())]
    found = {part: eps for part in on_gpu if (eps := eps_of(part)) is not None}
    for part, eps in found.items():
        part.forward = partial(kernels.rms_norm, weight=part.weight, eps=eps)  # type: ignore[method-assign,arg-type]
    try:
        yield
    finally:
        for part in found:
            del part.forward
