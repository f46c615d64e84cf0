"""Shared by the roles of a decoding launch: their arguments, and how programs hand on results."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from coachhook_kernels.launch.counters import SET, TILE_COUNTERS

# Counters of a launch; those of `tiles_gate`, OPEN and FINISHED, stand before them. Behind them
# stand those of tiles of the base product, and of tiles of the projection.
PROJECTED, TICKET, MATCHED = (tl.constexpr(i) for i in range(2, 5))
BASE_TILES = tl.constexpr(SET - 2 * TILE_COUNTERS)
PROJECTION_TILES = tl.constexpr(SET - TILE_COUNTERS)


# Arguments that the host passes together.
class Matrix(NamedTuple):
    """`(n, k)` of any strides; absent where the pointer is None."""

    pointer: Any
    stride_n: Any
    stride_k: Any


class Keys(NamedTuple):
    """`(t, d_in)`, contiguous along `d_in`."""

    pointer: Any
    stride_t: Any
    d_in: Any


class Gate(NamedTuple):
    """Open where `(score - mean) / std >= alpha`. The keyed gate also has an offset `(s,)` and
    fingerprints `(e, s)` with `enabled` `(e,)`; None in the calibrated one, with size 0. `size` is
    `s`, which does not change with the edits, and may tell how wide the loads can be."""

    p_mean: Any
    p_std: Any
    p_alpha: Any
    p_offset: Any
    p_fingerprints: Any
    p_enabled: Any
    size: Any


class Output(NamedTuple):
    """The results of a launch: `(t, d_out)`, contiguous along `d_out`; score and index `(t,)`; and
    for a calibrated gate `A k`, `(t, rank)`."""

    pointer: Any
    stride_t: Any
    p_score: Any
    p_index: Any
    p_lowered: Any


class Scratch(NamedTuple):
    """What the programs of a launch hand to one another.

    p_floats: `n_partials` numbers, a tile for each program whose product is one of several slices;
    then `F k` `(n_score, t)` and the best cosine of each ticket `(n_tickets, t)`, or for a
    calibrated gate the sums of squares of each tile of `A k` `(tiles, t)`. p_ints: the list of open
    rows `(t,)`; then the fingerprint of each ticket's best cosine.
    """

    p_floats: Any
    p_ints: Any
    p_counters: Any


# Arguments that the kernel passes to its roles together; the tuples vanish in compilation.
class Tokens(NamedTuple):
    """The tile of `n` tokens: their indices `o_t`, and a mask `m_t` of those that there are."""

    o_t: Any
    m_t: Any
    n: Any


class Counts(NamedTuple):
    """Sizes that change with the edits."""

    n_score: Any
    n_fingerprints: Any
    n_tickets: Any
    n_partials: Any


@triton.jit
def arrive(p_counter, n_arriving):
    """The count before; what those who arrived earlier have stored is visible from here on."""
    # The barrier puts the stores of every thread before the one thread's release.
    tl.debug_barrier()
    return tl.atomic_add(p_counter, n_arriving, sem="acq_rel", scope="gpu")


@triton.jit
def cells(p_table, o_row, tokens):
    """Pointers to rows of a table `(rows, t)`."""
    return p_table + o_row[:, None] * tokens.n + tokens.o_t[None, :]
