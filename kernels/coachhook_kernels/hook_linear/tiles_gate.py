"""The gate of many rows: from parts of the score to the list of open rows."""

import triton
import triton.language as tl

from coachhook_kernels.launch.triton_dot import dot_wide

# Counters of a series: the length of the list, and the number of programs done with it.
OPEN, FINISHED = (tl.constexpr(i) for i in range(2))
OF_A_SERIES = tl.constexpr(8)


@triton.jit
def add_parts(
    p_parts, o_row, o_s, m_tile, n_rows, n_parts, n_score, BM: tl.constexpr, S: tl.constexpr
):
    """The slices of `F k` or `A k`, added up: `(BM, S)`."""
    b_sum = tl.zeros((BM, S), tl.float32)
    for i_part in range(n_parts):
        b_sum += tl.load(
            p_parts + (i_part * n_rows + o_row)[:, None] * n_score + o_s[None, :],
            mask=m_tile,
            other=0.0,
        )
    return b_sum


@triton.jit
def nearest_fingerprint(
    b_unit, p_fingerprints, p_enabled, o_s, m_s, n_score, n_fingerprints,
    BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Largest cosine with unit vectors `(S, BM)`, and its fingerprint; -1 and -1 where no
    fingerprint is enabled."""
    b_score = tl.full((BM,), -1.0, tl.float32)
    b_index = tl.full((BM,), -1, tl.int32)
    for i_e in range(0, n_fingerprints, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < n_fingerprints
        b_fingerprints = tl.load(
            p_fingerprints + o_e[:, None] * n_score + o_s[None, :],
            mask=m_e[:, None] & m_s[None, :],
            other=0.0,
        )
        m_enabled = tl.load(p_enabled + o_e, mask=m_e, other=0) != 0
        b_cosine = dot_wide(b_fingerprints, b_unit, tl.zeros((BE, BM), tl.float32))
        b_cosine = tl.where(m_enabled[:, None], b_cosine, -2.0)
        b_best = tl.max(b_cosine, axis=0)
        b_first = tl.min(
            tl.where(b_cosine == b_best[None, :], o_e[:, None], n_fingerprints), axis=0
        )
        # Strictly above, to keep the first among equals. -2: no fingerprint of the tile is enabled.
        m_better = (b_best > b_score) | ((b_index < 0) & (b_best > -2.0))
        b_score = tl.where(m_better, tl.maximum(b_best, -1.0), b_score)
        b_index = tl.where(m_better, b_first, b_index)
    return b_score, b_index


@triton.jit
def read_keyed(
    p_parts, p_offset, p_fingerprints, p_enabled, o_row, m_m,
    n_rows, n_score, n_parts, n_fingerprints,
    BM: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Score and fingerprint by the keyed gate: NaN and -1 for a row that is not finite."""
    o_s = tl.arange(0, S)
    m_s = o_s < n_score
    m_tile = m_m[:, None] & m_s[None, :]
    b_q = add_parts(p_parts, o_row, o_s, m_tile, n_rows, n_parts, n_score, BM, S)
    b_q -= tl.load(p_offset + o_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
    b_norm = tl.sqrt(tl.sum(b_q * b_q, axis=1))
    b_unit = tl.trans(b_q / tl.maximum(b_norm, 1e-12)[:, None])
    b_score, b_index = nearest_fingerprint(
        b_unit, p_fingerprints, p_enabled, o_s, m_s, n_score, n_fingerprints, BM, BE
    )
    m_finite = b_norm < float("inf")
    return tl.where(m_finite, b_score, float("nan")), tl.where(m_finite, b_index, -1)


@triton.jit
def read_dense(p_parts, o_row, m_m, n_rows, n_parts, BM: tl.constexpr):
    """`‖Δ k‖` from the sums of squares of a dense `Δ k`."""
    b_squares = tl.zeros((BM,), tl.float32)
    for i_part in range(n_parts):
        b_squares += tl.load(p_parts + i_part * n_rows + o_row, mask=m_m, other=0.0)
    return tl.sqrt(b_squares)


@triton.jit
def read_factored(
    p_parts, p_lowered, o_row, m_m, n_rows, n_score, n_parts, BM: tl.constexpr, S: tl.constexpr
):
    """`‖A k‖`, which is `‖Δ k‖`; stores `A k` itself for the correction."""
    b_squares = tl.zeros((BM,), tl.float32)
    for i_s in range(0, n_score, S):
        o_s = i_s + tl.arange(0, S)
        m_tile = m_m[:, None] & (o_s < n_score)[None, :]
        b_lowered = add_parts(p_parts, o_row, o_s, m_tile, n_rows, n_parts, n_score, BM, S)
        b_squares += tl.sum(b_lowered * b_lowered, axis=1)
        tl.store(
            p_lowered + o_row[:, None] * n_score + o_s[None, :],
            b_lowered.to(p_lowered.dtype.element_ty),
            mask=m_tile,
        )
    return tl.sqrt(b_squares)


@triton.jit
def list_open(p_rows, p_counters, o_m, m_open):
    """Add the open rows to the list, in any order: no row's result depends on its place."""
    b_open = m_open.to(tl.int32)
    n_open = tl.sum(b_open, axis=0)
    if n_open > 0:
        i_first = tl.atomic_add(p_counters + OPEN, n_open, sem="relaxed")
        tl.store(p_rows + i_first + tl.cumsum(b_open, axis=0) - 1, o_m, mask=m_open)


@triton.jit(do_not_specialize=["n_rows", "n_parts", "n_fingerprints"])
def gate_kernel(
    p_parts, p_offset, p_fingerprints, p_enabled, p_mean, p_std, p_alpha,
    p_score, p_index, p_lowered, p_rows, p_counters,
    n_rows, n_score, n_parts, n_fingerprints,
    KEYED: tl.constexpr, SUMMED: tl.constexpr,
    BM: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Score and nearest fingerprint of `BM` rows, and their place in the list if they are open.

    parts: `(n_parts, n_rows, n_score)` of `F k` or `A k`; or, SUMMED, sums of squares
    `(n_parts, n_rows)` of a dense `Δ k`.
    """
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_row = o_m.to(tl.int64)
    b_index = tl.full((BM,), -1, tl.int32)
    if KEYED:
        b_score, b_index = read_keyed(
            p_parts, p_offset, p_fingerprints, p_enabled, o_row, m_m,
            n_rows, n_score, n_parts, n_fingerprints, BM, S, BE,
        )  # fmt: skip
    elif SUMMED:
        b_score = read_dense(p_parts, o_row, m_m, n_rows, n_parts, BM)
    else:
        b_score = read_factored(p_parts, p_lowered, o_row, m_m, n_rows, n_score, n_parts, BM, S)
    tl.store(p_score + o_m, b_score, mask=m_m)
    tl.store(p_index + o_m, b_index.to(tl.int64), mask=m_m)
    b_z = tl.div_rn(b_score - tl.load(p_mean), tl.load(p_std))
    list_open(p_rows, p_counters, o_m, m_m & (b_z >= tl.load(p_alpha)))
