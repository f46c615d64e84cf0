"""The gate and the correction for many rows (prefill), beside a base product of any engine.

    1. score     `F k` or `A k` for every row: a tall, thin product, split along `d_in`
    2. gate      the slices added up, nearest fingerprint or norm, and the list of open rows
    3. correct   `Δ k`, or `U (A k)`, of the listed rows alone, added to the output

No intermediate is `rows × d_out` in size. The host never learns how many rows are open: a grid of
fixed size walks over as many tiles as the list fills.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from coachhook_kernels.delta import Delta
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear.tiles_gate import (
    FINISHED,
    OF_A_SERIES,
    OPEN,
    Decisions,
    Parts,
    read_norm,
)
from coachhook_kernels.hook_linear.tiles_match import match
from coachhook_kernels.launch import prepared
from coachhook_kernels.launch.counters import counters
from coachhook_kernels.launch.runtime import launches_overlap, multiprocessors
from coachhook_kernels.launch.sizes import cdiv
from coachhook_kernels.launch.triton_dot import dot
from coachhook_kernels.launch.tuning import Config, launchable, lookup

STORE, ADD, SQUARES = (tl.constexpr(i) for i in range(3))


@triton.jit
def walk_tiles(
    p_left, p_right, p_output, p_rows,
    n_rows, n_present, n_columns, length, stride_lm, stride_rn, stride_rk, stride_om,
    n_slices, slice_length,
    EPILOGUE: tl.constexpr, LISTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute this program's share of the tiles of `left @ rightᵀ`."""
    n_tiles_n = tl.cdiv(n_columns, BN)
    n_tiles = tl.cdiv(n_present, BM) * n_tiles_n * n_slices
    for i_tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        i_slice = i_tile % n_slices
        i_n = i_tile // n_slices % n_tiles_n
        i_m = i_tile // n_slices // n_tiles_n
        o_m = i_m * BM + tl.arange(0, BM)
        m_m = o_m < n_present
        o_row = o_m
        if LISTED:
            o_row = tl.load(p_rows + o_m, mask=m_m, other=0)
        o_row = o_row.to(tl.int64)
        o_n = i_n * BN + tl.arange(0, BN)
        m_n = o_n < n_columns
        b_acc = tl.zeros((BM, BN), tl.float32)
        for i_k in range(i_slice * slice_length, min((i_slice + 1) * slice_length, length), BK):
            o_k = i_k + tl.arange(0, BK)
            m_k = o_k < length
            b_left = tl.load(
                p_left + o_row[:, None] * stride_lm + o_k[None, :],
                mask=m_m[:, None] & m_k[None, :],
                other=0.0,
            )
            b_right = tl.load(
                p_right
                + o_n.to(tl.int64)[None, :] * stride_rn
                + o_k.to(tl.int64)[:, None] * stride_rk,
                mask=m_n[None, :] & m_k[:, None],
                other=0.0,
            )
            b_acc = dot(b_left, b_right, b_acc)
        if EPILOGUE == SQUARES:
            p_squares = p_output + i_n.to(tl.int64) * n_rows + o_row
            # Columns beyond the last hold zeros times the keys, which need not be finite.
            b_acc = tl.where(m_n[None, :], b_acc, 0.0)
            tl.store(p_squares, tl.sum(b_acc * b_acc, axis=1), mask=m_m)
        else:
            p_tile = p_output + (i_slice * n_rows + o_row)[:, None] * stride_om + o_n[None, :]
            m_tile = m_m[:, None] & m_n[None, :]
            if EPILOGUE == ADD:
                b_acc += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
            tl.store(p_tile, b_acc.to(p_output.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["n_rows", "n_slices"])
def tiles_kernel(
    p_left, p_right, p_output,
    n_rows, n_columns, length, stride_lm, stride_rn, stride_rk, stride_om,
    n_slices, slice_length,
    EPILOGUE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`left (n_rows, length) @ right (n_columns, length)ᵀ` in float32.

    Epilogues: STORE each slice's part of it to `(slices, n_rows, n_columns)`; or the sums of
    SQUARES of each row of a tile, to `(column tiles, n_rows)`.
    """
    walk_tiles(
        p_left, p_right, p_output, None,
        n_rows, n_rows, n_columns, length, stride_lm, stride_rn, stride_rk, stride_om,
        n_slices, slice_length, EPILOGUE, False, BM, BN, BK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def open_rows_kernel(
    p_left, p_right, p_output, p_rows, p_counters,
    n_rows, n_columns, length, stride_lm, stride_rn, stride_rk, stride_om,
    EPILOGUE: tl.constexpr, FEW: tl.constexpr, FEW_BM: tl.constexpr, FEW_BN: tl.constexpr,
    FEW_BK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """STORE or ADD the rows of `left @ rightᵀ` that are in the list.

    With few open rows, as usual, reading `right` is the bottleneck, and many narrow tiles are best;
    with many, square tiles are. The length of the list decides. EARLY: launched while the kernel
    that fills the list still runs, to wait for its end here.
    """
    if EARLY:
        gdc_wait()
    n_open = tl.load(p_counters + OPEN)
    if n_open <= FEW:
        walk_tiles(
            p_left, p_right, p_output, p_rows,
            n_rows, n_open, n_columns, length, stride_lm, stride_rn, stride_rk, stride_om,
            1, length, EPILOGUE, True, FEW_BM, FEW_BN, FEW_BK,
        )  # fmt: skip
    else:
        walk_tiles(
            p_left, p_right, p_output, p_rows,
            n_rows, n_open, n_columns, length, stride_lm, stride_rn, stride_rk, stride_om,
            1, length, EPILOGUE, True, BM, BN, BK,
        )  # fmt: skip
    if EPILOGUE == ADD:
        # The last to finish leaves the counters of the series at zero for the next.
        tl.debug_barrier()
        if tl.atomic_add(p_counters + FINISHED, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(p_counters + tl.arange(0, OF_A_SERIES), 0)


@functools.cache
def score_config(dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
    return {"BM": 64, "BN": 64, "BK": 128, "num_warps": 4, "num_stages": 4}


@functools.cache
def correct_config(dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        few = {"FEW": 64, "FEW_BM": 32, "FEW_BN": 32, "FEW_BK": 32}
        return few | {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
    few = {"FEW": 256, "FEW_BM": 64, "FEW_BN": 32, "FEW_BK": 128}
    return few | {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 4}


@functools.cache
def squares_config(dtype: torch.dtype) -> Config:
    if dtype == torch.float32:
        return {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
    return {"BM": 128, "BN": 256, "BK": 64, "num_warps": 8, "num_stages": 4}


def multiply(
    left: Tensor,
    right: Tensor,
    output: Tensor,
    epilogue: tl.constexpr,
    config: Config,
    n_slices: int = 1,
) -> None:
    """One launch of `tiles_kernel`: left `(t, length)`, right `(n, length)`."""
    n_rows, length = left.shape
    n_columns = right.shape[0]
    n_tiles = cdiv(n_rows, config["BM"]) * cdiv(n_columns, config["BN"])
    prepared.launch(
        tiles_kernel,
        (n_tiles * n_slices,),
        p_left=left,
        p_right=right,
        p_output=output,
        n_rows=n_rows,
        n_columns=n_columns,
        length=length,
        stride_lm=left.stride(0),
        stride_rn=right.stride(0),
        stride_rk=right.stride(1),
        stride_om=output.stride(-2),
        n_slices=n_slices,
        slice_length=cdiv(cdiv(length, n_slices), config["BK"]) * config["BK"],
        EPILOGUE=epilogue,
        **launchable(config),
    )


def multiply_open(
    left: Tensor,
    right: Tensor,
    output: Tensor,
    epilogue: tl.constexpr,
    config: Config,
    rows: Tensor,
    counts: Tensor,
) -> None:
    """One launch of `open_rows_kernel`, of a size that does not depend on how many are open."""
    n_rows, length = left.shape
    n_columns = right.shape[0]
    early = launches_overlap(left.device)
    n_tiles = cdiv(n_rows, config["FEW_BM"]) * cdiv(n_columns, config["FEW_BN"])
    prepared.launch(
        open_rows_kernel,
        (min(n_tiles, multiprocessors(left.device)),),
        p_left=left,
        p_right=right,
        p_output=output,
        p_rows=rows,
        p_counters=counts,
        n_rows=n_rows,
        n_columns=n_columns,
        length=length,
        stride_lm=left.stride(0),
        stride_rn=right.stride(0),
        stride_rk=right.stride(1),
        stride_om=output.stride(-2),
        EPILOGUE=epilogue,
        EARLY=early,
        **({"launch_pdl": True} if early else {}),
        **launchable(config),
    )


def _score_parts(
    keys: Tensor, delta: Delta, gate: TokenGate, config: Callable[..., Config]
) -> Parts:
    (n_rows, d_in), device = keys.shape, keys.device
    if not gate.keyed and delta.up is None:
        squaring = config("squares", squares_config(keys.dtype))
        rank = delta.down.shape[0]
        n_parts = cdiv(rank, squaring["BN"])
        squares = torch.empty(n_parts, n_rows, dtype=torch.float32, device=device)
        multiply(keys, delta.down, squares, SQUARES, squaring)
        return Parts(squares, rank, summed=True)
    scoring = config("score", score_config(keys.dtype))
    projection = delta.down if gate.projection is None else gate.projection
    n_score = projection.shape[0]
    n_tiles = cdiv(n_rows, scoring["BM"]) * cdiv(n_score, scoring["BN"])
    # Enough slices for two programs on each multiprocessor, each of at least four steps.
    most = cdiv(d_in, 4 * scoring["BK"])
    n_slices = min(most, max(1, 2 * multiprocessors(device) // n_tiles))
    slices = torch.empty(n_slices, n_rows, n_score, dtype=torch.float32, device=device)
    multiply(keys, projection, slices, STORE, scoring, n_slices)
    return Parts(slices, n_score, summed=False)


def launch(keys: Tensor, delta: Delta, gate: TokenGate, output: Tensor) -> tuple[Tensor, Tensor]:
    """Add the correction of keys `(t, d_in)`, t ≥ 1, to output `(t, d_out)`. Returns score and
    index."""
    (n_rows, d_in), device = keys.shape, keys.device
    bits = 8 * keys.element_size()
    kind = "keyed" if gate.keyed else "calibrated"

    def config(step: str, default: Config) -> Config:
        kernel = f"hook_linear_{step}_{bits}bit"
        sizes = {"d_in": d_in, "d_out": output.shape[1], "rows": n_rows}
        return lookup(kernel, device, default, gate=kind, **sizes)

    rank = 0 if delta.up is None else delta.down.shape[0]
    lowered = torch.empty(n_rows, rank, dtype=keys.dtype, device=device)
    score, index, rows, counts = decisions = Decisions.empty(n_rows, counters(device))
    parts = _score_parts(keys, delta, gate, config)
    if gate.keyed:
        match(parts, gate, decisions)
    else:
        read_norm(parts, gate, lowered, decisions)
    correcting = config("correct", correct_config(keys.dtype))
    if delta.up is None:
        multiply_open(keys, delta.down, output, ADD, correcting, rows, counts)
    else:
        if gate.keyed:
            multiply_open(keys, delta.down, lowered, STORE, correcting, rows, counts)
        multiply_open(lowered, delta.up, output, ADD, correcting, rows, counts)
    return score, index
