"""The dense dual path in one launch, for rows of decoding size.

Every program keeps its tiles of `W k` and `Δ k` in registers, publishes the squares of its columns,
meets all other programs of the launch, works out the gate, and stores the tile that it chooses. So
all programs must be on the GPU at once: the launch is cooperative, and no larger than the GPU.
"""

import triton
import triton.language as tl

from coachhook_kernels.dual_path.finish import NOWHERE, difference_norms, real_tokens
from coachhook_kernels.dual_path.products import both_products, store, store_squares
from coachhook_kernels.launch.runtime import interpreting

# Of the counters of a launch.
CAME, LEFT = (tl.constexpr(i) for i in range(2))

# The interpreter runs one program after another: there nobody can wait for a later one.
WAITS = tl.constexpr(not interpreting())


@triton.jit
def meet(p_counters):
    """Return once every program of the launch is here; what they stored before can be read then."""
    # The barrier puts the stores of every thread before the one thread's release.
    tl.debug_barrier()
    n_programs = tl.num_programs(0)
    n_came = tl.atomic_add(p_counters + CAME, 1, sem="acq_rel", scope="gpu") + 1
    if WAITS:
        while n_came < n_programs:
            n_came = tl.atomic_add(p_counters + CAME, 0, sem="acquire", scope="gpu")


@triton.jit
def leave(p_counters):
    """The last to leave, when nobody polls any more, sets the counters to zero again."""
    n_programs = tl.num_programs(0)
    if tl.atomic_add(p_counters + LEFT, 1, sem="relaxed", scope="gpu") == n_programs - 1:
        tl.store(p_counters + CAME, 0)
        tl.store(p_counters + LEFT, 0)


@triton.jit
def sequence_z(b_norm, p_mask, o_t, m_t, length):
    """z-score of each token over the real tokens of its sequence, in two passes; NaN for others."""
    m_real = real_tokens(p_mask, o_t, m_t)
    i_sequence = o_t // length
    m_peer = (i_sequence[:, None] == i_sequence[None, :]) & m_real[None, :]
    b_real = tl.sum(m_peer.to(tl.float32), axis=1)
    b_sum = tl.sum(tl.where(m_peer, b_norm[None, :], 0.0), axis=1)
    b_mean = tl.div_rn(b_sum, tl.maximum(b_real, 1.0))
    b_centred = tl.where(m_peer, b_norm[None, :] - b_mean[:, None], 0.0)
    b_std = tl.sqrt_rn(tl.div_rn(tl.sum(b_centred * b_centred, axis=1), b_real - 1.0))
    return tl.where(m_real, tl.div_rn(b_norm - b_mean, b_std), float("nan"))


@triton.jit(do_not_specialize=["n_tokens", "length"])
def meeting_kernel(
    p_keys, p_weight, p_bias, p_delta, p_mask, p_mean, p_std, p_alpha,
    p_output, p_squares, p_score, p_z, p_index, p_counters,
    n_tokens, length, d_in, d_out, stride_kt, stride_wn, stride_wk, stride_dn, stride_dk,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """All tokens of a column tile. p_mean None: the gate of sequences of `length`, to which p_z
    belongs; else per token, with p_index."""
    i_n = tl.program_id(0)
    # Always 0: all tokens are in one tile.
    i_t = tl.program_id(1)
    b_output, b_delta_keys = both_products(
        p_keys, p_weight, p_delta, i_t, i_n, n_tokens, d_in, d_out,
        stride_kt, stride_wn, stride_wk, stride_dn, stride_dk, BT, BN, BK, True,
    )  # fmt: skip
    m_n = i_n * BN + tl.arange(0, BN) < d_out
    store_squares(p_squares, b_delta_keys, m_n, i_t, i_n, n_tokens, BT, True)
    meet(p_counters)
    o_t = tl.arange(0, BT)
    m_t = o_t < n_tokens
    b_norm = difference_norms(p_squares, o_t, m_t, n_tokens, tl.num_programs(0), BT, TILES)
    if p_mean is None:
        b_z = sequence_z(b_norm, p_mask, o_t, m_t, length)
    else:
        b_z = tl.div_rn(b_norm - tl.load(p_mean), tl.load(p_std))
    if i_n == 0:
        tl.store(p_score + o_t, b_norm, mask=m_t)
        if p_mean is None:
            tl.store(p_z + o_t, b_z, mask=m_t)
        else:
            tl.store(p_index + o_t, NOWHERE, mask=m_t)
    m_open = m_t & (b_z >= tl.load(p_alpha))
    b_output = tl.where(m_open[None, :], b_output + b_delta_keys, b_output)
    store(p_output, p_bias, b_output, i_t, i_n, n_tokens, d_out, BT, BN, True)
    leave(p_counters)
