"""How NVIDIA's tensor cores sum, emulated: they cut off where other arithmetic rounds."""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.ops.tensor_core import GUARD_BITS, STEP

Drain = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _cut(values: Tensor, unit: Tensor) -> Tensor:
    return torch.trunc(values / unit) * unit


def _unit(values: Tensor, bits: int) -> Tensor:
    """The value of the bit `bits` below the leading one."""
    return torch.ldexp(torch.ones_like(values), torch.frexp(values)[1] - 1 - bits)


def sum_of_squares(keys: Tensor, span: int, drain: Drain) -> Tensor:
    """`Σ k²` over the rows of keys `(n, ...)` as tensor cores sum it; float32.

    drain: from accumulator and drained to both after a drain; called after every span of rows.
    """
    accumulator = torch.zeros(keys.shape[1:], dtype=torch.float64)
    drained = torch.zeros(keys.shape[1:], dtype=torch.float32)
    for i, rows in enumerate(keys.double().split(STEP), start=1):
        products = rows.square()
        unit = _unit(torch.maximum(accumulator.abs(), products.amax(0)), 23 + GUARD_BITS)
        total = _cut(accumulator, unit) + _cut(products, unit).sum(0)
        accumulator = _cut(total, _unit(total, 23))
        if i * STEP % span == 0 and i * STEP < len(keys):
            left, drained = drain(accumulator.float(), drained)
            accumulator = left.double()
    return accumulator.float() + drained
