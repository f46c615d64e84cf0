"""One tile of a product with the keys, by as many programs as there are slices of `d_in`."""

import triton
import triton.language as tl

from coachhook_kernels.hook_linear.decode_shared import arrive
from coachhook_kernels.launch.triton_dot import dot


@triton.jit
def stream_token(matrix, keys, o_n, m_n, begin, end, BN: tl.constexpr, BK: tl.constexpr):
    """`matrix[o_n, begin:end] @ keys[0, begin:end]`, `(BN, 1)`, without the matrix units, which
    would compute fifteen columns of zeros beside it."""
    b_acc = tl.zeros((BN, BK), tl.float32)
    p_rows = matrix.pointer + o_n.to(tl.int64)[:, None] * matrix.stride_n
    for i_k in range(begin, end, BK):
        o_k = i_k + tl.arange(0, BK)
        m_k = o_k < keys.d_in
        b_keys = tl.load(keys.pointer + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_matrix = tl.load(
            p_rows + o_k.to(tl.int64)[None, :] * matrix.stride_k,
            mask=m_n[:, None] & m_k[None, :],
            other=0.0,
        )
        b_acc += b_matrix.to(tl.float32) * b_keys[None, :]
    return tl.sum(b_acc, axis=1)[:, None]


@triton.jit
def stream_tokens(
    matrix, keys, tokens, o_n, m_n, begin, end,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`matrix[o_n, begin:end] @ keys[o_t, begin:end]ᵀ`, `(BN, BT)`."""
    b_acc = tl.zeros((BN, BT), tl.float32)
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


@triton.jit
def product_tile(
    matrix, keys, tokens, o_n, m_n, scratch, p_counter, i_slice,
    SLICES: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`matrix[o_n] @ keysᵀ`, `(BN, BT)`, and whether it is whole: so it is for one program of those
    that compute its slices, the last to finish."""
    length = tl.cdiv(tl.cdiv(keys.d_in, BK), SLICES) * BK
    begin = i_slice * length
    end = min(begin + length, keys.d_in)
    if BT == 1:
        b_acc = stream_token(matrix, keys, o_n, m_n, begin, end, BN, BK)
    else:
        b_acc = stream_tokens(matrix, keys, tokens, o_n, m_n, begin, end, BN, BT, BK)
    if SLICES == 1:
        return b_acc, True
    else:
        p_first = scratch.p_floats + (tl.program_id(0) - i_slice).to(tl.int64) * BN * BT
        o_tile = tl.arange(0, BN)[:, None] * BT + tokens.o_t[None, :]
        tl.store(p_first + i_slice * BN * BT + o_tile, b_acc)
        is_whole = arrive(p_counter, 1) == SLICES - 1
        if is_whole:
            tl.store(p_counter, 0)
            # In the order of the slices, whoever came last: a score must not change from run to
            # run.
            b_acc = tl.load(p_first + o_tile)
            for i in tl.static_range(1, SLICES):
                b_acc += tl.load(p_first + i * BN * BT + o_tile)
        return b_acc, is_whole
