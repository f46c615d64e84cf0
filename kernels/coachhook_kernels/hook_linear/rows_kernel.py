"""`hook_linear` and `hook_correction_` for few rows (decoding): everything in one launch.

The programs of the launch play roles, in the order of their ids:

    project  partial sums of `F k` (keyed gate) or `A k` (calibrated gate, factored Δ), by slices
    match    the slices added up; cosines with a tile of fingerprints, or the norm
    down     `A k`, only where a keyed gate opened on a factored Δ
    base     a tile of `W_fc k`, streamed while the gate is decided; then, if the gate of any token
             is open, the same tile of `Δ k`

A program waits only for programs of lower id, which the hardware starts first and which wait for
nothing of higher id: no grid-wide barrier, and no limit on the size of the grid. By the time `base`
has streamed its weights the gate has long been decided. csrc_notes/hook-linear.md has the argument.
"""

import triton
import triton.language as tl

from coachhook_kernels.hook_linear.rows_gate import (
    match_fingerprints,
    match_norm,
    project,
    read_gate,
)
from coachhook_kernels.hook_linear.rows_shared import (
    LOWERED,
    MATCHED,
    PROJECTED,
    Best,
    Delta,
    Fingerprints,
    Keys,
    Matrix,
    Output,
    Partials,
    Threshold,
    Tokens,
    cells,
    leave,
    signal,
    stream,
    wait,
)
from coachhook_kernels.launch.triton_dot import dot


@triton.jit
def lower(
    delta, keys, tokens, threshold, best, p_counters, i_down,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, MATCHES: tl.constexpr,
):  # fmt: skip
    """`BN` rows of `A k`, if the gate of any token is open."""
    _, _, m_open = read_gate(threshold, best, tokens, p_counters, MATCHES)
    if tl.max(m_open.to(tl.int32), axis=0) > 0:
        o_r = i_down * BN + tl.arange(0, BN)
        m_r = o_r < delta.rank
        opened = Tokens(tokens.o_t, m_open, tokens.n_tokens)
        b_lowered = tl.zeros((BN, BT), tl.float32)
        b_lowered = stream(b_lowered, delta.down, keys, o_r, m_r, opened, 0, 0, BK)
        tl.store(
            cells(delta.p_lowered, o_r, tokens),
            b_lowered,
            mask=m_r[:, None] & tokens.m_t[None, :],
        )


