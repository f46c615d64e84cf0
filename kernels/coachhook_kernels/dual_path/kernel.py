"""Launchers of the dual path: products in one pass, then one finish that gates and swaps; or, for
rows of decoding size and a dense Δ, all of it in one launch.

Keys are `(t, d_in)` with t > 0, in the dtype of weight and Δ: float32, float16 or bfloat16. weight
and Δ may have any strides (`nn.Linear` and `Conv1D`).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels.delta import Delta
from coachhook_kernels.dual_path import configs
from coachhook_kernels.dual_path.compile_cases import compile_cases
from coachhook_kernels.dual_path.finish import finish_sequences_kernel, finish_tokens_kernel
from coachhook_kernels.dual_path.meeting import meeting_kernel
from coachhook_kernels.dual_path.products import (
    dense_kernel,
    factored_kernel,
    row_squares_kernel,
)
from coachhook_kernels.launch import prepared
from coachhook_kernels.launch.counters import counters
from coachhook_kernels.launch.runtime import interpreting
from coachhook_kernels.launch.sizes import cdiv
from coachhook_kernels.launch.tuning import Config, launchable

__all__ = [
    "Products",
    "compile_cases",
    "composed_products",
    "dense_products",
    "dual_path_calibrated",
    "factored_products",
    "finish_sequences",
    "linear_sequence",
    "one_launch",
]


class Products(NamedTuple):
    """Input of the finish. output `(t, d_out)`: `W k + b`, swapped in place. delta_keys: `Δ k`
    `(t, d_out)`, or `A k` `(t, r)`. squares float32 `(tiles, t)`: they add up to `‖Δ k‖²`."""

    output: Tensor
    delta_keys: Tensor
    squares: Tensor


FAR = 2**21
"""From this stride on, the 32-bit offsets within a tile of 512 by 512 would not do."""


def _within_reach(matrix: Tensor) -> Tensor:
    """The matrix itself, of whatever strides, unless its elements are too far apart."""
    return matrix if max(matrix.stride()) < FAR else matrix.contiguous()


def _unit_stride(keys: Tensor) -> Tensor:
    return _within_reach(keys) if keys.stride(-1) == 1 else keys.contiguous()


def dense_products(keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor) -> Products:
    """Both paths of a dense Δ `(d_out, d_in)` in one pass over `W` and `Δ`."""
    keys, bias = _unit_stride(keys), None if bias is None else bias.contiguous()
    weight, delta = _within_reach(weight), _within_reach(delta)
    (n_tokens, d_in), d_out = keys.shape, weight.shape[0]
    config = launchable(configs.product_config(keys, weight, delta, factored=False))
    n_columns = cdiv(d_out, config["BN"])
    output = keys.new_empty(n_tokens, d_out)
    delta_keys = keys.new_empty(n_tokens, d_out)
    squares = keys.new_empty(n_columns, n_tokens, dtype=torch.float32)
    prepared.launch(
        dense_kernel,
        (cdiv(n_tokens, config["BT"]) * n_columns,),
        p_keys=keys,
        p_weight=weight,
        p_bias=bias,
        p_delta=delta,
        p_output=output,
        p_delta_keys=delta_keys,
        p_squares=squares,
        n_tokens=n_tokens,
        d_in=d_in,
        d_out=d_out,
        stride_kt=keys.stride(0),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_dn=delta.stride(0),
        stride_dk=delta.stride(1),
        GROUP=configs.GROUP,
        FEW_ROWS=config["BT"] == configs.FEW,
        **config,
    )
    return Products(output, delta_keys, squares)


def factored_products(keys: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor) -> Products:
    """The base path and `A k` (float32), down `A` `(r, d_in)`: r more columns of one product."""
    keys, bias = _unit_stride(keys), None if bias is None else bias.contiguous()
    weight, down = _within_reach(weight), _within_reach(down)
    (n_tokens, d_in), d_out, rank = keys.shape, weight.shape[0], down.shape[0]
    config = launchable(configs.product_config(keys, weight, down, factored=True))
    n_columns = cdiv(d_out, config["BN"])
    n_extra = cdiv(rank, config["BN"])
    output = keys.new_empty(n_tokens, d_out)
    projected = keys.new_empty(n_tokens, rank, dtype=torch.float32)
    squares = keys.new_empty(n_extra, n_tokens, dtype=torch.float32)
    prepared.launch(
        factored_kernel,
        (cdiv(n_tokens, config["BT"]) * (n_columns + n_extra),),
        p_keys=keys,
        p_weight=weight,
        p_bias=bias,
        p_down=down,
        p_output=output,
        p_projected=projected,
        p_squares=squares,
        n_tokens=n_tokens,
        d_in=d_in,
        d_out=d_out,
        rank=rank,
        stride_kt=keys.stride(0),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_an=down.stride(0),
        stride_ak=down.stride(1),
        GROUP=configs.GROUP,
        FEW_ROWS=config["BT"] == configs.FEW,
        **config,
    )
    return Products(output, projected, squares)


def composed_products(keys: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor) -> Products:
    """The same products from torch's own `linear`; down is `A`, or a dense Δ."""
    output, delta_keys = linear(keys, weight, bias), linear(keys, down)
    n_tokens, n_columns = delta_keys.shape
    squares = keys.new_empty(1, n_tokens, dtype=torch.float32)
    prepared.launch(
        row_squares_kernel,
        (n_tokens,),
        p_rows=delta_keys,
        p_squares=squares,
        n_columns=n_columns,
        BN=configs.ROW_BLOCK,
    )
    return Products(output, delta_keys, squares)


