"""Consecutive closed-form update of one layer, by recursive least squares
(csrc_notes/method.md, "Batch update" and "Recursive inverse").

Paper Eq. 10-14: `Δ_new = R K₂ᵀ C_accu⁻¹` with `C_accu = λ C₀ + K' K'ᵀ + K₂ K₂ᵀ`. Only one triangle
of the inverse is kept; a batch of c keys costs about `3 d_in² c` floating-point operations, and
memory does not grow. csrc_notes/update.md has the derivation and measurements.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from coachhook.errors import StatisticsError

logger = logging.getLogger(__name__)

# Added to C₀'s diagonal, relative to the diagonal's mean. Without it, changes along directions that
# ordinary text never uses would cost nothing, and a second moment of few tokens would be singular.
_RIDGE = 1e-5

# Largest relative error of `Q k`, and so of Δ, that the probe check accepts, by stored dtype.
_ERROR = {torch.float64: 1e-6, torch.float32: 1e-2}

_PROBES = 4

# Most keys absorbed at a time, and most whose products are kept from `solve` to `absorb`.
_CHUNK = 2048

# Rows of a block: enough to keep a GPU busy, few enough to store little above the diagonal.
_BLOCK = 1024


class Earlier(NamedTuple):
    """Keys of earlier batches: tensors `(c, d_in)`, and for keys no longer kept individually their
    Gram matrix `Σ k kᵀ` `(d_in, d_in)`."""

    keys: Iterable[Tensor] = ()
    gram: Tensor | None = None


class RecursiveInverse:
    """`Q = C_accu⁻¹` of one layer: its lower triangle, as block rows.

    moment: `C₀` `(d_in, d_in)`, any dtype and device; kept, not copied. preservation: λ. earlier:
    called now, and again whenever the inverse is recomputed; it must return all keys to preserve
    at that time, including those absorbed since. device: where the inverse is stored and updated,
    by default that of `moment`; it must support float64. dtype: how the inverse is stored, float64
    or float32. All arithmetic is in float64: storing float32 only halves the memory. The inverse
    takes about `d_in² / 2` numbers, and `2 c d_in` more between `solve` and `absorb` of c keys.

    Every `solve` first checks `Q` on four probes `X`, whose images `Y = C_accu X` are updated
    independently of `Q`: the drift is `‖Q Y − X‖ / ‖X‖`. The probes are drawn such that `Y` looks
    like keys (its second moment is `C_accu` when the inverse is computed), so the drift is the root
    mean square relative error of `Q k` over keys. An error confined to one direction appears in it
    `√d_in` times smaller than in the keys affected, so `Q` is recomputed from `moment` and
    `earlier` when `√d_in · drift` exceeds 10⁻⁶ (float64) or 10⁻² (float32).

    Raises `StatisticsError` if the matrix is not positive definite, or so ill-conditioned that even
    a fresh inverse fails the check.
    """

    block_rows: list[Tensor]
    _solved: tuple[Tensor, Tensor] | None

    def __init__(
        self,
        moment: Tensor,
        preservation: float,
        earlier: Callable[[], Earlier] = Earlier,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._moment = moment
        self._preservation = preservation
        self._earlier = earlier
        self._device = moment.device if device is None else device
        self._dtype = dtype
        self._factorise()

    def solve(self, keys: Tensor, fit: float) -> Tensor:
        """`G` `(c, d_in)` such that `Δ_new = Rᵀ G` for the residuals `R (c, d_out)` of new keys.

        keys `(c, d_in)`; G float64 on the inverse's device. With fit 1, `G = K₂ᵀ C_accu⁻¹` (the
        paper's closed form, by Woodbury's identity); a larger `fit` counts the batch's own keys
        that many times in its solve, which leaves less residual error at them, even at a key that
        earlier edits constrain. Raises `StatisticsError` for keys that are not finite.
        """
        rows = self._checked(keys)
        products, drift = self._multiplied(rows)
        # Not `drift > …`: a broken inverse may give NaN. A dropped inverse gives 1.
        if not drift <= self._tolerance:
            logger.info("the inverse is off by %.1e on the probes and made anew", drift)
            self._factorise()
            products, _ = self._multiplied(rows)
        self._solved = (rows, products) if len(rows) <= _CHUNK else None
        gram = _symmetric(products @ rows.T)
        gram.diagonal().add_(1 / fit)
        solutions: Tensor = torch.linalg.solve(gram, products)
        return solutions

    def absorb(self, keys: Tensor) -> None:
        """Add `keys` `(c, d_in)` to those that later batches preserve.

        Costs a third as much if they are exactly the keys of the last `solve`. Raises
        `StatisticsError` for keys that are not finite.
        """
        absorbed = self._checked(keys)
        # Before the inverse, so that the next check notices an update interrupted half-way.
        self._image.addmm_(self._probes @ absorbed.T, absorbed)
        solved, self._solved = self._solved, None
        for rows in absorbed.split(_CHUNK):
            known = solved is not None and torch.equal(solved[0], rows)
            products = solved[1] if solved and known else _multiply(rows, self.block_rows)
            gram = _symmetric(products @ rows.T)
            gram.diagonal().add_(1)
            # If rounding made this indefinite, the inverse becomes wrong; the next check notices.
            factor, _ = torch.linalg.cholesky_ex(gram)
            whitened = torch.linalg.solve_triangular(factor, products, upper=False)
            _add_outer(self.block_rows, whitened, -1)

    def forget(self) -> None:
        """Drop the inverse, because `earlier` no longer returns the keys absorbed so far; the next
        `solve` recomputes it."""
        self.block_rows, self._solved = [], None

    @property
    def _tolerance(self) -> float:
        return _ERROR[self._dtype] / math.sqrt(len(self._moment))

    def _checked(self, keys: Tensor) -> Tensor:
        """A float64 copy of `keys` on the inverse's device; `StatisticsError` if not finite."""
        rows = keys.to(self._device, torch.float64, copy=True)
        finite = torch.isfinite(rows).all(-1)
        if not finite.all():
            raise StatisticsError(
                f"{len(rows) - int(finite.sum())} of {len(rows)} keys of this batch are not finite;"
                " load the model in bfloat16 or float32"
            )
        return rows

    def _multiplied(self, rows: Tensor) -> tuple[Tensor, float]:
        """`rows · Q` and the drift of the inverse, in one pass over its blocks."""
        products = _multiply(torch.cat([rows, self._image]), self.block_rows)
        drift = (products[len(rows) :] - self._probes).norm() / self._probes.norm()
        return products[: len(rows)], float(drift)

    def _factorise(self) -> None:
        """Recompute the inverse from the moment and all earlier keys, in one factorisation."""
        self.forget()
        matrix = _weighted(self._moment, self._preservation, self._device)
        blocks = _block_rows(matrix)
        earlier = self._earlier()
        if earlier.gram is not None:
            matrix.add_(earlier.gram.to(self._device))
        for keys in _gathered(earlier.keys):
            _add_outer(blocks, self._checked(keys), 1)
        factor = _factorise_(matrix)
        signs = torch.randn(_PROBES, len(factor), generator=torch.Generator().manual_seed(0)).sign()
        signs = signs.to(factor)
        self._image = signs @ factor.T
        self._probes = torch.linalg.solve_triangular(factor, signs, upper=False, left=False)
        inverse = torch.cholesky_inverse(factor, out=factor)
        self.block_rows = [
            block.to(self._dtype, memory_format=torch.contiguous_format, copy=True)
            for block in _block_rows(inverse)
        ]
        _, drift = self._multiplied(self._image[:0])
        if not drift <= self._tolerance:
            remedy = "measure it on more text"
            if self._dtype != torch.float64:
                remedy += ", or set inverse_dtype to 'float64'"
            raise StatisticsError(
                f"the second moment of the keys is too ill-conditioned for {self._dtype}: an "
                f"inverse just made is off by {drift:.0e} where {self._tolerance:.0e} is allowed; "
                f"{remedy}"
            )


