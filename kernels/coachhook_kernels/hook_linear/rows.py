"""Launching the kernel for few rows: which problems it takes, and with which tiles."""

import torch
import triton
from torch import Tensor

from coachhook_kernels.delta import Delta
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear.rows_kernel import rows_kernel
from coachhook_kernels.launch.counters import counters
from coachhook_kernels.launch.tuning import Config, launchable, lookup

TOKEN_TILES = (16, 32, 64)
"""Widths of a tile of tokens; the widest is the most rows that one launch takes. With more rows the
keys, all of which every `base` program reads, would cost more than the weights."""


def default_config(d_out: int, n_tokens: int, dtype: torch.dtype, by_column: bool) -> Config:
    """Tiles for which all programs of a usual launch are resident at once, two or three on each
    multiprocessor with 40 KB of weights in flight. by_column: the weight is a `Conv1D`'s,
    contiguous along `d_out`, so that a narrower tile would waste half of each sector it reads."""
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
"""Most tokens times tiles of fingerprints. Beyond, the table of matches outgrows a program, and the
kernels for many rows, which loop over the fingerprints, take over."""


def takes(keys: Tensor, delta: Delta, gate: TokenGate) -> bool:
    """Whether one launch can do it: few rows, few fingerprints, and no dense `Δ` whose norm is the
    score."""
    n_tokens = keys.shape[0]
    # With float32 operands, a wider tile does not fit into the registers.
    widest = TOKEN_TILES[0] if keys.dtype == torch.float32 else TOKEN_TILES[-1]
    if n_tokens > widest or not (gate.keyed or delta.up is not None):
        return False
    n_fingerprints = 0 if gate.fingerprints is None else gate.fingerprints.shape[0]
    n_match = triton.cdiv(n_fingerprints, FINGERPRINT_TILE)
    return bool(n_match * token_tile(n_tokens) <= MOST_MATCHES)


def match_table(n_match: int) -> int:
    """Rows of the table of matches: few sizes, since each is compiled separately."""
    return next(size for size in (16, 64, 256) if n_match <= size)


def token_tile(n_tokens: int) -> int:
    return next(tile for tile in TOKEN_TILES if n_tokens <= tile)


def _config(keys: Tensor, weight: Tensor | None, d_out: int) -> Config:
    n_tokens, d_in = keys.shape
    by_column = weight is not None and weight.stride(0) == 1 and weight.stride(1) > 1
    default = default_config(d_out, n_tokens, keys.dtype, by_column)
    kernel = f"hook_linear_rows_{8 * keys.element_size()}bit"
    return launchable(lookup(kernel, keys.device, default, d_in=d_in, d_out=d_out, rows=n_tokens))


def _sizes(
    keys: Tensor, delta: Delta, gate: TokenGate, n_score: int, d_out: int, config: Config
) -> dict[str, int]:
    """The constants and the counts of a launch: its tiles, and the number of programs by role."""
    n_tokens, d_in = keys.shape
    rank = delta.down.shape[0]
    n_fingerprints = 0 if gate.fingerprints is None else gate.fingerprints.shape[0]
    score_tile = max(16, triton.next_power_of_2(n_score)) if gate.keyed else CALIBRATED_TILE
    n_slices = triton.cdiv(d_in, config["SLICE"])
    n_match = max(1, triton.cdiv(n_fingerprints, FINGERPRINT_TILE)) if gate.keyed else 1
    lowers = gate.keyed and delta.up is not None
    return {
        "n_tokens": n_tokens,
        "d_in": d_in,
        "d_out": d_out,
        "n_score": n_score,
        "rank": rank,
        "n_fingerprints": n_fingerprints,
        "n_slices": n_slices,
        "n_project": n_slices * triton.cdiv(n_score, score_tile),
        "n_match": n_match,
        "n_down": triton.cdiv(rank, config["BN"]) if lowers else 0,
        "BT": token_tile(n_tokens),
        "BS": score_tile,
        "BE": FINGERPRINT_TILE,
        "MATCHES": match_table(n_match),
        "BR": RANK_TILE,
        "PK": PROJECT_STEP,
        **config,
    }


def _strides(
    keys: Tensor, weight: Tensor | None, delta: Delta, projection: Tensor, output: Tensor
) -> dict[str, int]:
    wn, wk = (0, 0) if weight is None else weight.stride()
    un, ur = (0, 0) if delta.up is None else delta.up.stride()
    return {
        "stride_kt": keys.stride(0),
        "stride_wn": wn,
        "stride_wk": wk,
        "stride_dn": delta.down.stride(0),
        "stride_dk": delta.down.stride(1),
        "stride_un": un,
        "stride_ur": ur,
        "stride_pn": projection.stride(0),
        "stride_pk": projection.stride(1),
        "stride_ot": output.stride(0),
    }


def _scratch(sizes: dict[str, int], factored: bool, device: torch.device) -> dict[str, Tensor]:
    """Buffers through which the programs of a launch pass results to one another."""

    def table(*rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*rows, sizes["n_tokens"], dtype=dtype, device=device)

    return {
        "p_partials": table(sizes["n_slices"], sizes["n_score"]),
        "p_lowered": table(sizes["rank"] if factored else 0),
        "p_best": table(sizes["n_match"]),
        "p_best_index": table(sizes["n_match"], dtype=torch.int32),
        "p_counters": counters(device),
    }


def launch(
    keys: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    delta: Delta,
    gate: TokenGate,
    output: Tensor,
) -> tuple[Tensor, Tensor]:
    """Write `hook_linear` of keys `(t, d_in)` to output `(t, d_out)`; without a weight, add the
    correction to it. Only for problems that `takes` accepts. Returns score and index."""
    (n_tokens, d_out), device = output.shape, keys.device
    projection = delta.down if gate.projection is None else gate.projection
    config = _config(keys, weight, d_out)
    sizes = _sizes(keys, delta, gate, projection.shape[0], d_out, config)
    n_base = triton.cdiv(d_out, config["BN"])
    n_programs = sizes["n_project"] + sizes["n_match"] + sizes["n_down"] + n_base
    factored = delta.up is not None
    score = torch.empty(n_tokens, dtype=torch.float32, device=device)
    index = torch.empty(n_tokens, dtype=torch.int64, device=device)
    rows_kernel[(n_programs,)](
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
        BASE=weight is not None,
        KEYED=gate.keyed,
        FACTORED=factored,
        **sizes,
        **_strides(keys, weight, delta, projection, output),
        **_scratch(sizes, factored, device),
    )
    return score, index
