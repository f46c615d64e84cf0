"""Triton kernels of `key_covariance_`: tiles of the upper triangle alone, and the mirror."""

from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from coachhook_kernels.compilation.case import CompileCase
from coachhook_kernels.key_covariance.configs import (
    BLACKWELL,
    POINTER,
    SINGLE,
    SPAN,
    SQUARE,
    WIDE,
)
from coachhook_kernels.launch.runtime import interpreting
from coachhook_kernels.launch.sizes import cdiv
from coachhook_kernels.launch.triton_dot import dot
from coachhook_kernels.launch.tuning import Config, launchable

# The interpreter knows no assembly.
PREFETCH = tl.constexpr(not interpreting())

MIRROR_BLOCK = 64
MIRROR_GROUP = 8


@triton.jit
def _triangle(i_tile, n_blocks, GROUP: tl.constexpr):
    """Row and column (row <= column < n_blocks) of the `i_tile`-th block of the triangle.

    The order goes through GROUP rows at a time, down each column in turn, so that concurrent
    programs read few distinct columns of the keys and find them in the L2 cache.
    """
    first = 0
    rows = tl.minimum(n_blocks, GROUP)
    size = rows * n_blocks - rows * (rows - 1) // 2
    while i_tile >= size:
        i_tile -= size
        first += rows
        rows = tl.minimum(n_blocks - first, GROUP)
        size = rows * (n_blocks - first) - rows * (rows - 1) // 2
    corner = rows * (rows + 1) // 2
    if i_tile < corner:
        column = 0
        while i_tile > column:
            column += 1
            i_tile -= column
        row = i_tile
    else:
        row = (i_tile - corner) % rows
        column = rows + (i_tile - corner) // rows
    return first + row, first + column


