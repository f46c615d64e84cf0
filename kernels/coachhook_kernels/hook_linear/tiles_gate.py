"""The gate of many rows: what its kernels share, and the calibrated gate.

A gate reads parts of the score and leaves score, index and the list of open rows.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from coachhook_kernels.gate import TokenGate
from coachhook_kernels.launch import prepared
from coachhook_kernels.launch.sizes import cdiv

# Counters of a series: the length of the list, and the number of programs done with it.
OPEN, FINISHED = (tl.constexpr(i) for i in range(2))
OF_A_SERIES = tl.constexpr(8)

ADDED_ROWS = 4
"""Rows whose parts one program adds: few, for the programs of an ordinary prompt to fill a GPU."""

ADDED_PARTS = 16
"""Parts loaded at once. One after another they would cost a latency each."""

SUMMED_ROWS = 32
"""The same where a part is a single number of each row."""

SCORE_TILE = 64


class Parts(NamedTuple):
    """The parts of the score: `tensor` is float32 `(parts, t, n_score)` of `F k` or `A k`; or, if
    `summed`, `(parts, t)`, sums of squares of a dense `Δ k`."""

    tensor: Tensor
    n_score: int
    summed: bool


class Decisions(NamedTuple):
    """Of t rows: score float32 `(t,)` and nearest fingerprint int64 `(t,)`; the open rows, int32,
    in any order; and the counters of the series, which say how many these are."""

    score: Tensor
    nearest: Tensor
    rows: Tensor
    counters: Tensor

    @classmethod
    def empty(cls, n_rows: int, counters: Tensor) -> "Decisions":
        def of(dtype: torch.dtype) -> Tensor:
            return torch.empty(n_rows, dtype=dtype, device=counters.device)

        return cls(of(torch.float32), of(torch.int64), of(torch.int32), counters)


# Arguments that a kernel passes on together; the tuples vanish in compilation.
class Threshold(NamedTuple):
    """A gate is open where `(score - mean) / std >= alpha`."""

    p_mean: Any
    p_std: Any
    p_alpha: Any


class Decided(NamedTuple):
    """The pointers of `Decisions`."""

    p_score: Any
    p_index: Any
    p_rows: Any
    p_counters: Any


@triton.jit
def add_parts(
    p_parts, o_row, o_s, m_tile, n_rows, n_parts, n_score,
    BM: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The slices of `F k` or `A k`, added up: `(BM, S)`."""
    b_sum = tl.zeros((BM, S), tl.float32)
    for i_part in range(0, n_parts, PARTS):
        o_part = i_part + tl.arange(0, PARTS)
        o_cell = o_part[:, None].to(tl.int64) * n_rows + o_row[None, :]
        b_parts = tl.load(
            p_parts + o_cell[:, :, None] * n_score + o_s[None, None, :],
            mask=(o_part < n_parts)[:, None, None] & m_tile[None, :, :],
            other=0.0,
        )
        b_sum += tl.sum(b_parts, axis=0)
    return b_sum


@triton.jit
def list_open(p_rows, p_counters, o_m, m_open):
    """Add the open rows to the list, in any order: no row's result depends on its place."""
    b_open = m_open.to(tl.int32)
    n_open = tl.sum(b_open, axis=0)
    if n_open > 0:
        i_first = tl.atomic_add(p_counters + OPEN, n_open, sem="relaxed")
        tl.store(p_rows + i_first + tl.cumsum(b_open, axis=0) - 1, o_m, mask=m_open)


@triton.jit
def decide(b_score, b_index, o_m, m_m, threshold, decided):
    """Store score and index of the rows `o_m`, and list those that are open."""
    tl.store(decided.p_score + o_m, b_score, mask=m_m)
    tl.store(decided.p_index + o_m, b_index.to(tl.int64), mask=m_m)
    b_z = tl.div_rn(b_score - tl.load(threshold.p_mean), tl.load(threshold.p_std))
    m_open = m_m & (b_z >= tl.load(threshold.p_alpha))
    list_open(decided.p_rows, decided.p_counters, o_m, m_open)


@triton.jit
def read_dense(p_parts, o_row, m_m, n_rows, n_parts, BM: tl.constexpr, PARTS: tl.constexpr):
    """`‖Δ k‖` from the sums of squares of a dense `Δ k`."""
    b_squares = tl.zeros((BM,), tl.float32)
    for i_part in range(0, n_parts, PARTS):
        o_part = i_part + tl.arange(0, PARTS)
        b_parts = tl.load(
            p_parts + o_part[:, None].to(tl.int64) * n_rows + o_row[None, :],
            mask=(o_part < n_parts)[:, None] & m_m[None, :],
            other=0.0,
        )
        b_squares += tl.sum(b_parts, axis=0)
    return tl.sqrt(b_squares)


@triton.jit
def read_factored(
    p_parts, p_lowered, o_row, m_m, n_rows, n_score, n_parts,
    BM: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`‖A k‖`, which is `‖Δ k‖`; stores `A k` itself for the correction."""
    b_squares = tl.zeros((BM,), tl.float32)
    for i_s in range(0, n_score, S):
        o_s = i_s + tl.arange(0, S)
        m_tile = m_m[:, None] & (o_s < n_score)[None, :]
        b_lowered = add_parts(p_parts, o_row, o_s, m_tile, n_rows, n_parts, n_score, BM, S, PARTS)
        b_squares += tl.sum(b_lowered * b_lowered, axis=1)
        tl.store(
            p_lowered + o_row[:, None] * n_score + o_s[None, :],
            b_lowered.to(p_lowered.dtype.element_ty),
            mask=m_tile,
        )
    return tl.sqrt(b_squares)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def norm_kernel(
    p_parts, p_mean, p_std, p_alpha, p_score, p_index, p_rows, p_counters, p_lowered,
    n_rows, n_score, n_parts,
    SUMMED: tl.constexpr, BM: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The calibrated gate of `BM` rows.

    parts: `(n_parts, n_rows, n_score)` of `A k`; or, SUMMED, sums of squares `(n_parts, n_rows)` of
    a dense `Δ k`.
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_row = o_m.to(tl.int64)
    if SUMMED:
        b_score = read_dense(p_parts, o_row, m_m, n_rows, n_parts, BM, PARTS)
    else:
        b_score = read_factored(
            p_parts, p_lowered, o_row, m_m, n_rows, n_score, n_parts, BM, S, PARTS
        )
    b_index = tl.full((BM,), -1, tl.int32)
    threshold = Threshold(p_mean, p_std, p_alpha)
    decide(b_score, b_index, o_m, m_m, threshold, Decided(p_score, p_index, p_rows, p_counters))


def read_norm(parts: Parts, gate: TokenGate, lowered: Tensor, decisions: Decisions) -> None:
    """One launch of `norm_kernel`, which fills `decisions` and, for factors, lowered `(t, rank)`
    with `A k`."""
    n_rows = decisions.rows.shape[0]
    block = SUMMED_ROWS if parts.summed else ADDED_ROWS
    prepared.launch(
        norm_kernel,
        (cdiv(n_rows, block),),
        p_parts=parts.tensor,
        p_mean=gate.mean,
        p_std=gate.std,
        p_alpha=gate.alpha,
        p_score=decisions.score,
        p_index=decisions.nearest,
        p_rows=decisions.rows,
        p_counters=decisions.counters,
        p_lowered=lowered,
        n_rows=n_rows,
        n_score=parts.n_score,
        n_parts=parts.tensor.shape[0],
        SUMMED=parts.summed,
        BM=block,
        S=SCORE_TILE,
        PARTS=ADDED_PARTS,
    )