@triton.jit
def base_product(
    weight, p_bias, keys, tokens, o_n, m_n,
    BASE: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`W_fc k` and the bias; without BASE, zeros."""
    b_acc = tl.zeros((BN, BT), tl.float32)
    if BASE:
        b_acc = stream(b_acc, weight, keys, o_n, m_n, tokens, 0, 0, BK)
        if p_bias is not None:
            b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
    return b_acc


@triton.jit
def expand(delta, opened, o_n, m_n, BN: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr):
    """`U (A k)` from the `A k` of `lower` or `match_norm`."""
    b_delta = tl.zeros((BN, BT), tl.float32)
    up = delta.up
    for i_r in range(0, delta.rank, BR):
        o_r = i_r + tl.arange(0, BR)
        m_r = o_r < delta.rank
        b_up = tl.load(
            up.pointer + o_n.to(tl.int64)[:, None] * up.stride_n + o_r[None, :] * up.stride_k,
            mask=m_n[:, None] & m_r[None, :],
            other=0.0,
        )
        b_lowered = tl.load(
            cells(delta.p_lowered, o_r, opened),
            mask=m_r[:, None] & opened.m_t[None, :],
            other=0.0,
        )
        b_delta = dot(b_up, b_lowered.to(b_up.dtype), b_delta)
    return b_delta


@triton.jit
def correction(
    delta, keys, opened, o_n, m_n, p_counters, KEYED: tl.constexpr, FACTORED: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """`Δ k` of the open tokens, zeros for the others."""
    if FACTORED:
        if KEYED:
            wait(p_counters, LOWERED, delta.n_down)
        b_delta = expand(delta, opened, o_n, m_n, BN, BT, BR)
    else:
        b_delta = tl.zeros((BN, BT), tl.float32)
        b_delta = stream(b_delta, delta.down, keys, o_n, m_n, opened, 0, 0, BK)
    # Closed tokens get nothing at all: zero keys times a weight that is not finite is NaN.
    return tl.where(opened.m_t[None, :], b_delta, 0.0)


@triton.jit
def base(
    weight, p_bias, delta, keys, tokens, threshold, best, output, d_out, p_counters, i_base,
    BASE: tl.constexpr, KEYED: tl.constexpr, FACTORED: tl.constexpr, BN: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, MATCHES: tl.constexpr,
):  # fmt: skip
    """`BN` columns of the output; the first of these programs also stores score and index."""
    o_n = i_base * BN + tl.arange(0, BN)
    m_n = o_n < d_out
    b_acc = base_product(weight, p_bias, keys, tokens, o_n, m_n, BASE, BN, BT, BK)
    b_score, b_index, m_open = read_gate(threshold, best, tokens, p_counters, MATCHES)
    if i_base == 0:
        tl.store(output.p_score + tokens.o_t, b_score, mask=tokens.m_t)
        tl.store(output.p_index + tokens.o_t, b_index.to(tl.int64), mask=tokens.m_t)
    p_tile = output.pointer + tokens.o_t.to(tl.int64)[None, :] * output.stride_t + o_n[:, None]
    m_stored = m_n[:, None] & tokens.m_t[None, :]
    if tl.max(m_open.to(tl.int32), axis=0) > 0:
        opened = Tokens(tokens.o_t, m_open, tokens.n_tokens)
        b_acc += correction(
            delta, keys, opened, o_n, m_n, p_counters, KEYED, FACTORED, BN, BT, BK, BR
        )
        if not BASE:
            m_stored = m_stored & m_open[None, :]
            b_acc += tl.load(p_tile, mask=m_stored, other=0.0).to(tl.float32)
            tl.store(p_tile, b_acc.to(output.pointer.dtype.element_ty), mask=m_stored)
    if BASE:
        tl.store(p_tile, b_acc.to(output.pointer.dtype.element_ty), mask=m_stored)


# Counts that change with the batch or with every edit; specialising on them would recompile each
# time.
COUNTS = ["n_tokens", "rank", "n_fingerprints", "n_slices", "n_project", "n_match", "n_down"]


@triton.jit(do_not_specialize=COUNTS)
def rows_kernel(
    p_keys, p_weight, p_bias, p_down, p_up, p_projection, p_offset, p_fingerprints, p_enabled,
    p_mean, p_std, p_alpha, p_output, p_score, p_index,
    p_partials, p_lowered, p_best, p_best_index, p_counters,
    n_tokens, d_in, d_out, n_score, rank, n_fingerprints,
    n_slices, n_project, n_match, n_down,
    stride_kt, stride_wn, stride_wk, stride_dn, stride_dk, stride_un, stride_ur, stride_pn,
    stride_pk, stride_ot,
    BASE: tl.constexpr, KEYED: tl.constexpr, FACTORED: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SLICE: tl.constexpr, BS: tl.constexpr,
    BE: tl.constexpr, MATCHES: tl.constexpr, BR: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_t = tl.arange(0, BT)
    tokens = Tokens(o_t, o_t < n_tokens, n_tokens)
    keys = Keys(p_keys, stride_kt, d_in)
    down, up = Matrix(p_down, stride_dn, stride_dk), Matrix(p_up, stride_un, stride_ur)
    delta = Delta(down, up, p_lowered, rank, n_down)
    partials = Partials(p_partials, n_slices, n_score)
    best = Best(p_best, p_best_index, n_match)
    threshold = Threshold(p_mean, p_std, p_alpha)
    i_match = i_program - n_project
    i_down = i_match - n_match
    i_base = i_down - n_down
    if i_program < n_project:
        projection = Matrix(p_projection, stride_pn, stride_pk)
        project(projection, keys, tokens, partials, i_program, SLICE, BS, BT, PK)
        signal(p_counters, PROJECTED)
    elif i_match < n_match:
        if KEYED:
            fingerprints = Fingerprints(p_fingerprints, p_offset, p_enabled, n_fingerprints)
            b_best, b_index = match_fingerprints(
                partials, fingerprints, tokens, p_counters, n_project, i_match, BS, BE, BT
            )
        else:
            b_best, b_index = match_norm(partials, p_lowered, tokens, p_counters, n_project, BS, BT)
        tl.store(p_best + i_match * n_tokens + o_t, b_best, mask=tokens.m_t)
        tl.store(p_best_index + i_match * n_tokens + o_t, b_index, mask=tokens.m_t)
        signal(p_counters, MATCHED)
    elif i_down < n_down:
        lower(delta, keys, tokens, threshold, best, p_counters, i_down, BN, BT, BK, MATCHES)
        signal(p_counters, LOWERED)
    else:
        base(
            Matrix(p_weight, stride_wn, stride_wk), p_bias, delta, keys, tokens, threshold, best,
            Output(p_output, stride_ot, p_score, p_index), d_out, p_counters, i_base,
            BASE, KEYED, FACTORED, BN, BT, BK, BR, MATCHES,
        )  # fmt: skip
    leave(p_counters)
