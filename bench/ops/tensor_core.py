"""What a product summed on NVIDIA's tensor cores may err by: they cut off where other arithmetic
rounds (csrc_notes/key-covariance.md)."""

import torch
from torch import Tensor

from coachhook_kernels.key_covariance.configs import SPAN

STEP = 16
"""Rows in one product of 16-bit numbers."""

GUARD_BITS = 2
"""Bits kept below a float32's last while a step is summed. With 2 an emulation errs by what was
measured on a Hopper GPU (csrc_notes/gpu.md)."""

EPS = torch.finfo(torch.float32).eps


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


def cuts_off(keys: Tensor) -> bool:
    """Whether tensor cores may multiply these keys."""
    return keys.is_cuda and torch.version.hip is None and keys.dtype.itemsize == 2


def cut_off(keys: Tensor) -> float:
    """What cutting off may take from any element of `KᵀK`, keys `(n, d)`; 0 where sums round."""
    if not cuts_off(keys):
        return 0.0
    # By Cauchy and Schwarz no sum of magnitudes is above the largest square.
    largest = max(float(part.double().square().sum(0).max()) for part in keys.split(2048, dim=1))
    return truncation(keys.shape[0], SPAN) * largest
