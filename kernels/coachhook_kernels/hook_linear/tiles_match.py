"""The keyed gate of many rows: their sketches, and the nearest fingerprint of each.

    1. sketch   slices of `F k` added up, once for all, and scaled to unit length
    2. match    blocks of rows × slabs of fingerprints; the last slab of a block to finish decides

No program waits for another, and no program walks over more than its slab.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear.tiles_gate import (
    ADDED_PARTS,
    ADDED_ROWS,
    Decided,
    Decisions,
    Parts,
    Threshold,
    add_parts,
    decide,
)
from coachhook_kernels.launch import prepared
from coachhook_kernels.launch.runtime import multiprocessors
from coachhook_kernels.launch.sizes import cdiv, next_power_of_2
from coachhook_kernels.launch.triton_dot import dot_wide

FINGERPRINT_TILE = 64

SLAB_TILE = 64
"""Slabs whose best a program compares at once."""


# Arguments that the kernel passes on together; the tuples vanish in compilation.
class Fingerprints(NamedTuple):
    """`(n, n_score)`, contiguous; a program reads those from `begin` to before `end`."""

    pointer: Any
    p_enabled: Any
    n_score: Any
    begin: Any
    end: Any


class Best(NamedTuple):
    """Largest cosine and its fingerprint for each slab and row, `(n_slabs, n_rows)`."""

    p_score: Any
    p_index: Any
    n_slabs: Any
    n_rows: Any


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def sketch_kernel(
    p_parts, p_offset, p_units, p_arrived, n_rows, n_score, n_parts,
    BM: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`F k - offset` of `BM` rows at unit length, float32 `(n_rows, n_score)`: NaN throughout where
    it is not finite. Also sets a counter of `match_kernel` to zero."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_row = o_m.to(tl.int64)
    o_s = tl.arange(0, S)
    m_s = o_s < n_score
    m_tile = (o_m < n_rows)[:, None] & m_s[None, :]
    b_q = add_parts(p_parts, o_row, o_s, m_tile, n_rows, n_parts, n_score, BM, S, PARTS)
    b_q -= tl.load(p_offset + o_s, mask=m_s, other=0.0).to(tl.float32)[None, :]
    b_norm = tl.sqrt(tl.sum(b_q * b_q, axis=1))
    b_unit = b_q / tl.maximum(b_norm, 1e-12)[:, None]
    b_unit = tl.where((b_norm < float("inf"))[:, None], b_unit, float("nan"))
    tl.store(p_units + o_row[:, None] * n_score + o_s[None, :], b_unit, mask=m_tile)
    tl.store(p_arrived + tl.program_id(0), 0)


@triton.jit
def nearest_fingerprint(b_unit, fingerprints, o_s, m_s, BM: tl.constexpr, BE: tl.constexpr):
    """Largest cosine with unit vectors `(S, BM)`, and the first fingerprint that has it; -inf and
    -1 where no fingerprint is enabled."""
    b_score = tl.full((BM,), float("-inf"), tl.float32)
    b_index = tl.full((BM,), -1, tl.int32)
    for i_e in range(fingerprints.begin, fingerprints.end, BE):
        o_e = i_e + tl.arange(0, BE)
        m_e = o_e < fingerprints.end
        b_fingerprints = tl.load(
            fingerprints.pointer + o_e.to(tl.int64)[:, None] * fingerprints.n_score + o_s[None, :],
            mask=m_e[:, None] & m_s[None, :],
            other=0.0,
        )
        m_enabled = tl.load(fingerprints.p_enabled + o_e, mask=m_e, other=0) != 0
        b_cosine = dot_wide(b_fingerprints, b_unit, tl.zeros((BE, BM), tl.float32))
        b_cosine = tl.where(m_enabled[:, None], b_cosine, float("-inf"))
        b_best = tl.max(b_cosine, axis=0)
        b_first = tl.min(
            tl.where(b_cosine == b_best[None, :], o_e[:, None], fingerprints.end), axis=0
        )
        # Strictly above, to keep the first among equals.
        m_better = b_best > b_score
        b_score = tl.where(m_better, b_best, b_score)
        b_index = tl.where(m_better, b_first, b_index)
    return b_score, b_index


@triton.jit
def best_of_slabs(best, o_row, m_m, BM: tl.constexpr, BL: tl.constexpr):
    """`nearest_fingerprint` of all slabs together."""
    b_score = tl.full((BM,), float("-inf"), tl.float32)
    b_index = tl.full((BM,), -1, tl.int32)
    for i_slab in range(0, best.n_slabs, BL):
        o_slab = i_slab + tl.arange(0, BL)
        m_cell = (o_slab < best.n_slabs)[:, None] & m_m[None, :]
        o_cell = o_slab.to(tl.int64)[:, None] * best.n_rows + o_row[None, :]
        b_scores = tl.load(best.p_score + o_cell, mask=m_cell, other=float("-inf"))
        b_indices = tl.load(best.p_index + o_cell, mask=m_cell, other=-1)
        b_best = tl.max(b_scores, axis=0)
        # Later slabs hold larger indices: the least among equals is the first.
        m_best = (b_scores == b_best[None, :]) & (b_indices >= 0)
        b_first = tl.min(tl.where(m_best, b_indices, 0x7FFFFFFF), axis=0)
        m_better = b_best > b_score
        b_score = tl.where(m_better, b_best, b_score)
        b_index = tl.where(m_better, b_first, b_index)
    return b_score, b_index


@triton.jit
def hand_in(best, p_arrived, b_score, b_index, i_slab, o_row, m_m):
    """Store the best of a slab; whether it is the last slab of these rows to do so."""
    o_cell = i_slab.to(tl.int64) * best.n_rows + o_row
    tl.store(best.p_score + o_cell, b_score, mask=m_m)
    tl.store(best.p_index + o_cell, b_index, mask=m_m)
    # The barrier puts the stores of every thread before the one thread's release.
    tl.debug_barrier()
    return tl.atomic_add(p_arrived, 1, sem="acq_rel", scope="gpu") == best.n_slabs - 1


@triton.jit(do_not_specialize=["n_rows", "n_fingerprints", "n_slabs", "slab"])
def match_kernel(
    p_units, p_fingerprints, p_enabled, p_best, p_best_index, p_arrived,
    p_mean, p_std, p_alpha, p_score, p_index, p_rows, p_counters,
    n_rows, n_score, n_fingerprints, n_slabs, slab,
    BM: tl.constexpr, S: tl.constexpr, BE: tl.constexpr, BL: tl.constexpr,
):  # fmt: skip
    """`BM` rows against a slab of fingerprints; the last slab of these rows decides their gates.

    units: float32 `(n_rows, n_score)`; arrived: int32, a zero for each block of rows.
    """
    i_block = tl.program_id(0) // n_slabs
    i_slab = tl.program_id(0) % n_slabs
    o_m = i_block * BM + tl.arange(0, BM)
    m_m = o_m < n_rows
    o_row = o_m.to(tl.int64)
    o_s = tl.arange(0, S)
    m_s = o_s < n_score
    p_unit = p_units + o_row * n_score
    b_unit = tl.load(p_unit[None, :] + o_s[:, None], mask=m_s[:, None] & m_m[None, :], other=0.0)
    begin = i_slab * slab
    end = min(begin + slab, n_fingerprints)
    fingerprints = Fingerprints(p_fingerprints, p_enabled, n_score, begin, end)
    b_score, b_index = nearest_fingerprint(b_unit, fingerprints, o_s, m_s, BM, BE)
    best = Best(p_best, p_best_index, n_slabs, n_rows)
    if hand_in(best, p_arrived + i_block, b_score, b_index, i_slab, o_row, m_m):
        b_score, b_index = best_of_slabs(best, o_row, m_m, BM, BL)
        b_first = tl.load(p_unit, mask=m_m, other=0.0)
        m_finite = b_first == b_first
        b_score = tl.where(m_finite, tl.maximum(b_score, -1.0), float("nan"))
        b_index = tl.where(m_finite, b_index, -1)
        threshold = Threshold(p_mean, p_std, p_alpha)
        decide(b_score, b_index, o_m, m_m, threshold, Decided(p_score, p_index, p_rows, p_counters))


def match_rows(dtype: torch.dtype) -> int:
    """Rows of one program: as many as the registers hold beside fingerprints of this dtype."""
    return 16 if dtype == torch.float32 else 64


def fingerprints_at_once(dtype: torch.dtype, n_score: int) -> int:
    """Half a tile of wide float32 fingerprints: more spill."""
    is_large = dtype == torch.float32 and n_score > 64
    return FINGERPRINT_TILE // 2 if is_large else FINGERPRINT_TILE


def slab_length(n_fingerprints: int, n_blocks: int, device: torch.device) -> int:
    """Fingerprints of one program: whole tiles, and so many that there are two programs on each
    multiprocessor, where there are fingerprints enough."""
    n_tiles = max(1, cdiv(n_fingerprints, FINGERPRINT_TILE))
    n_slabs = min(n_tiles, max(1, 2 * multiprocessors(device) // n_blocks))
    return cdiv(n_tiles, n_slabs) * FINGERPRINT_TILE


def match(parts: Parts, gate: TokenGate, decisions: Decisions) -> None:
    """The launches of `sketch_kernel` and `match_kernel`, which fill `decisions`. The gate's
    tensors are contiguous."""
    assert gate.fingerprints is not None
    n_rows, n_score, device = decisions.rows.shape[0], parts.n_score, decisions.rows.device
    n_fingerprints = gate.fingerprints.shape[0]
    block = match_rows(gate.fingerprints.dtype)
    n_blocks = cdiv(n_rows, block)
    slab = slab_length(n_fingerprints, n_blocks, device)
    n_slabs = max(1, cdiv(n_fingerprints, slab))
    n_adding = cdiv(n_rows, ADDED_ROWS)
    units = torch.empty(n_rows, n_score, dtype=torch.float32, device=device)
    arrived = torch.empty(n_adding, dtype=torch.int32, device=device)
    size = max(16, next_power_of_2(n_score))
    prepared.launch(
        sketch_kernel,
        (n_adding,),
        p_parts=parts.tensor,
        p_offset=gate.offset,
        p_units=units,
        p_arrived=arrived,
        n_rows=n_rows,
        n_score=n_score,
        n_parts=parts.tensor.shape[0],
        BM=ADDED_ROWS,
        S=size,
        PARTS=ADDED_PARTS,
    )
    prepared.launch(
        match_kernel,
        (n_blocks * n_slabs,),
        p_units=units,
        p_fingerprints=gate.fingerprints,
        p_enabled=gate.enabled,
        p_best=torch.empty(n_slabs, n_rows, dtype=torch.float32, device=device),
        p_best_index=torch.empty(n_slabs, n_rows, dtype=torch.int32, device=device),
        p_arrived=arrived,
        p_mean=gate.mean,
        p_std=gate.std,
        p_alpha=gate.alpha,
        p_score=decisions.score,
        p_index=decisions.nearest,
        p_rows=decisions.rows,
        p_counters=decisions.counters,
        n_rows=n_rows,
        n_score=n_score,
        n_fingerprints=n_fingerprints,
        n_slabs=n_slabs,
        slab=slab,
        BM=block,
        S=size,
        BE=fingerprints_at_once(gate.fingerprints.dtype, n_score),
        BL=SLAB_TILE,
    )
