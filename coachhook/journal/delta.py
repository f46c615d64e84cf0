"""Δ of a layer as a running sum: each batch adds its share, as factors or dense
(csrc_notes/method.md, "Low-rank Δ").

As long as it saves memory, `Δ = U A` with orthonormal `U`, so that `‖Δ k‖ = ‖A k‖`; dense from then
on. The result depends on the batches and their order alone, so that a folder read again, a batch
taken back and a running editor all have the same Δ.
"""

import torch
from torch import Tensor

from coachhook_kernels import Delta

# A batch may lose this much of ‖Δ‖ (Frobenius): the unit roundoff of the float32 that Δ is kept in,
# so that what is dropped is never more than what storing rounds away. After T batches that is at
# most T times this, and about √T of it in practice: 10⁻⁶ after hundreds (measured by the tests).
DROPPED = 2.0**-24


def no_delta(shape: tuple[int, int]) -> Delta:
    """Δ of a layer of `shape` `(d_in, d_out)` without edits."""
    d_in, d_out = shape
    number = torch.float32
    return Delta(torch.zeros(0, d_in, dtype=number), torch.zeros(d_out, 0, dtype=number))


def add(delta: Delta, residuals: Tensor, solutions: Tensor, *, in_place: bool = False) -> Delta:
    """`Δ + Σ rᵢ aᵢᵀ` for rows rᵢ `(n, d_out)` and aᵢ `(n, d_in)`; all float32 on the CPU.

    in_place: a dense `delta` may be overwritten, which changes no bit of the result.

    Directions whose share is below `DROPPED` of ‖Δ‖ are left out. The sum becomes dense once its
    rank r has `r · (d_in + d_out) ≥ d_in · d_out`, and stays so.
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
    # Once leaves a trace of U where most of R lies in it; twice is enough.
    correction = basis.T @ rest
    return mix + correction, rest - basis @ correction


def _directions(rest: Tensor, solutions: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """`E G` as float32 `(d_out, k)` with orthonormal columns times `(k, d_in)`, of the least k that
    `DROPPED` allows beside the rows `down` of Δ in directions orthogonal to E."""
    basis, triangle = torch.linalg.qr(rest)
    _, factor = torch.linalg.qr(solutions.T.double(), mode="r")
    # E G = basis · (triangle · factorᵀ) · (orthonormal rows): its singular values are those of a
    # matrix no larger than (n, n).
    turn, sizes, _ = torch.linalg.svd(triangle @ factor.T, full_matrices=False)
    whole = torch.hypot(torch.linalg.vector_norm(down), torch.linalg.vector_norm(sizes))
    without = sizes.square().flip(0).cumsum(0).flip(0).sqrt()
    kept = int((without > DROPPED * whole).sum())
    turn = turn[:, :kept]
    rows = (turn.T @ triangle) @ solutions.double()
    return (basis @ turn).float(), rows.float()