@triton.jit
def _tile_origin(i_tile, d, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a tile; a square block holds `BLOCK_J / BLOCK_I` tiles."""
    TILES: tl.constexpr = BLOCK_J // BLOCK_I
    i_row, i_column = _triangle(i_tile // TILES, tl.cdiv(d, BLOCK_J), GROUP)
    return i_row * BLOCK_J + i_tile % TILES * BLOCK_I, i_column * BLOCK_J


@triton.jit
def _halves(b_acc):
    """Left and right half of the columns."""
    ROWS: tl.constexpr = b_acc.shape[0]
    COLUMNS: tl.constexpr = b_acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(b_acc, (ROWS, 2, COLUMNS)), (0, 2, 1)))


@triton.jit
def _whole(b_left, b_right):
    """The inverse of `_halves`."""
    ROWS: tl.constexpr = b_left.shape[0]
    COLUMNS: tl.constexpr = 2 * b_left.shape[1]
    return tl.reshape(tl.permute(tl.join(b_left, b_right), (0, 2, 1)), (ROWS, COLUMNS))


@triton.jit
def _undrained(b_acc, b_drained):
    """The two halves of the sum whose leading bits were drained."""
    b_left, b_right = _halves(b_acc)
    b_left += b_drained.to(tl.float32, bitcast=True)
    b_right += (b_drained << 16).to(tl.float32, bitcast=True)
    return b_left, b_right


@triton.jit
def _drain(b_acc, b_drained):
    """What is left of the accumulator without the leading 16 bits of its sum, and those bits.

    A tensor core cuts off at the size of its accumulator, so a long sum must not stay in it. A
    second accumulator does not fit beside it; half of one does, and loses nothing: drained, uint32
    of half as many columns, holds the upper 16 bits of a number on the left and below them those of
    one on the right. Read as a float32, it is within their last bits of the number on the left, so
    both differences are exact.
    """
    b_left, b_right = _undrained(b_acc, b_drained)
    b_high = b_left.to(tl.uint32, bitcast=True) & 0xFFFF0000
    b_drained = b_high | (b_right.to(tl.uint32, bitcast=True) >> 16)
    b_left -= b_drained.to(tl.float32, bitcast=True)
    b_right -= (b_drained << 16).to(tl.float32, bitcast=True)
    return _whole(b_left, b_right), b_drained


@triton.jit
def _sums(b_acc, b_drained, SPAN: tl.constexpr):
    """Left and right half of the columns of the whole sum."""
    if SPAN > 0:
        return _undrained(b_acc, b_drained)
    else:
        return _halves(b_acc)


@triton.jit
def _add_columns(moment, b_acc, i_i, i_j, d, MIRROR: tl.constexpr, DIAGONAL: tl.constexpr):
    o_i = i_i + tl.arange(0, b_acc.shape[0])
    o_j = i_j + tl.arange(0, b_acc.shape[1])
    # On and above the diagonal row <= column, so a column below d implies a row below d.
    m_ij = tl.broadcast_to((o_j < d)[None, :], b_acc.shape)
    if DIAGONAL:
        m_ij = m_ij & (o_i[:, None] <= o_j[None, :])
    p_ij = moment + o_i.to(tl.int64)[:, None] * d + o_j[None, :]
    b_sum = tl.load(p_ij, mask=m_ij, other=0.0) + b_acc
    tl.store(p_ij, b_sum, mask=m_ij)
    if MIRROR:
        p_ji = moment + o_j.to(tl.int64)[:, None] * d + o_i[None, :]
        tl.store(p_ji, tl.trans(b_sum), mask=tl.trans(m_ij))


@triton.jit
def _add_quarters(
    moment, b_left, b_right, i_i, i_j, d, MIRROR: tl.constexpr, DIAGONAL: tl.constexpr
):
    # A whole tile of sums and a whole tile of products do not fit into the registers together.
    b_0, b_1 = _halves(b_left)
    b_2, b_3 = _halves(b_right)
    QUARTER: tl.constexpr = b_0.shape[1]
    _add_columns(moment, b_0, i_i, i_j, d, MIRROR, DIAGONAL)
    _add_columns(moment, b_1, i_i, i_j + QUARTER, d, MIRROR, DIAGONAL)
    _add_columns(moment, b_2, i_i, i_j + 2 * QUARTER, d, MIRROR, DIAGONAL)
    _add_columns(moment, b_3, i_i, i_j + 3 * QUARTER, d, MIRROR, DIAGONAL)


@triton.jit
def _add_tile(moment, b_left, b_right, i_i, i_j, d, MIRROR: tl.constexpr):
    """Add a tile to `moment`, on and above the diagonal; with MIRROR, write its transpose too."""
    if i_i + b_left.shape[0] <= i_j:
        _add_quarters(moment, b_left, b_right, i_i, i_j, d, MIRROR, False)
    else:
        _add_quarters(moment, b_left, b_right, i_i, i_j, d, MIRROR, True)


@triton.jit
def _bring_to_l2(moment, i_i, i_j, d, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """Ask for a tile of the moment, sector by sector; nothing waits, no register holds it."""
    SECTOR: tl.constexpr = 8
    o_i = tl.minimum(i_i + tl.arange(0, BLOCK_I), d - 1)
    o_j = tl.minimum(i_j + tl.arange(0, BLOCK_J // SECTOR) * SECTOR, d - 1)
    p_sector = moment + o_i.to(tl.int64)[:, None] * d + o_j[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [p_sector],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def triangle_kernel(
    moment,
    keys,
    mask,
    n,
    d,
    stride_n,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    MIRROR: tl.constexpr,
):
    i_i, i_j = _tile_origin(tl.program_id(0), d, BLOCK_I, BLOCK_J, GROUP)
    o_i = i_i + tl.arange(0, BLOCK_I)
    o_j = i_j + tl.arange(0, BLOCK_J)
    o_n = tl.arange(0, BLOCK_N)
    p_i = keys + o_n.to(tl.int64)[:, None] * stride_n + o_i[None, :]
    p_j = keys + o_n.to(tl.int64)[:, None] * stride_n + o_j[None, :]

    m_i = (o_i < d)[None, :]
    m_j = (o_j < d)[None, :]
    b_acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    b_drained = tl.zeros((BLOCK_I, BLOCK_J // 2), tl.uint32)
    for i_n in range(0, n, BLOCK_N):
        m_n = i_n + o_n < n
        if mask is not None:
            # Neither operand reads a masked row, so its contents, even NaN, do not count.
            m_n = m_n & tl.load(mask + i_n + o_n, mask=m_n, other=0).to(tl.int1)
        b_i = tl.load(p_i, mask=m_n[:, None] & m_i, other=0.0)
        b_j = tl.load(p_j, mask=m_n[:, None] & m_j, other=0.0)
        b_acc = dot(tl.trans(b_i), b_j, b_acc)
        if SPAN > 0 and ((i_n + BLOCK_N) % SPAN == 0) & (i_n + BLOCK_N < n):
            b_acc, b_drained = _drain(b_acc, b_drained)
        p_i += BLOCK_N * stride_n.to(tl.int64)
        p_j += BLOCK_N * stride_n.to(tl.int64)
    b_left, b_right = _sums(b_acc, b_drained, SPAN)
    _add_tile(moment, b_left, b_right, i_i, i_j, d, MIRROR)


@triton.jit
def triangle_tma_kernel(
    moment,
    keys_i,
    keys_j,
    n,
    d,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    SPAN: tl.constexpr,
    MIRROR: tl.constexpr,
):
    """As `triangle_kernel`; keys_i, keys_j: descriptors of the same keys, zero past their ends."""
    i_i, i_j = _tile_origin(tl.program_id(0), d, BLOCK_I, BLOCK_J, GROUP)
    if PREFETCH:
        # The epilogue's reading then hides behind the products.
        _bring_to_l2(moment, i_i, i_j, d, BLOCK_I, BLOCK_J)
    b_acc = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    b_drained = tl.zeros((BLOCK_I, BLOCK_J // 2), tl.uint32)
    for i_n in range(0, n, BLOCK_N):
        b_i = keys_i.load([i_n, i_i])
        b_j = keys_j.load([i_n, i_j])
        b_acc = dot(tl.trans(b_i), b_j, b_acc)
        if SPAN > 0 and ((i_n + BLOCK_N) % SPAN == 0) & (i_n + BLOCK_N < n):
            b_acc, b_drained = _drain(b_acc, b_drained)
    b_left, b_right = _sums(b_acc, b_drained, SPAN)
    _add_tile(moment, b_left, b_right, i_i, i_j, d, MIRROR)


@triton.jit
def mirror_kernel(moment, d, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    i_row, i_column = _triangle(tl.program_id(0), tl.cdiv(d, BLOCK), GROUP)
    o_i = i_row * BLOCK + tl.arange(0, BLOCK)
    o_j = i_column * BLOCK + tl.arange(0, BLOCK)
    m_ij = (o_i[:, None] < o_j[None, :]) & (o_j < d)[None, :]
    b_ij = tl.load(moment + o_i.to(tl.int64)[:, None] * d + o_j[None, :], mask=m_ij)
    p_ji = moment + o_j.to(tl.int64)[:, None] * d + o_i[None, :]
    tl.store(p_ji, tl.trans(b_ij), mask=tl.trans(m_ij))


def _triangular(blocks: int) -> int:
    return blocks * (blocks + 1) // 2


def _span(dtype: torch.dtype) -> int:
    """0 where sums round to nearest and need no draining: float32 units and AMD's matrix cores."""
    return SPAN if dtype.itemsize == 2 and torch.version.hip is None else 0


def add_triangle(
    moment: Tensor, keys: Tensor, mask: Tensor | None, mirror: bool, config: Config
) -> None:
    """Launch a configuration with `triangle` set; arguments as `key_covariance_` validated them.

    Keys are contiguous along d; with `tma` there is no mask, and rows start at multiples of 16
    bytes.
    """
    n, d = keys.shape
    blocks = {name.upper(): config[name] for name in ("block_i", "block_j", "block_n", "group")}
    blocks["SPAN"] = _span(keys.dtype)
    options = {name: launchable(config)[name] for name in ("num_warps", "num_stages")}
    block_i, block_j, block_n = blocks["BLOCK_I"], blocks["BLOCK_J"], blocks["BLOCK_N"]
    grid = (_triangular(cdiv(d, block_j)) * (block_j // block_i),)
    if config["tma"]:
        left = TensorDescriptor.from_tensor(keys, [block_n, block_i])
        right = TensorDescriptor.from_tensor(keys, [block_n, block_j])
        triangle_tma_kernel[grid](moment, left, right, n, d, **blocks, MIRROR=mirror, **options)
        return
    rows = None if mask is None else mask.contiguous()
    triangle_kernel[grid](
        moment, keys, rows, n, d, keys.stride(0), **blocks, MIRROR=mirror, **options
    )


def mirror_upper(moment: Tensor) -> None:
    """Launch the copy of the upper triangle of `moment`, contiguous, onto the lower one."""
    d = moment.shape[0]
    grid = (_triangular(cdiv(d, MIRROR_BLOCK)),)
    mirror_kernel[grid](moment, d, BLOCK=MIRROR_BLOCK, GROUP=MIRROR_GROUP)


NVIDIA = ("sm_80", "sm_90", "sm_100")


def compile_cases() -> list[CompileCase]:
    """Every shipped configuration with MIRROR, whose code is larger; variants without it, and
    float16, for fewer GPUs."""
    cases = [
        CompileCase(
            "key_covariance/mirror fp32",
            mirror_kernel,
            {"moment": "*fp32:16", "d": "i32:16"},
            {"BLOCK": MIRROR_BLOCK, "GROUP": MIRROR_GROUP},
        )
    ]
    for config in (SQUARE, WIDE):
        cases.append(_tma_case("bf16", config, True, "sm_90"))
        cases.append(_tma_case("bf16", config, False, "sm_90"))
    cases.append(_tma_case("bf16", BLACKWELL, True, "sm_100"))
    for masked, mirror in product((False, True), repeat=2):
        seen = _pointer_case("bf16", POINTER, masked, mirror, SPAN, NVIDIA)
        cases.append(seen if mirror else seen.further())
        if mirror:
            cases.append(_pointer_case("bf16", POINTER, masked, mirror, 0, ("gfx942",)))
    cases.append(_tma_case("fp16", WIDE, True, "sm_90"))
    cases.append(_pointer_case("fp16", POINTER, True, True, SPAN, NVIDIA).further())
    return [*cases, _pointer_case("fp32", SINGLE, False, True, 0, (*NVIDIA, "gfx942"))]


def _constants(config: Config, span: int, mirror: bool) -> dict[str, Any]:
    blocks = {name.upper(): config[name] for name in ("block_i", "block_j", "block_n", "group")}
    return {**blocks, "SPAN": span, "MIRROR": mirror}


def _name(dtype: str, config: Config, *traits: str) -> str:
    tile = f"{config['block_i']}x{config['block_j']}x{config['block_n']}"
    return " ".join(["key_covariance/triangle", dtype, tile, *filter(None, traits)])


def _tma_case(dtype: str, config: Config, mirror: bool, target: str) -> CompileCase:
    i, j, n = config["block_i"], config["block_j"], config["block_n"]
    return CompileCase(
        _name(dtype, config, "tma", "mirror" * mirror),
        triangle_tma_kernel,
        {
            "moment": "*fp32:16",
            "keys_i": f"tensordesc<{dtype}[{n},{i}]>",
            "keys_j": f"tensordesc<{dtype}[{n},{j}]>",
            "n": "i32",
            "d": "i32:16",
        },
        _constants(config, SPAN, mirror),
        config["num_warps"],
        config["num_stages"],
        tensor_cores=True,
        wgmma=True,
        targets=(target,),
    )


def _pointer_case(
    dtype: str, config: Config, masked: bool, mirror: bool, span: int, targets: tuple[str, ...]
) -> CompileCase:
    arguments = {
        "moment": "*fp32:16",
        "keys": f"*{dtype}:16",
        "n": "i32",
        "d": "i32:16",
        "stride_n": "i32:16",
    }
    constants = _constants(config, span, mirror)
    if masked:
        arguments["mask"] = "*i1:16"
    else:
        constants["mask"] = None
    return CompileCase(
        _name(dtype, config, "masked" * masked, "mirror" * mirror, "undrained" * (span == 0)),
        triangle_kernel,
        arguments,
        constants,
        config["num_warps"],
        config["num_stages"],
        tensor_cores=dtype != "fp32",
        wgmma=dtype != "fp32",
        targets=targets,
    )
