"""The first launch of `hook_linear` and `hook_correction_` for few rows (decoding): base product,
score and gate. No program waits for another.

Programs of the same kind: those of lower ids compute tiles of the gate's projection (`F k`, or
`A k` for a calibrated gate on factors), the others tiles of `W_fc k`, each one slice of `d_in`.
Whoever comes last to a tile adds up its slices. Whoever comes last to the projection has the norm,
or opens the match: its work is divided into tickets, which are taken by this program and by every
other that finds the match open when it is done with its tile. Whoever comes last to the match
decides, and lists the open rows for the second launch, which corrects them. The argument:
csrc_notes/hook-linear.md.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from coachhook_kernels.hook_linear.decode_match import (
    decide,
    hand_in,
    match_ticket,
    match_while_there_are_tickets,
    norm_of_tiles,
    read_sketch,
)
from coachhook_kernels.hook_linear.decode_product import product_tile
from coachhook_kernels.hook_linear.decode_shared import (
    BASE_TILES,
    PROJECTED,
    PROJECTION_TILES,
    Counts,
    Tokens,
    arrive,
    cells,
)


@triton.jit
def project(
    projection, keys, output, scratch, tokens, counts, n_tiles,
    KEYED: tl.constexpr, SLICES: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of `F k`, or of `A k` and its squares; whether the projection is now whole."""
    i_tile = tl.program_id(0) // SLICES
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < counts.n_score
    b_tile, is_whole = product_tile(
        projection, keys, tokens, o_n, m_n, scratch,
        scratch.p_counters + PROJECTION_TILES + i_tile, tl.program_id(0) % SLICES,
        SLICES, BN, BT, BK,
    )  # fmt: skip
    is_complete = tl.program_id(0) < 0
    if is_whole:
        p_result = scratch.p_floats + counts.n_partials
        m_tile = m_n[:, None] & tokens.m_t[None, :]
        if KEYED:
            tl.store(cells(p_result, o_n, tokens), b_tile, mask=m_tile)
        else:
            p_lowered = output.p_lowered + tokens.o_t[None, :] * counts.n_score + o_n[:, None]
            tl.store(p_lowered, b_tile.to(output.p_lowered.dtype.element_ty), mask=m_tile)
            # Rows beyond the last are zeros times the keys, which need not be finite.
            b_squares = tl.sum(tl.where(m_n[:, None], b_tile * b_tile, 0.0), axis=0)
            tl.store(p_result + i_tile * tokens.n + tokens.o_t, b_squares, mask=tokens.m_t)
        is_complete = arrive(scratch.p_counters + PROJECTED, 1) == n_tiles - 1
    return is_complete


@triton.jit
def base(
    weight, p_bias, keys, output, scratch, tokens, d_out, i_program,
    SLICES: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of `W_fc k + b`."""
    i_tile = i_program // SLICES
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < d_out
    b_tile, is_whole = product_tile(
        weight, keys, tokens, o_n, m_n, scratch,
        scratch.p_counters + BASE_TILES + i_tile, i_program % SLICES,
        SLICES, BN, BT, BK,
    )  # fmt: skip
    if is_whole:
        if p_bias is not None:
            b_tile += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[:, None]
        tl.store(
            output.pointer + tokens.o_t.to(tl.int64)[None, :] * output.stride_t + o_n[:, None],
            b_tile.to(output.pointer.dtype.element_ty),
            mask=m_n[:, None] & tokens.m_t[None, :],
        )


# Counts that change with the batch or with every edit; specialising on them would recompile each
# time. Triton heeds this for plain arguments only, not for members of a tuple.
COUNTS = ["n_tokens", "n_score", "n_fingerprints", "n_tickets", "n_partials"]


@triton.jit(do_not_specialize=COUNTS)
def decode_kernel(
    keys, weight, p_bias, projection, gate, output, scratch, d_out,
    n_tokens, n_score, n_fingerprints, n_tickets, n_partials,
    BASE: tl.constexpr, KEYED: tl.constexpr, SLICES: tl.constexpr, PROJECT_SLICES: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Without base programs, several tickets are left to `match_kernel`. EARLY: whether the next
    launch may begin, and wait, once all programs of this one have."""
    if EARLY:
        gdc_launch_dependents()
    i_program = tl.program_id(0)
    o_t = tl.arange(0, BT)
    tokens = Tokens(o_t, o_t < n_tokens, n_tokens)
    counts = Counts(n_score, n_fingerprints, n_tickets, n_partials)
    n_tiles = tl.cdiv(n_score, BN)
    n_project = n_tiles * PROJECT_SLICES
    is_ready = i_program < 0
    if i_program < n_project:
        is_ready = project(
            projection, keys, output, scratch, tokens, counts, n_tiles,
            KEYED, PROJECT_SLICES, BN, BT, BK,
        )  # fmt: skip
    elif BASE:
        base(
            weight, p_bias, keys, output, scratch, tokens, d_out, i_program - n_project,
            SLICES, BN, BT, BK,
        )  # fmt: skip
        if KEYED:
            is_ready = arrive(scratch.p_counters + PROJECTED, 0) == n_tiles
    if is_ready:
        if KEYED:
            # Not compiled in: edits made while serving change it.
            if BASE or n_tickets == 1:
                match_while_there_are_tickets(gate, output, scratch, tokens, counts, S, BE, BT)
        else:
            b_norm = norm_of_tiles(scratch, tokens, counts, n_tiles, BT)
            decide(gate, output, scratch, tokens, b_norm, tl.full((BT,), -1, tl.int32))


@triton.jit(do_not_specialize=COUNTS)
def match_kernel(
    gate, output, scratch,
    n_tokens, n_score, n_fingerprints, n_tickets, n_partials,
    BT: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """The match of a launch without base tiles, whose programs would have left before it opens: one
    ticket a program."""
    o_t = tl.arange(0, BT)
    tokens = Tokens(o_t, o_t < n_tokens, n_tokens)
    counts = Counts(n_score, n_fingerprints, n_tickets, n_partials)
    b_unit, m_finite = read_sketch(gate, scratch, tokens, counts, S)
    match_ticket(gate, scratch, tokens, counts, b_unit, m_finite, tl.program_id(0), S, BE, BT)
    hand_in(gate, output, scratch, tokens, counts, 1, BT)
