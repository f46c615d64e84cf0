"""How NVIDIA's tensor cores sum: they cut off where other arithmetic rounds."""

from collections.abc import Callable

import torch
from torch import Tensor

STEP = 16
"""Rows in one product of 16-bit numbers."""

GUARD_BITS = 2
"""Bits kept below a float32's last while a step is summed. With 2 the emulation errs by what was
measured on a Hopper GPU (csrc_notes/gpu.md)."""

EPS = torch.finfo(torch.float32).eps
Drain = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def truncation(n_rows: int, span: int) -> float:
    """What cutting off takes from a sum over rows, as a share of the sum of magnitudes.

    A cut takes half of what it can on average, and there are so many that no sum is far from the
    average: half a unit in the last place for the result of a step, and for each product half of
    the last bit kept. The accumulator grows from next to nothing to the sum of a span, and is half
    of that on average; what a drain leaves of earlier spans is less than a 128th of their sum.
    """
    steps = n_rows / STEP
    units = 0.5 * (1 + STEP * 2.0**-GUARD_BITS)
    largest = min(1.0, span / max(n_rows, 1)) + 1 / 128
    return steps * units * EPS * largest / 2


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
