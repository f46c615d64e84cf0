"""`hook_linear` and `hook_correction_` for few rows: which problems, and with which tiles.

1. decode_kernel   base product, score and gate; match_kernel where there is no base product
                   whose programs could match many fingerprints
2. tiles           the correction of the listed rows: returns at once where none is open
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coachhook_kernels.delta import Delta
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear import tiles
from coachhook_kernels.hook_linear.decode_kernel import decode_kernel, match_kernel
from coachhook_kernels.hook_linear.decode_shared import Gate, Keys, Matrix, Output, Scratch
from coachhook_kernels.launch import prepared
from coachhook_kernels.launch.counters import TILE_COUNTERS, counters
from coachhook_kernels.launch.runtime import launches_overlap, multiprocessors
from coachhook_kernels.launch.sizes import MATCHED_ALONE, cdiv, next_power_of_2
from coachhook_kernels.launch.tuning import Config, launchable, lookup

TOKEN_TILES = (1, 16, 32, 64)
"""Widths of a tile of tokens; the widest is the most rows that a launch takes. With more rows the
keys, all of which every base program reads, would cost more than the weights."""


def token_tile(n_tokens: int) -> int:
    return next(tile for tile in TOKEN_TILES if n_tokens <= tile)


def takes(keys: Tensor, delta: Delta, gate: TokenGate) -> bool:
    """Whether decoding it is: few rows, and no dense `Δ` whose norm is the score."""
    # With float32 operands, a wider tile does not fit into the registers.
    widest = 16 if keys.dtype == torch.float32 else TOKEN_TILES[-1]
    return keys.shape[0] <= widest and (gate.keyed or delta.up is not None)


@functools.cache
def default_config(
    d_in: int, d_out: int, tile: int, dtype: torch.dtype, by_column: bool, processors: int
) -> Config:
    """Tiles for `tile` tokens, and slices of `d_in` that give each multiprocessor two programs.

    by_column: the weight is a `Conv1D`'s, contiguous along `d_out`, so that a narrow tile would
    waste most of each sector it reads.
    """
    single = dtype == torch.float32
    config = {"num_warps": 4, "num_stages": 4}
    if tile == 1:
        config |= {"BN": 32, "BK": 128} if by_column else {"BN": 4, "BK": 1024 if single else 2048}
        least = 2
    elif single:
        config |= {"BN": 16, "BK": 32}
        least = 16
    elif d_out < 2048:
        config |= {"BN": 32 if by_column else 16, "BK": 256 if tile == 16 else 128}
        least = 8
    else:
        # Up to 96 KiB of shared memory, of which a Hopper multiprocessor has room for two.
        config |= {"BN": 64, "BK": 128, "num_stages": 4 if tile < 64 else 3}
        least = 8
    n_tiles, n_steps = cdiv(d_out, config["BN"]), cdiv(d_in, config["BK"])
    slices = power_of_two(min(2 * processors // n_tiles, n_steps // least))
    return config | {"SLICES": slices}


def power_of_two(most: int) -> int:
    """The largest that is at most `most`, between 1 and 16."""
    return 1 << (max(1, min(most, 16)).bit_length() - 1)


def projection_slices(n_steps: int, n_tiles: int, tile: int, keyed: bool) -> int:
    """Slices so short that the projection is whole long before the base product, which the match
    hides behind. Without a match there is nothing to hide, and no need to split single tokens."""
    if tile > 1:
        slices = power_of_two(min(8, n_steps // 4))
    else:
        slices = power_of_two(min(4, n_steps // 2)) if keyed else 1
    return countable(slices, n_tiles)


def countable(slices: int, n_tiles: int) -> int:
    """`slices`, or 1 where there are more tiles than counters."""
    return slices if n_tiles <= TILE_COUNTERS else 1


class Tickets(NamedTuple):
    """How the match is divided. sketch: `n_score`, as wide as its tile; block: fingerprints read at
    a time; number: of tickets."""

    sketch: int
    block: int
    number: int


MATCH_BLOCK = {1: 64, 16: 64, 32: 32, 64: 32}
"""Fingerprints of up to 64 numbers read at a time for each tile of tokens, half as many of up to
128: with more the registers run out."""


def tickets(gate: TokenGate, tile: int, processors: int) -> Tickets:
    if gate.fingerprints is None:
        return Tickets(16, 16, 1)
    single = gate.fingerprints.dtype == torch.float32
    return _tickets(*gate.fingerprints.shape, single, tile, processors)


@functools.lru_cache(maxsize=256)
def _tickets(
    n_fingerprints: int, n_score: int, single: bool, tile: int, processors: int
) -> Tickets:
    sketch = max(16, next_power_of_2(n_score))
    widest = MATCH_BLOCK[tile]
    if single:
        widest = 32 if tile == 1 else 16
    block = max(16, min(widest, 64 * widest // sketch))
    if n_fingerprints <= MATCHED_ALONE:
        return Tickets(sketch, block, 1)
    n_blocks = cdiv(n_fingerprints, block)
    return Tickets(sketch, block, cdiv(n_blocks, cdiv(n_blocks, 2 * processors)))


@functools.cache
def correction_config(dtype: torch.dtype) -> Config:
    """Tiles of the second launch, which reads Δ once for up to 16 open rows, and for up to 64."""
    if dtype == torch.float32:
        few = {"FEW": 16, "FEW_BM": 16, "FEW_BN": 32, "FEW_BK": 32}
        return few | {"BM": 32, "BN": 32, "BK": 32, "num_warps": 4, "num_stages": 3}
    few = {"FEW": 16, "FEW_BM": 16, "FEW_BN": 32, "FEW_BK": 128}
    return few | {"BM": 64, "BN": 32, "BK": 128, "num_warps": 4, "num_stages": 4}


def _config(keys: Tensor, weight: Tensor | None, d_out: int, keyed: bool) -> Config:
    (n_tokens, d_in), device = keys.shape, keys.device
    tile = token_tile(n_tokens)
    by_column = weight is not None and weight.stride(0) == 1 and weight.stride(1) > 1
    processors = multiprocessors(device)
    default = default_config(d_in, d_out, tile, keys.dtype, by_column, processors)
    kernel = f"hook_linear_decode{tile}_{8 * keys.element_size()}bit"
    kinds = {
        "gate": "keyed" if keyed else "calibrated",
        "layout": "none" if weight is None else "column" if by_column else "row",
    }
    return launchable(lookup(kernel, device, default, d_in=d_in, d_out=d_out, **kinds))


class Programs(NamedTuple):
    """Programs of the first launch, and the slices of `d_in` into which their tiles are cut."""

    project_slices: int
    n_project: int
    slices: int
    n_base: int

    @property
    def n_partial(self) -> int:
        """The first so many write a part of a tile, each in a place of its own."""
        if self.n_base and self.slices > 1:
            return self.n_project + self.n_base
        return self.n_project if self.project_slices > 1 else 0


def _programs(
    config: Config, tile: int, d_in: int, n_score: int, d_out: int, keyed: bool
) -> Programs:
    """d_out: 0 where there is no base product."""
    n_tiles, n_steps = cdiv(n_score, config["BN"]), cdiv(d_in, config["BK"])
    project_slices = projection_slices(n_steps, n_tiles, tile, keyed)
    n_base_tiles = cdiv(d_out, config["BN"])
    slices = countable(config["SLICES"], n_base_tiles)
    return Programs(project_slices, n_tiles * project_slices, slices, n_base_tiles * slices)


def _decide(
    keys: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    projection: Tensor,
    gate: TokenGate,
    results: Output,
    counts: Tensor,
) -> Tensor:
    """The first launch: the results, and the list of open rows, which it returns."""
    (n_tokens, d_in), d_out, device = keys.shape, results.pointer.shape[1], keys.device
    n_score, tile, keyed = projection.shape[0], token_tile(n_tokens), gate.keyed
    config = _config(keys, weight, d_out, keyed)
    programs = _programs(config, tile, d_in, n_score, 0 if weight is None else d_out, keyed)
    match = tickets(gate, tile, multiprocessors(device))
    n_partials = programs.n_partial * config["BN"] * tile
    # `F k`, or fewer squares of each tile of `A k`; and the best of each ticket.
    n_floats = n_partials + (n_score + match.number) * n_tokens
    floats = torch.empty(n_floats, dtype=torch.float32, device=device)
    ints = torch.empty((1 + match.number) * n_tokens, dtype=torch.int32, device=device)
    shared: dict[str, Any] = {
        "gate": Gate(*gate[:3], *gate[4:], n_score if keyed else 0),
        "output": results,
        "scratch": Scratch(floats, ints, counts),
        "n_tokens": n_tokens,
        "n_score": n_score,
        "n_fingerprints": 0 if gate.fingerprints is None else gate.fingerprints.shape[0],
        "n_tickets": match.number,
        "n_partials": n_partials,
        "BT": tile,
        "S": match.sketch,
        "BE": match.block,
    }
    prepared.launch(
        decode_kernel,
        (programs.n_project + programs.n_base,),
        keys=Keys(keys, keys.stride(0), d_in),
        weight=Matrix(weight, *((0, 0) if weight is None else weight.stride())),
        p_bias=bias,
        projection=Matrix(projection, *projection.stride()),
        d_out=d_out,
        BASE=weight is not None,
        KEYED=keyed,
        PROJECT_SLICES=programs.project_slices,
        EARLY=launches_overlap(device),
        **config | {"SLICES": programs.slices},
        **shared,
    )
    if weight is None and match.number > 1:
        prepared.launch(match_kernel, (match.number,), **shared, num_warps=config["num_warps"])
    return ints


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
    n_tokens, device = keys.shape[0], keys.device
    score = torch.empty(n_tokens, dtype=torch.float32, device=device)
    index = torch.empty(n_tokens, dtype=torch.int64, device=device)
    lowered = None
    if delta.up is not None:
        lowered = torch.empty(n_tokens, delta.down.shape[0], dtype=keys.dtype, device=device)
    projection = delta.down if gate.projection is None else gate.projection
    results = Output(output, output.stride(0), score, index, lowered)
    counts = counters(device)
    rows = _decide(keys, weight, bias, projection, gate, results, counts)
    default = correction_config(keys.dtype)
    kernel = f"hook_linear_decode_correct_{8 * keys.element_size()}bit"
    config = lookup(kernel, device, default, d_in=keys.shape[1], d_out=output.shape[1])
    if lowered is None or delta.up is None:
        tiles.multiply_open(keys, delta.down, output, tiles.ADD, config, rows, counts)
    else:
        if gate.keyed:
            tiles.multiply_open(keys, delta.down, lowered, tiles.STORE, config, rows, counts)
        tiles.multiply_open(lowered, delta.up, output, tiles.ADD, config, rows, counts)
    return score, index
