"""The gate of a decoding launch: fingerprints matched by the ticket, and what comes of it."""

import triton
import triton.language as tl

from coachhook_kernels.hook_linear.decode_shared import MATCHED, TICKET, arrive, cells
from coachhook_kernels.hook_linear.tiles_gate import list_open
from coachhook_kernels.launch.triton_dot import dot_wide

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def read_sketch(gate, scratch, tokens, counts, S: tl.constexpr):
    """`F k - offset` of unit length, `(S, BT)`, and which tokens it is finite for."""
    o_s = tl.arange(0, S)
    m_s = o_s < gate.size
    b_sketch = tl.load(
        cells(scratch.p_floats + counts.n_partials, o_s, tokens),
        mask=m_s[:, None] & tokens.m_t[None, :],
        other=0.0,
    )
    b_offset = tl.load(gate.p_offset + o_s, mask=m_s, other=0.0).to(tl.float32)
    b_sketch -= b_offset[:, None]
    b_norm = tl.sqrt(tl.sum(b_sketch * b_sketch, axis=0))
    return b_sketch / tl.maximum(b_norm, 1e-12)[None, :], b_norm < float("inf")


@triton.jit
def cosines(b_fingerprints, b_unit, BE: tl.constexpr, BT: tl.constexpr):
    """`fingerprints @ unit` in float32, `(BE, BT)`."""
    if BT == 1:
        return tl.sum(b_fingerprints.to(tl.float32) * tl.trans(b_unit), axis=1)[:, None]
    else:
        return dot_wide(b_fingerprints, b_unit, tl.zeros((BE, BT), tl.float32))


