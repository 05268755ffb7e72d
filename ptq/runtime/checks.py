"""What must hold of tensors and of the process before any work."""

import torch
from torch import Tensor


def check_finite(name: str, W: Tensor) -> None:
    if W.is_meta:
        return
    bad = ~torch.isfinite(W.detach())
    if bad.any():
        first = bad.nonzero()[0].tolist()
        raise ValueError(f"{name} holds {int(bad.sum())} non-finite values, the first at {first}; the checkpoint is damaged")