def whitening_sketch(
    moment: Tensor, preservation: float, size: int, seed: int, device: torch.device | None = None
) -> Tensor:
    """`F = S L⁻¹` float32 `(size, d_in)`, on the CPU: whitening by `λ C₀ = L Lᵀ`, then a random
    projection. device: where to compute, by default that of `moment`."""
    factor = _factorise_(_weighted(moment, preservation, device or moment.device))
    generator = torch.Generator().manual_seed(seed)
    sketch = torch.randn(size, len(factor), generator=generator, dtype=torch.float64)
    sketch = sketch.to(factor.device) / size**0.5
    whitened: Tensor = torch.linalg.solve_triangular(factor, sketch, upper=False, left=False)
    return whitened.float().cpu().contiguous()


def _weighted(moment: Tensor, preservation: float, device: torch.device) -> Tensor:
    """`λ C₀` plus its ridge, float64, in column-major order so that LAPACK works in place."""
    weighted = moment.to(device, torch.float64, copy=True)
    weighted.mul_(preservation)
    weighted.diagonal().add_(_RIDGE * weighted.diagonal().mean())
    return weighted.mT


def _factorise_(matrix: Tensor) -> Tensor:
    """Lower Cholesky factor of a symmetric matrix, in place; the upper triangle is not read."""
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, info))
    if info.item() or not torch.isfinite(matrix.diagonal()).all():
        raise StatisticsError(
            "the second moment of the keys is not positive definite; measure it on more text"
        )
    return matrix


def _gathered(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same rows in fewer tensors: one pass over the matrix costs the same for a few keys."""
    held: list[Tensor] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= _CHUNK:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _block_rows(matrix: Tensor) -> list[Tensor]:
    """The lower triangle as views: for each block of rows s to e, the columns 0 to e."""
    starts = range(0, len(matrix), _BLOCK)
    return [matrix[s : s + _BLOCK, : s + _BLOCK] for s in starts]


def _multiply(rows: Tensor, blocks: list[Tensor]) -> Tensor:
    """`rows · M` float64, for rows `(c, d)` and a symmetric `M` given by its block rows."""
    products = torch.zeros_like(rows)
    for block in blocks:
        wide = block.double()
        height, end = block.shape
        start = end - height
        products[:, start:end].addmm_(rows[:, :end], wide.T)
        products[:, :start].addmm_(rows[:, start:end], wide[:, :start])
    return products


def _add_outer(blocks: list[Tensor], rows: Tensor, scale: int) -> None:
    """Add `scale · rowsᵀ rows` to a symmetric matrix given by its block rows, in place."""
    for block in blocks:
        height, end = block.shape
        wide = block.double()
        wide.addmm_(rows[:, end - height : end].T, rows[:, :end], alpha=scale)
        if wide is not block:
            block.copy_(wide)