def finish_sequences(
    products: Products, up: Tensor | None, mask: Tensor | None, alpha: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """Swap by the z-score over the real tokens of each sequence of `length`; one launch.

    mask bool `(b, length)`, contiguous, or None: all are real. alpha 0-d float32. Returns score
    and z, float32 `(b, length)`: as `sequence_zscore`, NaN for padding and for a lone token.
    """
    output, delta_keys, squares = products
    n_tokens, d_out = output.shape
    batch = n_tokens // length
    score = squares.new_empty(batch, length)
    z = squares.new_empty(batch, length)
    BL, BT = configs.finish_block(length), configs.swap_block(length)
    n_blocks = cdiv(length, BT)
    slab = configs.slab_columns(output, batch * n_blocks)
    prepared.launch(
        finish_sequences_kernel,
        (batch, n_blocks, cdiv(d_out, slab)),
        p_squares=squares,
        p_mask=mask,
        p_alpha=alpha,
        p_output=output,
        p_delta_keys=delta_keys,
        p_up=up,
        p_score=score,
        p_z=z,
        n_tokens=n_tokens,
        length=length,
        d_out=d_out,
        rank=delta_keys.shape[1],
        n_tiles=squares.shape[0],
        slab=slab,
        stride_un=0 if up is None else up.stride(0),
        stride_ur=0 if up is None else up.stride(1),
        BL=BL,
        TILES=configs.FINISH_BLOCK // BL,
        BT=BT,
        BLOCK_TILES=configs.FINISH_BLOCK // BT,
        BN=configs.finish_columns(output.dtype),
        BR=configs.FINISH_RANKS,
        num_warps=configs.FINISH_WARPS,
    )
    return score, z


class Scalars(NamedTuple):
    """The gate's, 0-d float32. mean and std None: those of each sequence."""

    mean: Tensor | None
    std: Tensor | None
    alpha: Tensor


class Gated(NamedTuple):
    """output `(t, d_out)`; score float32 `(t,)`; and of the gate of sequences z, float32 `(t,)`, of
    a gate per token the nearest fingerprint, int64 `(t,)`: -1, there is none."""

    output: Tensor
    score: Tensor
    z: Tensor | None
    nearest: Tensor | None


def one_launch(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    scalars: Scalars,
    mask: Tensor | None,
    length: int,
    config: Config,
) -> Gated:
    """Base path, dense Δ, gate and choice for the few keys `(t, d_in)` that config takes.

    mask bool `(t,)`, contiguous, or None: all are real. length: tokens of a sequence.
    """
    keys, bias = _unit_stride(keys), None if bias is None else bias.contiguous()
    weight, delta = _within_reach(weight), _within_reach(delta)
    (n_tokens, d_in), d_out = keys.shape, weight.shape[0]
    n_columns = cdiv(d_out, config["BN"])
    output = keys.new_empty(n_tokens, d_out)
    squares = keys.new_empty(n_columns, n_tokens, dtype=torch.float32)
    score = squares.new_empty(n_tokens)
    z = torch.empty_like(score) if scalars.mean is None else None
    nearest = None if scalars.mean is None else torch.empty_like(score, dtype=torch.int64)
    shared = counters(keys.device)
    # The interpreter runs one program after another, and none waits: the gates of its second run
    # read the squares of the first.
    for _ in range(2 if interpreting() else 1):
        prepared.launch(
            meeting_kernel,
            (n_columns,),
            p_keys=keys,
            p_weight=weight,
            p_bias=bias,
            p_delta=delta,
            p_mask=mask,
            p_mean=scalars.mean,
            p_std=scalars.std,
            p_alpha=scalars.alpha,
            p_output=output,
            p_squares=squares,
            p_score=score,
            p_z=z,
            p_index=nearest,
            p_counters=shared,
            n_tokens=n_tokens,
            length=length,
            d_in=d_in,
            d_out=d_out,
            stride_kt=keys.stride(0),
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            stride_dn=delta.stride(0),
            stride_dk=delta.stride(1),
            TILES=configs.FINISH_BLOCK // config["BT"],
            launch_cooperative_grid=True,
            **launchable(config),
        )
    return Gated(output, score, z, nearest)


def linear_sequence(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    mask: Tensor | None,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hook_linear_sequence` of keys `(b, l, d_in)`: output, score and z."""
    batch, length, d_in = keys.shape
    rows = keys.reshape(-1, d_in)
    d_out = weight.shape[0]
    mask = None if mask is None else mask.contiguous()
    config = configs.meeting_config(rows, d_out) if delta.up is None else None
    if config is not None:
        scalars = Scalars(None, None, alpha)
        output, score, z, _ = one_launch(
            rows, weight, bias, delta.down, scalars, mask, length, config
        )
        assert z is not None
        return output.view(batch, length, d_out), score.view(batch, length), z.view(batch, length)
    if configs.composed(rows, d_out):
        products = composed_products(rows, weight, bias, delta.down)
    elif delta.up is None:
        products = dense_products(rows, weight, bias, delta.down)
    else:
        products = factored_products(rows, weight, bias, delta.down)
    score, z = finish_sequences(products, delta.up, mask, alpha, length)
    return products.output.view(batch, length, d_out), score, z


def dual_path_calibrated(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Tensor,
    mean: Tensor,
    std: Tensor,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`hook_linear` with the calibrated gate on a dense Δ; mean, std, alpha 0-d float32.

    One launch for rows of decoding size, else two. Returns the output `(t, d_out)`, the score
    `‖Δ k‖`, float32 `(t,)`, and the nearest fingerprint, int64 `(t,)`: -1, there is none.
    """
    config = configs.meeting_config(keys, weight.shape[0])
    if config is not None:
        scalars = Scalars(mean, std, alpha)
        output, score, _, index = one_launch(keys, weight, bias, delta, scalars, None, 1, config)
        assert index is not None
        return output, score, index
    by = composed_products if configs.composed(keys, weight.shape[0]) else dense_products
    products = by(keys, weight, bias, delta)
    output, delta_keys, squares = products
    n_tokens, d_out = output.shape
    score = squares.new_empty(n_tokens)
    index = torch.empty_like(score, dtype=torch.int64)
    BT = configs.swap_block(n_tokens)
    n_blocks = cdiv(n_tokens, BT)
    slab = configs.slab_columns(output, n_blocks)
    prepared.launch(
        finish_tokens_kernel,
        (n_blocks, cdiv(d_out, slab)),
        p_squares=squares,
        p_mean=mean,
        p_std=std,
        p_alpha=alpha,
        p_output=output,
        p_delta_keys=delta_keys,
        p_score=score,
        p_index=index,
        n_tokens=n_tokens,
        d_out=d_out,
        n_tiles=squares.shape[0],
        slab=slab,
        BT=BT,
        BLOCK_TILES=configs.FINISH_BLOCK // BT,
        BN=configs.finish_columns(output.dtype),
        num_warps=configs.FINISH_WARPS,
    )
    return output, score, index
