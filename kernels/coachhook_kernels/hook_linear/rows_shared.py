"""Shared by the roles of `rows_kernel`: their arguments, and how they wait for each other."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from coachhook_kernels.launch.triton_dot import dot

PROJECTED, MATCHED, LOWERED, FINISHED = (tl.constexpr(i) for i in range(4))


# Arguments that the kernel passes to its roles together; the tuples vanish in compilation.
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


class Tokens(NamedTuple):
    """A tile of `n_tokens` tokens: their indices `o_t`, and a mask `m_t` of those to read."""

    o_t: Any
    m_t: Any
    n_tokens: Any


class Partials(NamedTuple):
    """The result of `project`: float32 `(n_slices, n_score, n_tokens)`."""

    pointer: Any
    n_slices: Any
    n_score: Any


class Fingerprints(NamedTuple):
    """The keyed gate's: offset `(n_score,)`, and `n` fingerprints of that length."""

    pointer: Any
    p_offset: Any
    p_enabled: Any
    n: Any


class Best(NamedTuple):
    """The result of `match`: best score and fingerprint of each tile, `(n_match, n_tokens)`."""

    p_score: Any
    p_index: Any
    n_match: Any


class Threshold(NamedTuple):
    """A gate is open where `(score - mean) / std >= alpha`."""

    p_mean: Any
    p_std: Any
    p_alpha: Any


class Delta(NamedTuple):
    """down `(rank, d_in)` with up, or down alone, the dense Δ. `p_lowered`: `A k`, float32
    `(rank, n_tokens)`, complete once `n_down` programs have signalled."""

    down: Any
    up: Any
    p_lowered: Any
    rank: Any
    n_down: Any


class Output(NamedTuple):
    """The results of a launch: `(t, d_out)`, contiguous along `d_out`; score and index `(t,)`."""

    pointer: Any
    stride_t: Any
    p_score: Any
    p_index: Any


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
def leave(p_counters):
    """The last program to finish resets the counters to zero for the next launch."""
    tl.debug_barrier()
    n_programs = tl.num_programs(0)
    if tl.atomic_add(p_counters + FINISHED, 1, sem="acq_rel", scope="gpu") == n_programs - 1:
        tl.store(p_counters + tl.arange(0, 4), tl.zeros((4,), tl.int32))


@triton.jit
def cells(p_table, o_row, tokens):
    """Pointers to rows of a table `(rows, n_tokens)`."""
    return p_table + o_row[:, None] * tokens.n_tokens + tokens.o_t[None, :]


@triton.jit
def stream(b_acc, matrix, keys, o_n, m_n, tokens, begin, LENGTH: tl.constexpr, BK: tl.constexpr):
    """`b_acc (BN, BT) + matrix[o_n, begin : begin + LENGTH] @ keys[o_t, same]ᵀ`; LENGTH 0: all."""
    end = keys.d_in
    if LENGTH > 0:
        end = begin + LENGTH
    for i_k in range(begin, end, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < keys.d_in
        b_matrix = tl.load(
            matrix.pointer
            + o_n.to(tl.int64)[:, None] * matrix.stride_n
            + o_k.to(tl.int64)[None, :] * matrix.stride_k,
            mask=m_n[:, None] & m_k[None, :],
            other=0.0,
        )
        b_keys = tl.load(
            keys.pointer + tokens.o_t.to(tl.int64)[None, :] * keys.stride_t + o_k[:, None],
            mask=tokens.m_t[None, :] & m_k[:, None],
            other=0.0,
        )
        b_acc = dot(b_matrix, b_keys, b_acc)
    return b_acc
