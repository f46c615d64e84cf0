"""The memory readout in three launches; the third again for every further block that is written.

    1. sketch   `F k` of every row, cut into slices along `d`
    2. match    blocks of rows × slabs of fingerprints: each program adds the slices of its rows;
                the last slab of a block to finish has the nearest fingerprint of all
    3. add      the row of its entry to each open token; a closed token costs two loads

No program waits for another, and the host never learns which tokens are open.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from coachhook_kernels.hook_linear.tiles import STORE, walk_tiles
from coachhook_kernels.hook_linear.tiles_gate import add_parts
from coachhook_kernels.hook_linear.tiles_match import (
    FINGERPRINT_TILE,
    SLAB_TILE,
    Best,
    Fingerprints,
    best_of_slabs,
    hand_in,
    nearest_fingerprint,
    slab_length,
)
from coachhook_kernels.launch import prepared
from coachhook_kernels.launch.runtime import multiprocessors
from coachhook_kernels.launch.sizes import cdiv, next_power_of_2
from coachhook_kernels.launch.tuning import Config, launchable, lookup
from coachhook_kernels.memory.gate import MemoryGate

COLUMNS = 1024
"""Columns that a program adds at a time."""


@triton.jit(do_not_specialize=["n_rows", "n_slices", "n_blocks"])
def sketch_kernel(
    p_keys, p_projection, p_parts, p_arrived,
    n_rows, n_score, d, stride_kt, stride_pn, stride_pk, n_slices, slice_length, n_blocks,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each slice's part of `F k`, to `(n_slices, n_rows, n_score)`. Also sets the counters of
    `match_kernel` to zero."""
    walk_tiles(
        p_keys, p_projection, p_parts, None,
        n_rows, n_rows, n_score, d, stride_kt, stride_pn, stride_pk, n_score,
        n_slices, slice_length, STORE, False, BM, BN, BK,
    )  # fmt: skip
    if tl.program_id(0) < n_blocks:
        tl.store(p_arrived + tl.program_id(0), 0)


