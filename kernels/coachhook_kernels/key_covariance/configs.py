"""How `key_covariance_` is computed: the library's product, or tiles of one triangle."""

import math

import torch
from torch import Tensor

from coachhook_kernels.launch import runtime, tuning
from coachhook_kernels.launch.tuning import Config

SQUARE: Config = {
    "triangle": 1,
    "tma": 1,
    "block_i": 128,
    "block_j": 128,
    "block_n": 64,
    "group": 16,
    "num_warps": 4,
    "num_stages": 3,
}
"""Two programs fit on a Hopper multiprocessor: one multiplies while the other writes."""

LIBRARY: Config = SQUARE | {"triangle": 0}
"""cuBLAS computes both triangles, whatever the tiles."""

WIDE: Config = SQUARE | {"block_j": 256, "group": 8, "num_warps": 8}
"""Fewer bytes of keys for each product, but only one program on a multiprocessor."""

BLACKWELL: Config = SQUARE | {"num_warps": 8}
"""From capability 10.0 on a drain copies a tile of sums out of a memory of its own, and with fewer
warps, or a wider tile, a thread's registers do not hold it."""

POINTER: Config = SQUARE | {"tma": 0, "num_warps": 8}
"""Where tensor descriptors cannot be used: with a mask, and on older GPUs."""

SINGLE: Config = SQUARE | {"tma": 0, "block_n": 16, "num_warps": 8}
"""For float32 keys, multiplied in float32 without tensor cores. Used only if a measurement chose
it."""

SPAN = 2048
"""Rows that a tensor core sums before its accumulator is drained; a multiple of every `block_n`."""

SMALLEST_D = 4096
FEWEST_ROWS = 1024
WIDE_ROWS = 8192


def default_config(rows: int, d: int, dtype: torch.dtype, multiprocessors: int) -> Config:
    """The roofline's choice where nothing was measured (csrc_notes/key-covariance.md)."""
    if dtype == torch.float32 or d < SMALLEST_D or rows < FEWEST_ROWS:
        return LIBRARY
    blocks = math.ceil(d / WIDE["block_j"])
    waves = blocks * (blocks + 1) / multiprocessors
    # A wide tile overlaps its epilogue with nothing and leaves more multiprocessors idle at the
    # end.
    wide = rows >= WIDE_ROWS and math.ceil(waves) <= 1.1 * waves
    return WIDE if wide else SQUARE


def choose(moment: Tensor, keys: Tensor, mask: Tensor | None) -> Config:
    """The configuration for keys `(n, d)` of float32, float16 or bfloat16 on a GPU."""
    rows, d = keys.shape
    # Triton 3.6 multiplies masked float32 blocks in tf32 on a GPU of capability 10.0.
    if not _aligned(moment, keys) or (mask is not None and keys.dtype == torch.float32):
        return LIBRARY
    default = default_config(rows, d, keys.dtype, runtime.multiprocessors(keys.device))
    if default["triangle"] and _has_tensor_memory(keys.device):
        default = BLACKWELL
    if default["triangle"] and (mask is not None or not _has_tma(keys.device)):
        default = POINTER
    name = f"key_covariance_{8 * keys.dtype.itemsize}bit"
    config = tuning.lookup(name, keys.device, default, rows=rows, d=d)
    # What was measured may have been so without a mask.
    if config["triangle"] and config["tma"] and (mask is not None or not _has_tma(keys.device)):
        return default if default["triangle"] else POINTER
    return config


def _aligned(moment: Tensor, keys: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time; the kernels are slow where they cannot."""
    starts = (moment.data_ptr(), keys.data_ptr(), keys.shape[1], keys.stride(0))
    return keys.stride(1) == 1 and all(start % 16 == 0 for start in starts)


def _has_tma(device: torch.device) -> bool:
    """Whether the GPU copies tiles by tensor descriptor; older GPUs only emulate it."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _has_tensor_memory(device: torch.device) -> bool:
    """Whether the GPU's tensor cores sum in a memory of their own."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (10, 0)
