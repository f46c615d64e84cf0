"""Consecutive closed-form update of one layer, by recursive least squares (design section 2).

Paper Eq. 10-14: `Δ_new = R K₂ᵀ C_accu⁻¹` with `C_accu = λ C₀ + K' K'ᵀ + K₂ K₂ᵀ`. Only the inverse
is kept; a batch of c keys costs `O(d_in² c)` and memory does not grow.
"""

import torch
from torch import Tensor

from coachhook.errors import StatisticsError

# Added to C₀'s diagonal, relative to its mean: directions that ordinary text never uses would
# otherwise cost nothing, and a second moment of few tokens would not be invertible.
_RIDGE = 1e-5


class RecursiveInverse:
    """`C_accu⁻¹` of one layer, float64 `(d_in, d_in)`."""

    def __init__(self, moment: Tensor, preservation: float) -> None:
        self.factor = _cholesky(moment, preservation)
        self.inverse = torch.cholesky_inverse(self.factor)

    def solve(self, keys: Tensor, fit: float) -> Tensor:
        """`G` `(c, d_in)` such that `Δ_new = Rᵀ G` for the residuals `R (c, d_out)` of new keys.

        keys `(c, d_in)`. With fit 1, `G = K₂ᵀ C_accu⁻¹` (the paper's closed form, by Woodbury's
        identity); larger values weigh the batch's own keys that many times in its solve, and so
        leave less of their residual, also at a key that earlier edits hold fast.
        """
        rows = keys.to(self.inverse) @ self.inverse
        gram = rows @ keys.to(self.inverse).T
        gram.diagonal().add_(1 / fit)
        solutions: Tensor = torch.linalg.solve(gram, rows)
        return solutions

    def absorb(self, keys: Tensor) -> None:
        """Count `keys` `(c, d_in)` among those that later batches preserve."""
        rows = keys.to(self.inverse) @ self.inverse
        gram = rows @ keys.to(self.inverse).T
        gram.diagonal().add_(1)
        self.inverse -= rows.T @ torch.linalg.solve(gram, rows)
        self.inverse = (self.inverse + self.inverse.T) / 2


def _cholesky(moment: Tensor, preservation: float) -> Tensor:
    """Lower factor `L` of `λ C₀ = L Lᵀ`, float64."""
    factor: Tensor
    scaled = preservation * moment.double()
    scaled.diagonal().add_(_RIDGE * scaled.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(scaled)
    if info.item() or not torch.isfinite(factor).all():
        raise StatisticsError(
            "the second moment of the keys is not positive definite; measure it on more text"
        )
    return factor


def whitening_sketch(factor: Tensor, size: int, seed: int) -> Tensor:
    """`F = S L⁻¹` float32 `(size, d_in)`: whitening by `λ C₀ = L Lᵀ`, then a random projection."""
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(size, factor.shape[0], generator=generator, dtype=torch.float64)
    sketch = sketch.to(factor.device) / size**0.5
    whitened: Tensor = torch.linalg.solve_triangular(factor, sketch, upper=False, left=False)
    return whitened.float().contiguous()