@triton.jit
def unit_sketch(
    p_parts, p_offset, o_m, m_m, o_s, m_s, n_rows, n_slices, n_score,
    BM: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`F k - offset` at unit length, `(BM, S)`, and the rows where it is finite."""
    m_tile = m_m[:, None] & m_s[None, :]
    o_row = o_m.to(tl.int64)
    b_q = add_parts(p_parts, o_row, o_s, m_tile, n_rows, n_slices, n_score, BM, S, PARTS)
    b_q -= tl.load(p_offset + o_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
    b_norm = tl.sqrt(tl.sum(b_q * b_q, axis=1))
    m_finite = b_norm < float("inf")
    # Zeros in place of what is not finite, which would spread over the tile's other rows.
    b_unit = tl.where(m_finite[:, None], b_q / tl.maximum(b_norm, 1e-12)[:, None], 0.0)
    return b_unit, m_finite


@triton.jit(do_not_specialize=["n_rows", "n_fingerprints", "n_slices", "n_slabs", "slab"])
def match_kernel(
    p_parts, p_offset, p_fingerprints, p_enabled, p_owner, p_best, p_best_index, p_arrived,
    p_score, p_entry,
    n_rows, n_score, n_fingerprints, n_slices, n_slabs, slab,
    BM: tl.constexpr, S: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`BM` rows against a slab of fingerprints; the last slab of these rows stores score and entry.

    arrived: int32, a zero for each block of rows.
    """
    i_block = tl.program_id(0) // n_slabs
    i_slab = tl.program_id(0) % n_slabs
    o_m = i_block * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_row = o_m.to(tl.int64)
    o_s = tl.arange(0, S)
    m_s = o_s < n_score
    b_unit, m_finite = unit_sketch(
        p_parts, p_offset, o_m, m_m, o_s, m_s, n_rows, n_slices, n_score, BM, S, PARTS
    )
    begin = i_slab * slab
    end = min(begin + slab, n_fingerprints)
    fingerprints = Fingerprints(p_fingerprints, p_enabled, n_score, begin, end)
    b_score, b_index = nearest_fingerprint(tl.trans(b_unit), fingerprints, o_s, m_s, BM, BE)
    best = Best(p_best, p_best_index, n_slabs, n_rows)
    if hand_in(best, p_arrived + i_block, b_score, b_index, i_slab, o_row, m_m):
        b_score, b_index = best_of_slabs(best, o_row, m_m, BM, BL)
        m_found = m_m & m_finite & (b_index >= 0)
        b_entry = tl.load(p_owner + b_index, mask=m_found, other=-1)
        b_score = tl.where(m_finite, tl.maximum(b_score, -1.0), float("nan"))
        tl.store(p_score + o_m, b_score, mask=m_m)
        tl.store(p_entry + o_m, b_entry, mask=m_m)


@triton.jit
def add_kernel(
    p_output, p_score, p_entry, p_threshold, p_rows, d, stride_ot, stride_re, BD: tl.constexpr
):
    """`output[t] += rows[entry[t]]` of one token, if it is open."""
    i_t = tl.program_id(0).to(tl.int64)
    i_entry = tl.load(p_entry + i_t)
    if (tl.load(p_score + i_t) >= tl.load(p_threshold)) & (i_entry >= 0):
        p_token = p_output + i_t * stride_ot
        p_row = p_rows + i_entry * stride_re
        for i_d in range(0, d, BD):
            o_d = i_d + tl.arange(0, BD)
            m_d = o_d < d
            b_sum = tl.load(p_token + o_d, mask=m_d).to(tl.float32)
            # To the output's dtype first, as torch would.
            b_row = tl.load(p_row + o_d, mask=m_d).to(p_output.dtype.element_ty)
            b_sum += b_row.to(tl.float32)
            tl.store(p_token + o_d, b_sum.to(p_output.dtype.element_ty), mask=m_d)


@functools.cache
def sketch_config(few: bool, dtype: torch.dtype) -> Config:
    """Tiles of the sketch; few: up to 16 rows."""
    if dtype == torch.float32:
        return {"BM": 16 if few else 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
    tile = {"BM": 16, "BN": 32} if few else {"BM": 64, "BN": 64}
    return tile | {"BK": 128, "num_warps": 4, "num_stages": 4}


def match_rows(n_rows: int, dtype: torch.dtype) -> int:
    """Rows of one program: as many as the registers hold beside fingerprints of this dtype."""
    return 16 if n_rows <= 16 or dtype == torch.float32 else 64


# Slices that a program adds at a time, by its rows: as many as the registers hold.
PARTS = {16: 4, 64: 1}


def gate(keys: Tensor, gate: MemoryGate) -> tuple[Tensor, Tensor]:
    """`memory_gate` of keys `(t, d)`, t > 0, contiguous along `d`; all tensors of the gate but the
    projection are contiguous."""
    n_rows, device = keys.shape[0], keys.device
    n_fingerprints, n_score = gate.fingerprints.shape
    block = match_rows(n_rows, gate.fingerprints.dtype)
    n_blocks = cdiv(n_rows, block)
    arrived = torch.empty(n_blocks, dtype=torch.int32, device=device)
    parts = _sketch(keys, gate.projection, arrived)
    slab = slab_length(n_fingerprints, n_blocks, device)
    n_slabs = max(1, cdiv(n_fingerprints, slab))
    score = torch.empty(n_rows, dtype=torch.float32, device=device)
    entry = torch.empty(n_rows, dtype=torch.int64, device=device)
    prepared.launch(
        match_kernel,
        (n_blocks * n_slabs,),
        p_parts=parts,
        p_offset=gate.offset,
        p_fingerprints=gate.fingerprints,
        p_enabled=gate.enabled,
        p_owner=gate.owner,
        p_best=torch.empty(n_slabs, n_rows, dtype=torch.float32, device=device),
        p_best_index=torch.empty(n_slabs, n_rows, dtype=torch.int32, device=device),
        p_arrived=arrived,
        p_score=score,
        p_entry=entry,
        n_rows=n_rows,
        n_score=n_score,
        n_fingerprints=n_fingerprints,
        n_slices=parts.shape[0],
        n_slabs=n_slabs,
        slab=slab,
        BM=block,
        S=max(16, next_power_of_2(n_score)),
        BE=FINGERPRINT_TILE,
        BL=SLAB_TILE,
        PARTS=PARTS[block],
    )
    return score, entry


def _sketch(keys: Tensor, projection: Tensor, arrived: Tensor) -> Tensor:
    """The parts of `F k`, float32 `(slices, t, s)`; sets the counters `arrived` to zero."""
    (n_rows, d), n_score, device = keys.shape, projection.shape[0], keys.device
    kernel = f"memory_sketch_{8 * keys.element_size()}bit"
    config = lookup(kernel, device, sketch_config(n_rows <= 16, keys.dtype), d=d, rows=n_rows)
    n_tiles = cdiv(n_rows, config["BM"]) * cdiv(n_score, config["BN"])
    n_slices = min(cdiv(d, 2 * config["BK"]), max(1, 2 * multiprocessors(device) // n_tiles))
    parts = torch.empty(n_slices, n_rows, n_score, dtype=torch.float32, device=device)
    prepared.launch(
        sketch_kernel,
        (max(n_tiles * n_slices, len(arrived)),),
        p_keys=keys,
        p_projection=projection,
        p_parts=parts,
        p_arrived=arrived,
        n_rows=n_rows,
        n_score=n_score,
        d=d,
        stride_kt=keys.stride(0),
        stride_pn=projection.stride(0),
        stride_pk=projection.stride(1),
        n_slices=n_slices,
        slice_length=cdiv(cdiv(d, n_slices), config["BK"]) * config["BK"],
        n_blocks=len(arrived),
        **launchable(config),
    )
    return parts


def add(output: Tensor, score: Tensor, entry: Tensor, threshold: Tensor, rows: Tensor) -> None:
    """`memory_add_` to output `(t, d)`, t > 0; output and rows are contiguous along `d`."""
    n_rows, d = output.shape
    prepared.launch(
        add_kernel,
        (n_rows,),
        p_output=output,
        p_score=score,
        p_entry=entry,
        p_threshold=threshold,
        p_rows=rows,
        d=d,
        stride_ot=output.stride(0),
        stride_re=rows.stride(0),
        BD=min(COLUMNS, next_power_of_2(d)),
    )
