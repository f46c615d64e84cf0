"""Launching the kernel of few rows: which problems it takes, with which tiles."""

import torch
import triton
from torch import Tensor

from coachhook_kernels.delta import Delta
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear.rows_kernel import rows_kernel
from coachhook_kernels.launch.counters import counters
from coachhook_kernels.launch.tuning import Config, launchable, lookup

TOKEN_TILES = (16, 32, 64)
"""Widths of a tile of tokens; the widest is the most rows that one launch takes. Beyond it the
keys, which every `base` program reads whole, would cost more than the weights."""


def default_config(d_out: int, n_tokens: int, dtype: torch.dtype, by_column: bool) -> Config:
    """Tiles such that every program of a usual launch is resident at once (two or three a
    multiprocessor) with 40 KB of weights in flight on each. by_column: the weight is a `Conv1D`'s,
    contiguous along `d_out`, where a narrower tile would read half-used sectors."""
    common = {"num_warps": 4, "num_stages": 4}
    if dtype == torch.float32:
        return common | {"BN": 16, "BK": 32, "SLICE": 512}
    if by_column:
        return common | {"BN": 32, "BK": 128 if n_tokens <= 32 else 64, "SLICE": 512}
    if n_tokens > 32:
        return common | {"BN": 32 if d_out >= 4096 else 16, "BK": 64, "SLICE": 512, "num_stages": 6}
    if d_out < 4096:
        return common | {"BN": 16, "BK": 256, "SLICE": 256}
    if d_out >= 8192:
        return common | {"BN": 64, "BK": 128, "SLICE": 1024}
    return common | {"BN": 32, "BK": 256 if n_tokens <= 16 else 128, "SLICE": 512}


FINGERPRINT_TILE = 32
CALIBRATED_TILE = 32
RANK_TILE = 32
PROJECT_STEP = 64
MOST_MATCHES = 4096
"""Tokens times tiles of fingerprints: beyond it the table of matches outgrows a program, and the
kernels for many rows, which loop, take over."""


def takes(keys: Tensor, delta: Delta, gate: TokenGate) -> bool:
    """Whether one launch can do it: few rows, and a norm that a projection gives."""
    n_tokens = keys.shape[0]
    # float32 accumulators and operands of a wider tile do not fit the registers.
    widest = TOKEN_TILES[0] if keys.dtype == torch.float32 else TOKEN_TILES[-1]
    if n_tokens > widest or not (gate.keyed or delta.up is not None):
        return False
    n_fingerprints = 0 if gate.fingerprints is None else gate.fingerprints.shape[0]
    n_match = triton.cdiv(n_fingerprints, FINGERPRINT_TILE)
    return bool(n_match * token_tile(n_tokens) <= MOST_MATCHES)


def match_table(n_match: int) -> int:
    """Rows of the table of matches: few sizes, since each is a compilation of its own."""
    return next(size for size in (16, 64, 256) if n_match <= size)


def token_tile(n_tokens: int) -> int:
    return next(tile for tile in TOKEN_TILES if n_tokens <= tile)


def launch(
    keys: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    delta: Delta,
    gate: TokenGate,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write `hook_linear` of keys `(t, d_in)`, t ≤ 64, to output `(t, d_out)`; without a weight,
    add the correction to it. Not for a calibrated gate on a dense Δ. Returns score and index."""
    n_tokens, d_in = keys.shape
    d_out = output.shape[1]
    rank = delta.down.shape[0]
    factored = delta.up is not None
    projection = gate.projection if gate.projection is not None else delta.down
    n_score = projection.shape[0]
    n_fingerprints = gate.fingerprints.shape[0] if gate.fingerprints is not None else 0
    by_column = weight is not None and weight.stride(0) == 1 and weight.stride(1) > 1
    bits = 8 * keys.element_size()
    config = launchable(
        lookup(
            f"hook_linear_rows_{bits}bit",
            keys.device,
            default_config(d_out, n_tokens, keys.dtype, by_column),
            d_in=d_in,
            d_out=d_out,
            rows=n_tokens,
        )
    )
    score_tile = max(16, triton.next_power_of_2(n_score)) if gate.keyed else CALIBRATED_TILE
    n_slices = triton.cdiv(d_in, config["SLICE"])
    n_project = n_slices * triton.cdiv(n_score, score_tile)
    n_match = max(1, triton.cdiv(n_fingerprints, FINGERPRINT_TILE)) if gate.keyed else 1
    n_down = triton.cdiv(rank, config["BN"]) if gate.keyed and factored else 0
    n_base = triton.cdiv(d_out, config["BN"])

    device = keys.device
    score = torch.empty(n_tokens, dtype=torch.float32, device=device)
    index = torch.empty(n_tokens, dtype=torch.int64, device=device)
    partials = torch.empty(n_slices, n_score, n_tokens, dtype=torch.float32, device=device)
    lowered = torch.empty(rank if factored else 0, n_tokens, dtype=torch.float32, device=device)
    best = torch.empty(n_match, n_tokens, dtype=torch.float32, device=device)
    best_index = torch.empty(n_match, n_tokens, dtype=torch.int32, device=device)
    rows_kernel[(n_project + n_match + n_down + n_base,)](
        p_keys=keys,
        p_weight=weight,
        p_bias=bias,
        p_down=delta.down,
        p_up=delta.up,
        p_projection=projection,
        p_offset=gate.offset,
        p_fingerprints=gate.fingerprints,
        p_enabled=gate.enabled,
        p_mean=gate.mean,
        p_std=gate.std,
        p_alpha=gate.alpha,
        p_output=output,
        p_score=score,
        p_index=index,
        p_partials=partials,
        p_lowered=lowered,
        p_best=best,
        p_best_index=best_index,
        p_counters=counters(device),
        n_tokens=n_tokens,
        d_in=d_in,
        d_out=d_out,
        n_score=n_score,
        rank=rank,
        n_fingerprints=n_fingerprints,
        n_slices=n_slices,
        n_project=n_project,
        n_match=n_match,
        n_down=n_down,
        stride_kt=keys.stride(0),
        stride_wn=0 if weight is None else weight.stride(0),
        stride_wk=0 if weight is None else weight.stride(1),
        stride_dn=delta.down.stride(0),
        stride_dk=delta.down.stride(1),
        stride_un=0 if delta.up is None else delta.up.stride(0),
        stride_ur=0 if delta.up is None else delta.up.stride(1),
        stride_pn=projection.stride(0),
        stride_pk=projection.stride(1),
        stride_ot=output.stride(0),
        BASE=weight is not None,
        KEYED=gate.keyed,
        FACTORED=factored,
        BT=token_tile(n_tokens),
        BN=config["BN"],
        BK=config["BK"],
        SLICE=config["SLICE"],
        BS=score_tile,
        BE=FINGERPRINT_TILE,
        MATCHES=match_table(n_match),
        BR=RANK_TILE,
        PK=PROJECT_STEP,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
    )
    return score, index
