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


def check_float32() -> None:
    """Raises ValueError that names setting and remedy where torch multiplies float32 matrices in less.

    With TensorFloat32 the factor of H is 1000 times less exact, or there is none.  What counts is what is in
    force, not who set it: TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 only chooses what torch starts with.  The CPU's
    setting counts too: `medium` is bfloat16 there.
    """
    found = {  # the older setting may not be read beside these
        "torch.backends.cuda.matmul.fp32_precision": torch.backends.cuda.matmul.fp32_precision,
        "torch.backends.mkldnn.matmul.fp32_precision": torch.backends.mkldnn.matmul.fp32_precision,  # type: ignore[attr-defined]
    }
    for name, value in found.items():
        if value not in ("none", "ieee", "highest"):
            raise ValueError(
                f"{name} is {value!r}, so float32 matrices would not be multiplied in float32; call "
                "torch.set_float32_matmul_precision('highest'), and unset TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's "
                "containers set"
            )