@triton.jit
def match_ticket(
    gate, scratch, tokens, counts, b_unit, m_finite, i_ticket,
    S: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Store the largest cosine among one ticket's fingerprints, and the first that has it: -2 and
    -1 where none is enabled, NaN and -1 for a sketch that is not finite."""
    length = tl.cdiv(tl.cdiv(counts.n_fingerprints, BE), counts.n_tickets) * BE
    begin = i_ticket * length
    o_s = tl.arange(0, S)
    m_s = o_s < gate.size
    b_score = tl.full((BT,), -2.0, tl.float32)
    b_index = tl.full((BT,), -1, tl.int32)
    end = min(begin + length, counts.n_fingerprints)
    # Stages are named, as Triton prefetches only products' operands of its own accord.
    for i_e in tl.range(begin, end, BE, num_stages=3):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < counts.n_fingerprints
        b_fingerprints = tl.load(
            gate.p_fingerprints + o_e.to(tl.int64)[:, None] * gate.size + o_s[None, :],
            mask=m_e[:, None] & m_s[None, :],
            other=0.0,
        )
        m_enabled = tl.load(gate.p_enabled + o_e, mask=m_e, other=0) != 0
        b_cosine = cosines(b_fingerprints, b_unit, BE, BT)
        b_cosine = tl.where(m_enabled[:, None], b_cosine, -2.0)
        b_best = tl.max(b_cosine, axis=0)
        b_first = tl.min(tl.where(b_cosine == b_best[None, :], o_e[:, None], NOWHERE), axis=0)
        # Strictly above, to keep the first among equals.
        m_better = b_best > b_score
        b_score = tl.where(m_better, b_best, b_score)
        b_index = tl.where(m_better, b_first, b_index)
    b_score = tl.where(m_finite, b_score, float("nan"))
    o_best = i_ticket * tokens.n + tokens.o_t
    p_best = scratch.p_floats + counts.n_partials + counts.n_score * tokens.n
    tl.store(p_best + o_best, b_score, mask=tokens.m_t)
    tl.store(scratch.p_ints + tokens.n + o_best, b_index, mask=tokens.m_t)


@triton.jit
def best_of_tickets(scratch, tokens, counts, BT: tl.constexpr):
    """Score and fingerprint of each token: -1 and -1 where none is enabled."""
    # Many at a time: one ticket a step would cost a round trip to the cache each.
    TOGETHER: tl.constexpr = 512 // BT
    p_best = scratch.p_floats + counts.n_partials + counts.n_score * tokens.n
    b_score = tl.full((BT,), -2.0, tl.float32)
    b_index = tl.full((BT,), -1, tl.int32)
    b_nan = tl.zeros((BT,), tl.int32)
    for i_ticket in range(0, counts.n_tickets, TOGETHER):
        o_ticket = i_ticket + tl.arange(0, TOGETHER)
        m_cell = (o_ticket < counts.n_tickets)[:, None] & tokens.m_t[None, :]
        b_scores = tl.load(cells(p_best, o_ticket, tokens), mask=m_cell, other=-2.0)
        b_indices = tl.load(cells(scratch.p_ints + tokens.n, o_ticket, tokens), mask=m_cell)
        # `max` may drop a NaN.
        b_nan |= tl.max((b_scores != b_scores).to(tl.int32), axis=0)
        b_best = tl.max(b_scores, axis=0)
        b_first = tl.min(tl.where(b_scores == b_best[None, :], b_indices, NOWHERE), axis=0)
        m_better = b_best > b_score
        b_score = tl.where(m_better, b_best, b_score)
        b_index = tl.where(m_better, b_first, b_index)
    b_score = tl.where(b_nan > 0, float("nan"), tl.maximum(b_score, -1.0))
    return b_score, tl.where(b_nan > 0, -1, b_index)


@triton.jit
def norm_of_tiles(scratch, tokens, counts, n_tiles, BT: tl.constexpr):
    """`‖A k‖`, which is `‖Δ k‖`, from the sums of squares of the tiles of `A k`."""
    TOGETHER: tl.constexpr = 1024 // BT
    b_squares = tl.zeros((BT,), tl.float32)
    for i_tile in range(0, n_tiles, TOGETHER):
        o_tile = i_tile + tl.arange(0, TOGETHER)
        b_tiles = tl.load(
            cells(scratch.p_floats + counts.n_partials, o_tile, tokens),
            mask=(o_tile < n_tiles)[:, None] & tokens.m_t[None, :],
            other=0.0,
        )
        b_squares += tl.sum(b_tiles, axis=0)
    return tl.sqrt(b_squares)


@triton.jit
def decide(gate, output, scratch, tokens, b_score, b_index):
    """Store score and fingerprint of each token, and list those whose gate is open."""
    tl.store(output.p_score + tokens.o_t, b_score, mask=tokens.m_t)
    tl.store(output.p_index + tokens.o_t, b_index.to(tl.int64), mask=tokens.m_t)
    # Rounded as torch rounds: a score right at the threshold must open the gate in both.
    b_z = tl.div_rn(b_score - tl.load(gate.p_mean), tl.load(gate.p_std))
    m_open = tokens.m_t & (b_z >= tl.load(gate.p_alpha))
    list_open(scratch.p_ints, scratch.p_counters, tokens.o_t, m_open)


@triton.jit
def hand_in(gate, output, scratch, tokens, counts, n_done, BT: tl.constexpr):
    """Count the tickets that this program has matched; with the last of all, decide."""
    if arrive(scratch.p_counters + MATCHED, n_done) + n_done == counts.n_tickets:
        b_score, b_index = best_of_tickets(scratch, tokens, counts, BT)
        decide(gate, output, scratch, tokens, b_score, b_index)


@triton.jit
def take(scratch):
    """The number of a ticket that no other program takes."""
    return tl.atomic_add(scratch.p_counters + TICKET, 1, sem="relaxed", scope="gpu")


@triton.jit
def match_while_there_are_tickets(
    gate, output, scratch, tokens, counts, S: tl.constexpr, BE: tl.constexpr, BT: tl.constexpr
):
    """Once `F k` is whole: tickets, until all are taken, by whichever programs have nothing else to
    do. A ticket is matched by the one that took it, so nobody waits."""
    i_ticket = take(scratch)
    if i_ticket < counts.n_tickets:
        b_unit, m_finite = read_sketch(gate, scratch, tokens, counts, S)
        n_done = 0
        while i_ticket < counts.n_tickets:
            match_ticket(gate, scratch, tokens, counts, b_unit, m_finite, i_ticket, S, BE, BT)
            n_done += 1
            i_ticket = take(scratch)
        hand_in(gate, output, scratch, tokens, counts, n_done, BT)
