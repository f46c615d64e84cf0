"""The roles of `rows_kernel` that decide the gate, `project` and `match`, and their result."""

import triton
import triton.language as tl

from coachhook_kernels.hook_linear.rows_shared import MATCHED, PROJECTED, cells, stream, wait
from coachhook_kernels.launch.triton_dot import dot_wide


@triton.jit
def project(
    projection, keys, tokens, partials, i_project,
    SLICE: tl.constexpr, BS: tl.constexpr, BT: tl.constexpr, PK: tl.constexpr,
):  # fmt: skip
    """One slice of `BS` rows of `F k` or `A k`."""
    i_slice = i_project % partials.n_slices
    o_s = i_project // partials.n_slices * BS + tl.arange(0, BS)
    m_s = o_s < partials.n_score
    b_acc = tl.zeros((BS, BT), tl.float32)
    b_acc = stream(b_acc, projection, keys, o_s, m_s, tokens, i_slice * SLICE, SLICE, PK)
    tl.store(
        cells(partials.pointer, i_slice * partials.n_score + o_s, tokens),
        b_acc,
        mask=m_s[:, None] & tokens.m_t[None, :],
    )


@triton.jit
def add_slices(partials, o_n, m_n, tokens, BN: tl.constexpr, BT: tl.constexpr):
    """The slices of `project`, added up: `(BN, BT)`."""
    b_sum = tl.zeros((BN, BT), tl.float32)
    # Several at a time: one slice a step would cost a round trip to the cache each.
    TOGETHER: tl.constexpr = 64 // BT
    for i_slice in range(0, partials.n_slices, TOGETHER):
        o_slice = i_slice + tl.arange(0, TOGETHER)
        m_slice = o_slice < partials.n_slices
        b_slices = tl.load(
            partials.pointer
            + (o_slice[:, None, None] * partials.n_score + o_n[None, :, None]) * tokens.n_tokens
            + tokens.o_t[None, None, :],
            mask=m_slice[:, None, None] & m_n[None, :, None] & tokens.m_t[None, None, :],
            other=0.0,
        )
        b_sum += tl.sum(b_slices, axis=0)
    return b_sum


@triton.jit
def match_fingerprints(
    partials, fingerprints, tokens, p_counters, n_project, i_match,
    S: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Largest cosine and its fingerprint among tile `i_match` of the fingerprints."""
    o_e = i_match * BE + tl.arange(0, BE)
    o_s = tl.arange(0, S)
    m_s = o_s < partials.n_score
    # Loaded before the wait, which they do not depend on.
    m_e = o_e < fingerprints.n
    b_fingerprints = tl.load(
        fingerprints.pointer + o_e[:, None] * partials.n_score + o_s[None, :],
        mask=m_e[:, None] & m_s[None, :],
        other=0.0,
    )
    m_enabled = tl.load(fingerprints.p_enabled + o_e, mask=m_e, other=0) != 0
    b_offset = tl.load(fingerprints.p_offset + o_s, mask=m_s, other=0.0).to(tl.float32)
    wait(p_counters, PROJECTED, n_project)
    b_q = add_slices(partials, o_s, m_s, tokens, S, BT)
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


@triton.jit
def match_norm(
    partials, p_lowered, tokens, p_counters, n_project, BS: tl.constexpr, BT: tl.constexpr
):
    """`‖A k‖` with -1 for the fingerprint; stores `A k` itself for `base`."""
    wait(p_counters, PROJECTED, n_project)
    b_squares = tl.zeros((BT,), tl.float32)
    for i_r in range(0, partials.n_score, BS):
        o_r = i_r + tl.arange(0, BS)
        m_r = o_r < partials.n_score
        b_lowered = add_slices(partials, o_r, m_r, tokens, BS, BT)
        b_squares += tl.sum(b_lowered * b_lowered, axis=0)
        tl.store(cells(p_lowered, o_r, tokens), b_lowered, mask=m_r[:, None] & tokens.m_t[None, :])
    return tl.sqrt(b_squares), tl.full((BT,), -1, tl.int32)


@triton.jit
def best_match(best, tokens, MATCHES: tl.constexpr):
    """Score and fingerprint of each token from the tiles of `match`."""
    o_match = tl.arange(0, MATCHES)
    m_match = (o_match < best.n_match)[:, None] & tokens.m_t[None, :]
    o_best = o_match[:, None] * tokens.n_tokens + tokens.o_t[None, :]
    b_best = tl.load(best.p_score + o_best, mask=m_match, other=-float("inf"))
    b_index = tl.load(best.p_index + o_best, mask=m_match, other=-1)
    b_score = tl.max(b_best, axis=0)
    # The lowest index among equal scores; NaN, which `max` may drop, is looked for separately.
    b_first = tl.where(b_best == b_score[None, :], b_index, 2147483647)
    b_nan = tl.max(tl.where(b_best != b_best, 1, 0), axis=0) > 0
    return tl.where(b_nan, float("nan"), b_score), tl.where(b_nan, -1, tl.min(b_first, axis=0))


@triton.jit
def read_gate(threshold, best, tokens, p_counters, MATCHES: tl.constexpr):
    """Score and fingerprint of each token, and whether its gate is open, once `match` is done."""
    wait(p_counters, MATCHED, best.n_match)
    b_score, b_index = best_match(best, tokens, MATCHES)
    # Rounded as torch rounds: a score right at the threshold must open the gate in both.
    b_z = tl.div_rn(b_score - tl.load(threshold.p_mean), tl.load(threshold.p_std))
    return b_score, b_index, tokens.m_t & (b_z >= tl.load(threshold.p_alpha))
