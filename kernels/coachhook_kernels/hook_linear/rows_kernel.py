"""`hook_linear` and `hook_correction_` of few rows (decoding): everything in one launch.

The programs of the launch play roles, in the order of their ids:

    project  partial sums of `F k` (keyed gate) or `A k` (calibrated gate, factored Δ), by slices
    match    the slices added up; cosines with a tile of fingerprints, or the norm
    down     `A k`, only where a keyed gate opened on a factored Δ
    base     a tile of `W_fc k`, streamed while the gate is found out; then, only where the gate of
             a token is open, the same tile of `Δ k`

A program waits only for programs of lower id, which the hardware starts first and which wait for
nothing of higher id: no grid-wide barrier, and no limit on the size of the grid. By the time `base`
has streamed its weights the gate has long been decided. csrc_notes/hook-linear.md has the argument.
"""

import triton
import triton.language as tl

from coachhook_kernels.launch.triton_dot import dot, dot_wide

PROJECTED, MATCHED, LOWERED, FINISHED = (tl.constexpr(i) for i in range(4))


@triton.jit
def signal(p_counters, i_counter):
    # The barrier puts the stores of every thread before the one thread's release.
    tl.debug_barrier()
    tl.atomic_add(p_counters + i_counter, 1, sem="release", scope="gpu")


@triton.jit
def wait(p_counters, i_counter, target):
    while tl.atomic_add(p_counters + i_counter, 0, sem="acquire", scope="gpu") < target:
        pass


