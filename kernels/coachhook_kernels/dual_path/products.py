"""Kernels of the products: keys against `W`, and against the dense Δ or its factor `A`.

For each column tile a kernel writes the sum of squares of its part of `Δ k` or `A k`, taken from
the fp32 accumulator. The finish adds the tiles up in a fixed order, so that no gate depends on
which program came first.

With few rows (FEW_ROWS) the time goes into reading the weights: there the weight rows take the M
side of the dot and the keys its N side.
"""

import triton
import triton.language as tl

from coachhook_kernels.launch.triton_dot import dot


@triton.jit
def row_and_column(i_tile, n_rows, n_columns, GROUP: tl.constexpr):
    """Row and column of a tile. Rows change fastest, in groups of GROUP that share a weight tile in
    L2."""
    i_group = i_tile // (GROUP * n_columns)
    i_first = i_group * GROUP
    n_group = min(n_rows - i_first, GROUP)
    i_inner = i_tile % (GROUP * n_columns)
    return i_first + i_inner % n_group, i_inner // n_group


@triton.jit
def zeros(BT: tl.constexpr, BN: tl.constexpr, FEW_ROWS: tl.constexpr):
    if FEW_ROWS:
        return tl.zeros((BN, BT), tl.float32)
    else:
        return tl.zeros((BT, BN), tl.float32)


@triton.jit
def pointers(
    p_matrix, i_first, stride_row, stride_k,
    ROWS: tl.constexpr, BK: tl.constexpr, INNER_FIRST: tl.constexpr,
):  # fmt: skip
    """Pointers to `matrix[i_first : i_first + ROWS, : BK]`; with INNER_FIRST transposed, for the
    right side of a dot. Offsets within a tile fit 32 bits, which take half the registers."""
    p_matrix += i_first.to(tl.int64) * stride_row
    o_row = tl.arange(0, ROWS)
    o_k = tl.arange(0, BK)
    if INNER_FIRST:
        return p_matrix + (o_row[None, :] * stride_row + o_k[:, None] * stride_k)
    else:
        return p_matrix + (o_row[:, None] * stride_row + o_k[None, :] * stride_k)


@triton.jit
def load(p_tile, m_row, m_k, INNER_FIRST: tl.constexpr):
    if INNER_FIRST:
        return tl.load(p_tile, mask=m_row[None, :] & m_k[:, None], other=0.0)
    else:
        return tl.load(p_tile, mask=m_row[:, None] & m_k[None, :], other=0.0)


@triton.jit
def multiply(b_keys, b_matrix, b_acc, FEW_ROWS: tl.constexpr):
    if FEW_ROWS:
        return dot(b_matrix, b_keys, b_acc)
    else:
        return dot(b_keys, b_matrix, b_acc)


