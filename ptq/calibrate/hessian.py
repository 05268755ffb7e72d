"""The Hessian of a linear layer's output error.

H = mean over calibration tokens of x xᵀ.  "Hessian" is the field's word; the true one is twice this.  Sums are float32.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from ptq.calibrate.observe import Observed
from ptq.kernels import hessian as kernels

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def strip_width(H: Tensor) -> int:
    """Columns of the strips that `add_lower` multiplies from the diagonal down: on a GPU as many as are fastest, one strip up to
    2048 columns, where launching takes longer than the products."""
    d = H.shape[-1]
    return -(-d // (4 if not H.is_cuda else 1 if d <= 2048 else 4 if d <= 8192 else 8))


def add_lower(H: Tensor, X: Tensor) -> None:
    """H (d_in, d_in) += Xᵀ X, in place, but for what is above the squares on its diagonal: `mirror` fills that in at the end.

    X (tokens, d_in), any float dtype; 16-bit ones on a GPU are not widened first.
    """
    strip = strip_width(H)
    if X.is_cuda and X.dtype in SIXTEEN_BITS:
        kernels.add_lower(H, X, strip)
        return
    X = X.to(H.dtype)
    for start in range(0, len(H), strip):
        own = slice(start, start + strip)
        H[own, : own.stop].addmm_(X[:, own].T, X[:, : own.stop])


def mirror(H: Tensor) -> Tensor:
    """H (..., d_in, d_in), whole: what `add_lower` left out is what is across the diagonal.  In place."""
    strip = strip_width(H)
    for start in range(strip, H.shape[-1], strip):
        own = slice(start, start + strip)
        H[..., :start, own] = H[..., own, :start].mT
    return H


def add_product(C: Tensor, A: Tensor, B: Tensor) -> None:
    """C (a, b) += Aᵀ B, in place.  A (tokens, a) and B (tokens, b) of one float dtype; 16-bit ones as in `add_lower`."""
    if A.is_cuda and A.dtype in SIXTEEN_BITS:
        torch.addmm(C, A.T, B, out_dtype=torch.float32, out=C)
        return
    C.addmm_(A.to(C.dtype).T, B.to(C.dtype))


def add_blocks(H: Tensor, X: Tensor) -> None:
    """H (d_in/block, block, block) += the diagonal blocks of Xᵀ X, in place, by one batched matmul.  X (tokens, d_in)."""
    if X.is_cuda and H.dtype == torch.float32:
        H += kernels.block_hessian(X, H.shape[-1])
        return
    X = rearrange(X.to(H.dtype), "t (b k) -> b t k", k=H.shape[-1])
    H.baddbmm_(X.mT, X)


def weighted(X: Tensor, weights: Tensor) -> Tensor:
    """√w x for each token: float32, or bfloat16 where X (tokens, d_in) is 16-bit on a GPU.

    Then H is the exact Hessian of inputs that differ from these by 2⁻⁹ of each element at most, so it stays positive
    semidefinite.  bfloat16 also for float16: it has float32's range, whatever the weights' unit.
    """
    fast = X.is_cuda and X.dtype in SIXTEEN_BITS
    X = X * weights.float().sqrt()[:, None]
    return X.bfloat16() if fast else X


class Hessian:
    """Running mean of x xᵀ: the whole matrix, or with `block` its diagonal blocks only.  Any split of the stream will do.

    With token weights it is Σ w x xᵀ / Σ w, so that their scale does not matter.  On a GPU the weighted tokens of a 16-bit model
    are rounded to bfloat16 (`weighted`), so that they take the fast product too.
    """

    def __init__(self, d_in: int, *, block: int | None = None, device: torch.device | str = "cpu"):
        shape = (d_in, d_in) if block is None else (d_in // block, block, block)
        self.sum = torch.zeros(shape, dtype=torch.float32, device=device)
        self.weight = torch.zeros((), dtype=torch.float64, device=device)
        self.tokens = 0
        self._whole = block is None

    def add(self, X: Tensor, weights: Tensor | None = None) -> None:
        """Add tokens X (..., d_in), each counting for weights (...), 1 without."""
        X = X.flatten(0, -2)
        if weights is not None:
            X = weighted(X, weights.to(X.device).flatten())
        (add_lower if self._whole else add_blocks)(self.sum, X)
        self.weight += X.shape[0] if weights is None else weights.sum(dtype=torch.float64).to(self.weight.device)
        self.tokens += X.shape[0]

    def observe(self, ours: Observed, theirs: Observed | None, weights: Tensor | None) -> None:
        """Takes in tokens as the quantized model has them."""
        self.add(ours.x, weights)

    def sums(self) -> list[Tensor]:
        return [self.sum, self.weight]

    def mean(self) -> Tensor:
        """H.  Raises ValueError where no token came, where none counts, or where an activation was not finite."""
        self._check()
        return self._mirrored() / self.weight.float()

    def _mirrored(self) -> Tensor:
        return mirror(self.sum) if self._whole else self.sum

    def _check(self) -> None:
        if not self.tokens:
            raise ValueError("no calibration tokens arrived")
        if not self.weight > 0:
            raise ValueError(f"the weights of {self.tokens} calibration tokens add up to {float(self.weight)}")
        diagonal = self.sum.diagonal(dim1=-2, dim2=-1)
        if not diagonal.isfinite().all():
            columns = (~diagonal.flatten().isfinite()).nonzero().flatten().tolist()
            raise ValueError(f"non-finite activations in {len(columns)} input columns, the first {columns[0]}")

    def take_mean(self) -> Tensor:
        """H in the memory of the sum, which is gone then; raises as `mean`."""
        self._check()
        return self._mirrored().div_(self.weight.float())

    @staticmethod
    def stack_means(parts: Sequence["Hessian"]) -> tuple[Tensor, Tensor]:
        """(H (e, d_in, d_in), weights (e,)) of several; raises as `mean`, without saying of which."""
        H, weights = torch.stack([part._mirrored() for part in parts]), torch.stack([part.weight for part in parts])
        sound = (weights > 0) & H.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
        if not all(part.tokens for part in parts) or not sound.all():
            raise ValueError("no calibration tokens arrived, or non-finite ones")
        return H.div_(weights.float()[:, None, None]), weights

    def merge(self, other: "Hessian") -> "Hessian":
        """Takes the other's tokens in, and returns itself."""
        self.sum += other.sum
        self.weight += other.weight
        self.tokens += other.tokens
        return self