@triton.jit
def stream(
    b_acc, p_matrix, stride_n, stride_k, p_keys, stride_t, o_n, m_n, o_t, m_t,
    begin, d_in, LENGTH: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`b_acc (BN, BT) + matrix[o_n, begin : begin + LENGTH] @ keys[o_t, same]ᵀ`; LENGTH 0: all."""
    end = d_in
    if LENGTH > 0:
        end = begin + LENGTH
    for i_k in range(begin, end, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < d_in
        b_matrix = tl.load(
            p_matrix + o_n.to(tl.int64)[:, None] * stride_n + o_k.to(tl.int64)[None, :] * stride_k,
            mask=m_n[:, None] & m_k[None, :],
            other=0.0,
        )
        b_keys = tl.load(
            p_keys + o_t.to(tl.int64)[None, :] * stride_t + o_k[:, None],
            mask=m_t[None, :] & m_k[:, None],
            other=0.0,
        )
        b_acc = dot(b_matrix, b_keys, b_acc)
    return b_acc


@triton.jit
def add_slices(
    p_partials, o_n, m_n, o_t, m_t, n_slices, n_rows, n_tokens,
    BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """The slices of `project`, added up: `(BN, BT)`."""
    b_sum = tl.zeros((BN, BT), tl.float32)
    # Some at a time: a slice alone would cost a trip to the cache for every step.
    TOGETHER: tl.constexpr = 64 // BT
    for i_slice in range(0, n_slices, TOGETHER):
        o_slice = i_slice + tl.arange(0, TOGETHER)
        b_slices = tl.load(
            p_partials
            + (o_slice[:, None, None] * n_rows + o_n[None, :, None]) * n_tokens
            + o_t[None, None, :],
            mask=(o_slice < n_slices)[:, None, None] & m_n[None, :, None] & m_t[None, None, :],
            other=0.0,
        )
        b_sum += tl.sum(b_slices, axis=0)
    return b_sum


@triton.jit
def clears(b_score, p_mean, p_std, p_alpha):
    # Rounded as torch rounds: a score right at the threshold must be open here and there.
    return tl.div_rn(b_score - tl.load(p_mean), tl.load(p_std)) >= tl.load(p_alpha)


@triton.jit
def best_match(p_best, p_best_index, o_t, m_t, n_match, n_tokens, MATCHES: tl.constexpr):
    """Score and fingerprint of each token from the tiles of `match`."""
    o_match = tl.arange(0, MATCHES)
    m_match = (o_match < n_match)[:, None] & m_t[None, :]
    o_best = o_match[:, None] * n_tokens + o_t[None, :]
    b_best = tl.load(p_best + o_best, mask=m_match, other=-float("inf"))
    b_index = tl.load(p_best_index + o_best, mask=m_match, other=-1)
    b_score = tl.max(b_best, axis=0)
    # The first tile among equals; a NaN, which `max` may lose, is found again by its index.
    b_first = tl.where(b_best == b_score[None, :], b_index, 2147483647)
    b_nan = tl.max(tl.where(b_best != b_best, 1, 0), axis=0) > 0
    return tl.where(b_nan, float("nan"), b_score), tl.where(b_nan, -1, tl.min(b_first, axis=0))


@triton.jit
def match_tile(
    p_partials, p_offset, p_fingerprints, p_enabled, o_t, m_t, i_match,
    n_slices, n_score, n_tokens, n_fingerprints, p_counters, n_project,
    S: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Largest cosine and its fingerprint among tile `i_match` of the fingerprints."""
    o_e = i_match * BE + tl.arange(0, BE)
    o_s = tl.arange(0, S)
    m_s = o_s < n_score
    # Loaded before the wait, which they do not depend on.
    m_e = o_e < n_fingerprints
    b_fingerprints = tl.load(
        p_fingerprints + o_e[:, None] * n_score + o_s[None, :],
        mask=m_e[:, None] & m_s[None, :],
        other=0.0,
    )
    m_enabled = tl.load(p_enabled + o_e, mask=m_e, other=0) != 0
    b_offset = tl.load(p_offset + o_s, mask=m_s, other=0.0).to(tl.float32)
    wait(p_counters, PROJECTED, n_project)
    b_q = add_slices(p_partials, o_s, m_s, o_t, m_t, n_slices, n_score, n_tokens, S, BT)
    b_q -= b_offset[:, None]
    b_norm = tl.sqrt(tl.sum(b_q * b_q, axis=0))
    b_unit = b_q / tl.maximum(b_norm, 1e-12)[None, :]
    b_cosine = dot_wide(b_fingerprints, b_unit, tl.zeros((BE, BT), tl.float32))
    b_cosine = tl.where(m_enabled[:, None], b_cosine, -1.0)
    b_best = tl.max(b_cosine, axis=0)
    m_best = (b_cosine == b_best[None, :]) & m_enabled[:, None]
    b_index = tl.min(tl.where(m_best, o_e[:, None], 2147483647), axis=0)
    b_best = tl.where(b_norm < float("inf"), b_best, float("nan"))
    return b_best, tl.where(b_index == 2147483647, -1, b_index)


# Counts that change with the batch and with every edit: a kernel for each would compile for ever.
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
    m_t = o_t < n_tokens
    i_match = i_program - n_project
    i_down = i_match - n_match
    i_base = i_down - n_down
    if i_program < n_project:
        i_slice = i_program % n_slices
        o_s = i_program // n_slices * BS + tl.arange(0, BS)
        m_s = o_s < n_score
        b_acc = tl.zeros((BS, BT), tl.float32)
        b_acc = stream(
            b_acc, p_projection, stride_pn, stride_pk, p_keys, stride_kt, o_s, m_s, o_t, m_t,
            i_slice * SLICE, d_in, SLICE, PK,
        )  # fmt: skip
        tl.store(
            p_partials + (i_slice * n_score + o_s)[:, None] * n_tokens + o_t[None, :],
            b_acc,
            mask=m_s[:, None] & m_t[None, :],
        )
        signal(p_counters, PROJECTED)
    elif i_match < n_match:
        if KEYED:
            b_best, b_index = match_tile(
                p_partials, p_offset, p_fingerprints, p_enabled, o_t, m_t, i_match,
                n_slices, n_score, n_tokens, n_fingerprints, p_counters, n_project, BS, BE, BT,
            )  # fmt: skip
        else:
            wait(p_counters, PROJECTED, n_project)
            b_squares = tl.zeros((BT,), tl.float32)
            for i_r in range(0, n_score, BS):
                o_r = i_r + tl.arange(0, BS)
                m_r = o_r < n_score
                b_lowered = add_slices(
                    p_partials, o_r, m_r, o_t, m_t, n_slices, n_score, n_tokens, BS, BT
                )
                b_squares += tl.sum(b_lowered * b_lowered, axis=0)
                tl.store(
                    p_lowered + o_r[:, None] * n_tokens + o_t[None, :],
                    b_lowered,
                    mask=m_r[:, None] & m_t[None, :],
                )
            b_best = tl.sqrt(b_squares)
            b_index = tl.full((BT,), -1, tl.int32)
        tl.store(p_best + i_match * n_tokens + o_t, b_best, mask=m_t)
        tl.store(p_best_index + i_match * n_tokens + o_t, b_index, mask=m_t)
        signal(p_counters, MATCHED)
    elif i_down < n_down:
        wait(p_counters, MATCHED, n_match)
        b_score, b_index = best_match(p_best, p_best_index, o_t, m_t, n_match, n_tokens, MATCHES)
        m_open = m_t & clears(b_score, p_mean, p_std, p_alpha)
        if tl.max(m_open.to(tl.int32), axis=0) > 0:
            o_r = i_down * BN + tl.arange(0, BN)
            m_r = o_r < rank
            b_lowered = tl.zeros((BN, BT), tl.float32)
            b_lowered = stream(
                b_lowered, p_down, stride_dn, stride_dk, p_keys, stride_kt, o_r, m_r, o_t, m_open,
                0, d_in, 0, BK,
            )  # fmt: skip
            tl.store(
                p_lowered + o_r[:, None] * n_tokens + o_t[None, :],
                b_lowered,
                mask=m_r[:, None] & m_t[None, :],
            )
        signal(p_counters, LOWERED)
    else:
        o_n = i_base * BN + tl.arange(0, BN)
        m_n = o_n < d_out
        b_acc = tl.zeros((BN, BT), tl.float32)
        if BASE:
            b_acc = stream(
                b_acc, p_weight, stride_wn, stride_wk, p_keys, stride_kt, o_n, m_n, o_t, m_t,
                0, d_in, 0, BK,
            )  # fmt: skip
            if p_bias is not None:
                b_acc += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        wait(p_counters, MATCHED, n_match)
        b_score, b_index = best_match(p_best, p_best_index, o_t, m_t, n_match, n_tokens, MATCHES)
        m_open = m_t & clears(b_score, p_mean, p_std, p_alpha)
        if i_base == 0:
            tl.store(p_score + o_t, b_score, mask=m_t)
            tl.store(p_index + o_t, b_index.to(tl.int64), mask=m_t)
        p_tile = p_output + o_t.to(tl.int64)[None, :] * stride_ot + o_n[:, None]
        m_stored = m_n[:, None] & m_t[None, :]
        if tl.max(m_open.to(tl.int32), axis=0) > 0:
            b_delta = tl.zeros((BN, BT), tl.float32)
            if FACTORED:
                if KEYED:
                    wait(p_counters, LOWERED, n_down)
                for i_r in range(0, rank, BR):
                    o_r = i_r + tl.arange(0, BR)
                    m_r = o_r < rank
                    b_up = tl.load(
                        p_up + o_n.to(tl.int64)[:, None] * stride_un + o_r[None, :] * stride_ur,
                        mask=m_n[:, None] & m_r[None, :],
                        other=0.0,
                    )
                    b_lowered = tl.load(
                        p_lowered + o_r[:, None] * n_tokens + o_t[None, :],
                        mask=m_r[:, None] & m_open[None, :],
                        other=0.0,
                    )
                    b_delta = dot(b_up, b_lowered.to(b_up.dtype), b_delta)
            else:
                b_delta = stream(
                    b_delta, p_down, stride_dn, stride_dk, p_keys, stride_kt, o_n, m_n, o_t, m_open,
                    0, d_in, 0, BK,
                )  # fmt: skip
            # Closed tokens get nothing at all: zero keys times a weight that is not finite is NaN.
            b_acc += tl.where(m_open[None, :], b_delta, 0.0)
            if not BASE:
                m_stored = m_stored & m_open[None, :]
                b_acc += tl.load(p_tile, mask=m_stored, other=0.0).to(tl.float32)
                tl.store(p_tile, b_acc.to(p_output.dtype.element_ty), mask=m_stored)
        if BASE:
            tl.store(p_tile, b_acc.to(p_output.dtype.element_ty), mask=m_stored)
    # Who finishes last leaves the counters as they were found, for the next launch.
    tl.debug_barrier()
    n_programs = tl.num_programs(0)
    if tl.atomic_add(p_counters + FINISHED, 1, sem="acq_rel", scope="gpu") == n_programs - 1:
        tl.store(p_counters + tl.arange(0, 4), tl.zeros((4,), tl.int32))
