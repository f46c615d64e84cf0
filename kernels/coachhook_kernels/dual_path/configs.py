"""Tile shapes of the dual path. csrc_notes/dual-path.md has the budgets that chose them."""

import torch

from coachhook_kernels.launch.runtime import multiprocessors
from coachhook_kernels.launch.tuning import Config, lookup

FEW = 16
"""Up to this many rows, the keys take the narrow side of a dot, whose least width on a tensor core
this is."""

COMPOSED_ROWS = 256
"""From this many rows on, two cuBLAS products and a norm replace the fused product."""

GROUP = 8
"""Row tiles in a group that shares a column tile."""


def _config(BT: int, BN: int, BK: int, num_warps: int, num_stages: int) -> Config:
    return {"BT": BT, "BN": BN, "BK": BK, "num_warps": num_warps, "num_stages": num_stages}


FEW_ROWS = {
    "half": (_config(FEW, 64, 128, 4, 5), _config(FEW, 16, 128, 4, 8)),
    "single": (_config(FEW, 32, 64, 4, 4), _config(FEW, 16, 64, 4, 5)),
}
MANY_ROWS = {
    "half": (
        _config(128, 128, 32, 8, 6),
        _config(128, 64, 64, 8, 5),
        _config(64, 64, 64, 4, 6),
        _config(64, 32, 64, 4, 8),
        _config(32, 32, 256, 8, 3),
    ),
    "single": (
        _config(64, 64, 16, 8, 3),
        _config(64, 32, 32, 8, 3),
        _config(32, 32, 32, 4, 3),
    ),
}

MEETING = (
    _config(16, 16, 256, 4, 5),
    _config(16, 32, 256, 4, 4),
    _config(16, 64, 128, 4, 5),
    _config(32, 16, 256, 4, 4),
    _config(32, 32, 256, 4, 4),
    _config(32, 64, 128, 4, 4),
    _config(64, 16, 128, 4, 5),
    _config(64, 32, 128, 4, 5),
    _config(64, 64, 64, 4, 6),
)
"""Tiles of the one launch, of half precision: all tokens by columns, the smallest first."""

COLUMN_MAJOR_TILE = 128 * 64
"""Largest tile of a weight that is not row-major (`Conv1D`): above it sm_80 spills."""

# Statistics of a sequence are read in blocks of BL tokens by TILES column tiles, 4096 numbers.
FINISH_LENGTHS = (16, 128, 1024)
FINISH_BLOCK = 4096
FINISH_RANKS = 32
FINISH_WARPS = 4
ROW_BLOCK = 1024


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def choices(n_tokens: int, dtype: torch.dtype, row_major: bool) -> list[Config]:
    """The configurations that a product may use, the largest tile first."""
    width = "single" if dtype == torch.float32 else "half"
    if n_tokens <= FEW:
        return list(FEW_ROWS[width])
    return [
        config
        for config in MANY_ROWS[width]
        if (row_major or config["BT"] * config["BN"] <= COLUMN_MAJOR_TILE)
        and (config["BT"] < 2 * n_tokens or config["BT"] <= 32)
    ]


def default_config(
    n_tokens: int,
    d_out: int,
    rank: int,
    dtype: torch.dtype,
    row_major: bool,
    device: torch.device,
) -> Config:
    """The largest possible tile that gives at least nine programs for ten multiprocessors, or else
    the smallest. rank 0: a dense Δ."""
    possible = choices(n_tokens, dtype, row_major)
    wanted = 0.9 * multiprocessors(device)
    for config in possible:
        columns = _tiles(d_out, config["BN"]) + _tiles(rank, config["BN"])
        if _tiles(n_tokens, config["BT"]) * columns >= wanted:
            return config
    return possible[-1]


def product_config(
    keys: torch.Tensor, weight: torch.Tensor, down: torch.Tensor, factored: bool
) -> Config:
    """Tiles of one product: measured ones for half precision and row-major weights, if any."""
    (n_tokens, d_in), d_out = keys.shape, weight.shape[0]
    rank = down.shape[0] if factored else 0
    row_major = weight.stride(1) == 1 and down.stride(1) == 1
    default = default_config(n_tokens, d_out, rank, keys.dtype, row_major, keys.device)
    if keys.dtype == torch.float32 or not row_major:
        return default
    name = "dual_path_factored" if factored else "dual_path_dense"
    return lookup(name, keys.device, default, n_tokens=n_tokens, d_in=d_in, d_out=d_out)


def meeting_config(keys: torch.Tensor, d_out: int) -> Config | None:
    """Tiles with which one launch does all for keys `(t, d_in)`, or None where there are none: its
    programs wait for each other, so that there may be no more of them than multiprocessors, each of
    which holds at least one program, whatever that takes."""
    if keys.dtype == torch.float32:
        return None
    (n_tokens, d_in), most = keys.shape, multiprocessors(keys.device)

    def fits(config: Config) -> bool:
        return n_tokens <= config["BT"] and _tiles(d_out, config["BN"]) <= most

    default = next(filter(fits, MEETING), None)
    if default is None:
        return None
    found = lookup(
        "dual_path_meeting", keys.device, default, n_tokens=n_tokens, d_in=d_in, d_out=d_out
    )
    # It may have been measured at a smaller size.
    return found if fits(found) else default


def composed(keys: torch.Tensor, d_out: int) -> bool:
    """Whether keys `(t, d_in)` are so many that the vendor's library computes the products."""
    default = {"composed_rows": COMPOSED_ROWS}
    n_tokens, d_in = keys.shape
    choice = lookup("hook_linear_sequence", keys.device, default, d_in=d_in, d_out=d_out)
    return n_tokens >= choice["composed_rows"]


def finish_block(length: int) -> int:
    """Tokens whose statistics are read at once."""
    return next((BL for BL in FINISH_LENGTHS if length <= BL), FINISH_LENGTHS[-1])


def swap_block(length: int) -> int:
    """Tokens that one program swaps."""
    return 16 if length <= 16 else 32


def finish_columns(dtype: torch.dtype) -> int:
    """Columns swapped at once: 128 bytes of a row, a whole line of the cache."""
    return 128 // dtype.itemsize


def slab_columns(output: torch.Tensor, n_blocks: int) -> int:
    """Columns of the output `(t, d_out)` that one program swaps: with enough columns, two programs
    for each multiprocessor."""
    columns = finish_columns(output.dtype)
    tiles = _tiles(output.shape[1], columns)
    slabs = min(tiles, max(1, 2 * multiprocessors(output.device) // n_blocks))
    return _tiles(tiles, slabs) * columns