@triton.jit
def product(
    p_keys, p_matrix, i_t, i_n, n_tokens, n_out, d_in, stride_kt, stride_n, stride_k,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """Tile `(i_t, i_n)` of `keys @ matrixᵀ`: `(BT, BN)`, or `(BN, BT)` for few rows."""
    o_k = tl.arange(0, BK)
    m_t = i_t * BT + tl.arange(0, BT) < n_tokens
    m_n = i_n * BN + tl.arange(0, BN) < n_out
    p_keys = pointers(p_keys, i_t * BT, stride_kt, 1, BT, BK, FEW_ROWS)
    p_matrix = pointers(p_matrix, i_n * BN, stride_n, stride_k, BN, BK, not FEW_ROWS)
    b_acc = zeros(BT, BN, FEW_ROWS)
    for i_k in range(0, d_in, BK):
        m_k = o_k < d_in - i_k
        b_keys = load(p_keys, m_t, m_k, FEW_ROWS)
        b_acc = multiply(b_keys, load(p_matrix, m_n, m_k, not FEW_ROWS), b_acc, FEW_ROWS)
        p_keys += BK
        p_matrix += BK * stride_k
    return b_acc


@triton.jit
def store(
    p_output, p_bias, b_acc, i_t, i_n, n_tokens, n_out,
    BT: tl.constexpr, BN: tl.constexpr, FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """Write a tile of a product, plus the bias if there is one, to an output of `n_out` columns."""
    b_output = tl.trans(b_acc) if FEW_ROWS else b_acc
    o_n = i_n * BN + tl.arange(0, BN)
    m_t = i_t * BT + tl.arange(0, BT) < n_tokens
    if p_bias is not None:
        b_output += tl.load(p_bias + o_n, mask=o_n < n_out, other=0.0).to(tl.float32)[None, :]
    p_tile = p_output + (i_t * BT).to(tl.int64) * n_out + i_n * BN
    p_tile += tl.arange(0, BT)[:, None] * n_out + tl.arange(0, BN)[None, :]
    m_tile = m_t[:, None] & (o_n < n_out)[None, :]
    tl.store(p_tile, b_output.to(p_output.dtype.element_ty), mask=m_tile)


@triton.jit
def store_squares(
    p_squares, b_acc, m_n, i_t, i_n, n_tokens, BT: tl.constexpr, FEW_ROWS: tl.constexpr
):  # fmt: skip
    # Columns beyond the last hold zeros times the keys, which need not be finite.
    b_acc = tl.where(m_n[:, None] if FEW_ROWS else m_n[None, :], b_acc, 0.0)
    b_squares = tl.sum(b_acc * b_acc, axis=0 if FEW_ROWS else 1)
    o_t = i_t * BT + tl.arange(0, BT)
    tl.store(p_squares + i_n.to(tl.int64) * n_tokens + o_t, b_squares, mask=o_t < n_tokens)


@triton.jit
def both_products(
    p_keys, p_weight, p_delta, i_t, i_n, n_tokens, d_in, d_out,
    stride_kt, stride_wn, stride_wk, stride_dn, stride_dk,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """Tile `(i_t, i_n)` of `W k` and of `Δ k`: two accumulators over one tile of keys."""
    o_k = tl.arange(0, BK)
    m_t = i_t * BT + tl.arange(0, BT) < n_tokens
    m_n = i_n * BN + tl.arange(0, BN) < d_out
    p_keys = pointers(p_keys, i_t * BT, stride_kt, 1, BT, BK, FEW_ROWS)
    p_weight = pointers(p_weight, i_n * BN, stride_wn, stride_wk, BN, BK, not FEW_ROWS)
    p_delta = pointers(p_delta, i_n * BN, stride_dn, stride_dk, BN, BK, not FEW_ROWS)
    b_output = zeros(BT, BN, FEW_ROWS)
    b_delta_keys = zeros(BT, BN, FEW_ROWS)
    for i_k in range(0, d_in, BK):
        m_k = o_k < d_in - i_k
        b_keys = load(p_keys, m_t, m_k, FEW_ROWS)
        b_weight = load(p_weight, m_n, m_k, not FEW_ROWS)
        b_delta = load(p_delta, m_n, m_k, not FEW_ROWS)
        b_output = multiply(b_keys, b_weight, b_output, FEW_ROWS)
        b_delta_keys = multiply(b_keys, b_delta, b_delta_keys, FEW_ROWS)
        p_keys += BK
        p_weight += BK * stride_wk
        p_delta += BK * stride_dk
    return b_output, b_delta_keys


@triton.jit(do_not_specialize=["n_tokens"])
def dense_kernel(
    p_keys, p_weight, p_bias, p_delta, p_output, p_delta_keys, p_squares,
    n_tokens, d_in, d_out, stride_kt, stride_wn, stride_wk, stride_dn, stride_dk,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of `W k + b`, of `Δ k` and of its squares."""
    n_rows = tl.cdiv(n_tokens, BT)
    i_t, i_n = row_and_column(tl.program_id(0), n_rows, tl.cdiv(d_out, BN), GROUP)
    b_output, b_delta_keys = both_products(
        p_keys, p_weight, p_delta, i_t, i_n, n_tokens, d_in, d_out,
        stride_kt, stride_wn, stride_wk, stride_dn, stride_dk, BT, BN, BK, FEW_ROWS,
    )  # fmt: skip
    m_n = i_n * BN + tl.arange(0, BN) < d_out
    store(p_output, p_bias, b_output, i_t, i_n, n_tokens, d_out, BT, BN, FEW_ROWS)
    store(p_delta_keys, None, b_delta_keys, i_t, i_n, n_tokens, d_out, BT, BN, FEW_ROWS)
    store_squares(p_squares, b_delta_keys, m_n, i_t, i_n, n_tokens, BT, FEW_ROWS)


@triton.jit(do_not_specialize=["n_tokens"])
def factored_kernel(
    p_keys, p_weight, p_bias, p_down, p_output, p_projected, p_squares,
    n_tokens, d_in, d_out, rank, stride_kt, stride_wn, stride_wk, stride_an, stride_ak,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    FEW_ROWS: tl.constexpr,
):  # fmt: skip
    """A tile of `W k + b`; in programs past the last of those, a tile of `A k` and its squares."""
    n_base = tl.cdiv(d_out, BN)
    n_columns = n_base + tl.cdiv(rank, BN)
    i_t, i_column = row_and_column(tl.program_id(0), tl.cdiv(n_tokens, BT), n_columns, GROUP)
    if i_column < n_base:
        b_output = product(
            p_keys, p_weight, i_t, i_column, n_tokens, d_out, d_in, stride_kt, stride_wn, stride_wk,
            BT, BN, BK, FEW_ROWS,
        )  # fmt: skip
        store(p_output, p_bias, b_output, i_t, i_column, n_tokens, d_out, BT, BN, FEW_ROWS)
    else:
        i_n = i_column - n_base
        b_projected = product(
            p_keys, p_down, i_t, i_n, n_tokens, rank, d_in, stride_kt, stride_an, stride_ak,
            BT, BN, BK, FEW_ROWS,
        )  # fmt: skip
        store(p_projected, None, b_projected, i_t, i_n, n_tokens, rank, BT, BN, FEW_ROWS)
        m_n = i_n * BN + tl.arange(0, BN) < rank
        store_squares(p_squares, b_projected, m_n, i_t, i_n, n_tokens, BT, FEW_ROWS)


@triton.jit
def row_squares_kernel(p_rows, p_squares, n_columns, BN: tl.constexpr):
    """Sum of squares of one row of a product that another library computed."""
    i_t = tl.program_id(0)
    p_rows += i_t.to(tl.int64) * n_columns
    b_squares = tl.zeros((BN,), tl.float32)
    for i_n in range(0, n_columns, BN):
        o_n = i_n + tl.arange(0, BN)
        b_row = tl.load(p_rows + o_n, mask=o_n < n_columns, other=0.0).to(tl.float32)
        b_squares += b_row * b_row
    tl.store(p_squares + i_t, tl.sum(b_squares, axis=0))
