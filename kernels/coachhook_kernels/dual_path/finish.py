"""Kernels of the gate: partial squares to norms, norms to z-scores, and the swap of open tokens.

Every program works out the gate of its own tokens: reading the statistics of a sequence again, a
few kilobytes in L2, is cheaper than waiting for another program. The correction of a token is read
only where its gate is open.
"""

import triton
import triton.language as tl

from coachhook_kernels.launch.triton_dot import dot

# The fingerprint that a token is nearest to, under a gate that has none.
NOWHERE = tl.constexpr(-1)


@triton.jit
def difference_norms(
    p_squares, o_t, m_t, n_tokens, n_tiles, BT: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Norms of `Δ k` from the partial squares of the column tiles, in one order for all."""
    b_squares = tl.zeros((BT,), tl.float32)
    for i_tile in range(0, n_tiles, TILES):
        o_tile = i_tile + tl.arange(0, TILES)
        p_tile = p_squares + o_tile.to(tl.int64)[:, None] * n_tokens + o_t[None, :]
        m_tile = (o_tile < n_tiles)[:, None] & m_t[None, :]
        b_squares += tl.sum(tl.load(p_tile, mask=m_tile, other=0.0), axis=0)
    return tl.sqrt_rn(b_squares)


@triton.jit
def swap(
    p_output, p_delta_keys, p_up, o_t, m_open, i_slab, slab, d_out, rank, stride_un, stride_ur,
    BT: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Add `Δ k` to a slab of the output of open tokens. With factors p_delta_keys holds `A k`."""
    o_wide_t = o_t.to(tl.int64)[:, None]
    for i_n in range(i_slab * slab, min(i_slab * slab + slab, d_out), BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < d_out
        m_tile = m_open[:, None] & m_n[None, :]
        o_tile = o_wide_t * d_out + o_n[None, :]
        if p_up is not None:
            b_delta_keys = tl.zeros((BT, BN), tl.float32)
            for i_r in range(0, rank, BR):
                o_r = i_r + tl.arange(0, BR)
                m_r = o_r < rank
                b_projected = tl.load(
                    p_delta_keys + o_wide_t * rank + o_r[None, :],
                    mask=m_open[:, None] & m_r[None, :],
                    other=0.0,
                )
                b_up = tl.load(
                    p_up
                    + o_n.to(tl.int64)[:, None] * stride_un
                    + o_r.to(tl.int64)[None, :] * stride_ur,
                    mask=m_n[:, None] & m_r[None, :],
                    other=0.0,
                )
                b_delta_keys = dot(b_projected.to(b_up.dtype), tl.trans(b_up), b_delta_keys)
        else:
            b_delta_keys = tl.load(p_delta_keys + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        b_output = tl.load(p_output + o_tile, mask=m_tile, other=0.0).to(tl.float32) + b_delta_keys
        tl.store(p_output + o_tile, b_output.to(p_output.dtype.element_ty), mask=m_tile)


@triton.jit
def real_tokens(p_mask, o_t, m_t):
    if p_mask is None:
        return m_t
    else:
        return m_t & (tl.load(p_mask + o_t, mask=m_t, other=0) != 0)


@triton.jit(do_not_specialize=["n_tokens", "length", "n_tiles"])
def finish_sequences_kernel(
    p_squares, p_mask, p_alpha, p_output, p_delta_keys, p_up, p_score, p_z,
    n_tokens, length, d_out, rank, n_tiles, slab, stride_un, stride_ur,
    BL: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BLOCK_TILES: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Statistics of one sequence, then the swap in one slab of one block of its tokens."""
    i_first = tl.program_id(0).to(tl.int64) * length
    i_slab = tl.program_id(2)
    n_real = 0.0
    mean = 0.0
    # Sum of squared deviations: in two passes within a block, then merged block by block.
    deviations = 0.0
    for i_l in range(0, length, BL):
        o_l = i_l + tl.arange(0, BL)
        m_l = o_l < length
        b_norm = difference_norms(p_squares, i_first + o_l, m_l, n_tokens, n_tiles, BL, TILES)
        m_real = real_tokens(p_mask, i_first + o_l, m_l)
        n_block = tl.sum(m_real.to(tl.float32), axis=0)
        mean_block = tl.div_rn(
            tl.sum(tl.where(m_real, b_norm, 0.0), axis=0), tl.maximum(n_block, 1.0)
        )
        b_centred = tl.where(m_real, b_norm - mean_block, 0.0)
        share = tl.div_rn(n_block, tl.maximum(n_real + n_block, 1.0))
        shift = mean_block - mean
        deviations += tl.sum(b_centred * b_centred, axis=0) + shift * shift * n_real * share
        mean += shift * share
        n_real += n_block
    std = tl.sqrt_rn(tl.div_rn(deviations, n_real - 1.0))
    o_l = tl.program_id(1) * BT + tl.arange(0, BT)
    m_l = o_l < length
    o_t = i_first + o_l
    b_norm = difference_norms(p_squares, o_t, m_l, n_tokens, n_tiles, BT, BLOCK_TILES)
    b_z = tl.where(real_tokens(p_mask, o_t, m_l), tl.div_rn(b_norm - mean, std), float("nan"))
    if i_slab == 0:
        tl.store(p_score + o_t, b_norm, mask=m_l)
        tl.store(p_z + o_t, b_z, mask=m_l)
    m_open = m_l & (b_z >= tl.load(p_alpha))
    if tl.max(m_open.to(tl.int32), axis=0) > 0:
        swap(
            p_output, p_delta_keys, p_up, o_t, m_open, i_slab, slab, d_out, rank,
            stride_un, stride_ur, BT, BN, BR,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tokens", "n_tiles"])
def finish_tokens_kernel(
    p_squares, p_mean, p_std, p_alpha, p_output, p_delta_keys, p_score, p_index,
    n_tokens, d_out, n_tiles, slab,
    BT: tl.constexpr, BLOCK_TILES: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The swap in one slab of one block of tokens, under a gate that reads each token by itself."""
    i_slab = tl.program_id(1)
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < n_tokens
    b_score = difference_norms(p_squares, o_t, m_t, n_tokens, n_tiles, BT, BLOCK_TILES)
    b_z = tl.div_rn(b_score - tl.load(p_mean), tl.load(p_std))
    if i_slab == 0:
        tl.store(p_score + o_t, b_score, mask=m_t)
        tl.store(p_index + o_t, NOWHERE, mask=m_t)
    m_open = m_t & (b_z >= tl.load(p_alpha))
    if tl.max(m_open.to(tl.int32), axis=0) > 0:
        swap(
            p_output, p_delta_keys, None, o_t, m_open, i_slab, slab, d_out, 0, 0, 0, BT, BN, BN
        )  # fmt: skip
