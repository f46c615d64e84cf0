"""Δ of a layer as a running sum: each batch adds its share, as factors or dense
(csrc_notes/method.md, "Low-rank Δ").

As long as it saves memory, `Δ = U A` with orthonormal columns of `U`, so that `‖Δ k‖ = ‖A k‖`;
after that, Δ is dense. The result depends only on the batches and their order, so a reloaded
folder, a rolled-back journal and a running editor with the same batches have the same Δ.
"""

import torch
from torch import Tensor

from coachhook_kernels import Delta

# Adding a batch may drop this share of ‖Δ‖ (Frobenius). It is the unit roundoff of float32, in
# which Δ is stored, so dropping loses no more than storing does. After T batches the error is at
# most T times this, and about √T times in practice: 10⁻⁶ after hundreds (measured by the tests).
DROPPED = 2.0**-24


def no_delta(shape: tuple[int, int]) -> Delta:
    """The Δ, of rank 0, of a layer of `shape` `(d_in, d_out)` without edits."""
    d_in, d_out = shape
    number = torch.float32
    return Delta(torch.zeros(0, d_in, dtype=number), torch.zeros(d_out, 0, dtype=number))


def add(delta: Delta, residuals: Tensor, solutions: Tensor, *, in_place: bool = False) -> Delta:
    """`Δ + Σ rᵢ aᵢᵀ` for rows rᵢ `(n, d_out)` and aᵢ `(n, d_in)`; all float32 on the CPU.

    in_place: a dense `delta` may be overwritten; the result is the same bit for bit.

    Of a sum in factors, the smallest new directions are left out, together at most `DROPPED` of
    ‖Δ‖. It becomes dense once its rank r reaches `r · (d_in + d_out) ≥ d_in · d_out`, and stays so.
    """
    written = (residuals != 0).any(-1)
    residuals, solutions = residuals[written], solutions[written]
    if not len(residuals):
        return delta
    if delta.up is None:
        down = delta.down if in_place else delta.down.clone()
        return Delta(down.addmm_(residuals.T, solutions))
    mix, rest = _split(delta.up, residuals)
    down = torch.addmm(delta.down, mix.float(), solutions)
    directions, rows = _directions(rest, solutions, down)
    up, down = torch.cat([delta.up, directions], dim=1), torch.cat([down, rows])
    rank, d_in, d_out = len(down), down.shape[1], len(up)
    if rank * (d_in + d_out) >= d_in * d_out:
        return Delta(up @ down)
    return Delta(down, up)


def _split(up: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
    """`C (r, n)` and `E (d_out, n)`, float64, with `Rᵀ = U C + E` and `E` orthogonal to `U`."""
    basis, rest = up.double(), residuals.T.double()
    mix = basis.T @ rest
    rest = rest - basis @ mix
    # If R lies mostly in U, projecting once leaves a trace of U; projecting twice is enough.
    correction = basis.T @ rest
    return mix + correction, rest - basis @ correction


def _directions(rest: Tensor, solutions: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """`E G` as float32 factors `(d_out, k)`, with orthonormal columns, and `(k, d_in)`, for the
    smallest k that `DROPPED` allows. down: Δ's rows in directions orthogonal to E, which count
    towards ‖Δ‖."""
    basis, triangle = torch.linalg.qr(rest)
    _, factor = torch.linalg.qr(solutions.T.double(), mode="r")
    # E G = basis · (triangle · factorᵀ) · (orthonormal rows), so its singular values are those of
    # the middle matrix, no larger than (n, n).
    turn, sizes, _ = torch.linalg.svd(triangle @ factor.T, full_matrices=False)
    whole = torch.hypot(torch.linalg.vector_norm(down), torch.linalg.vector_norm(sizes))
    without = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = int((without > DROPPED * whole).sum())
    turn = turn[:, :kept]
    rows = (turn.T @ triangle) @ solutions.double()
    return (basis @ turn).float(), rows.float()
