"""Launches of kernels that are compiled already, without Triton's own preparation.

Which variant of a kernel its arguments want, Triton works out anew at every launch, in 20 to 30 µs
of the host's time. It looks at types, at the values of integers and of constants, and at whether
pointers are multiples of 16; here these make a key, under which the variant is found in 6 µs.
"""

from collections.abc import Hashable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

ALIGNMENT = 16
WORD = 2**31
POINTER_RANGE = torch.version.hip is not None
"""Whether Triton also compiles in that a tensor's memory is less than 2 GiB, as for AMD GPUs."""

MOST = 4096
"""Variants kept; beyond, all are looked up again."""

# A compiled kernel, and where its parameters stand among the arguments given.
_Variant = tuple[Any, tuple[int, ...]]
_variants: dict[Hashable, _Variant] = {}
_unspecialized: dict[int, frozenset[str]] = {}


def launch(kernel: Any, grid: tuple[int, ...], **given: Any) -> None:
    """`kernel[grid](**given)`: all parameters and Triton's options by name, where a tensor is
    passed as the address of its first element."""
    if not isinstance(kernel, JITFunction):
        # The interpreter's, or one whose launches are recorded.
        kernel[grid](**given)
        return
    device = triton.runtime.driver.active.get_current_device()
    # With their names: the same values in another order are another launch.
    key: list[Hashable] = [id(kernel), device, tuple(given)]
    unspecialized = _unspecialized.get(id(kernel))
    if unspecialized is None:
        unspecialized = _unspecialized_of(kernel)
    arguments: list[Any] = []
    for name, value in given.items():
        if type(value) is int:
            arguments.append(value)
            key.append(value if name not in unspecialized else value < WORD)
        elif isinstance(value, tuple):
            arguments.append(tuple([_told(member, key) for member in value]))
        else:
            arguments.append(_told(value, key))
    found = tuple(key)
    variant = _variants.get(found)
    if variant is None:
        _keep(found, kernel, kernel[grid](**given), tuple(given))
        return
    compiled, order = variant
    compiled[(*grid, 1, 1)](*[arguments[i] for i in order])


def _told(value: Any, key: list[Hashable]) -> Any:
    """The value as a launch takes it; to the key is added what Triton would compile in."""
    if not isinstance(value, Tensor):
        key.append(value)
        return value
    address = value.data_ptr()
    key += (value.dtype, address % ALIGNMENT == 0)
    if POINTER_RANGE:
        key.append(value.untyped_storage().nbytes() < WORD)
    return address


def _unspecialized_of(kernel: JITFunction[Any]) -> frozenset[str]:
    """Parameters whose values Triton is told not to compile in."""
    # By identity: the hash of a kernel is that of its source, behind a lock.
    names = frozenset(p.name for p in kernel.params if p.do_not_specialize)
    _unspecialized[id(kernel)] = names
    return names


def _keep(key: Hashable, kernel: Any, compiled: Any, names: tuple[str, ...]) -> None:
    if len(_variants) >= MOST:
        _variants.clear()
    _variants[key] = compiled, tuple(names.index(p.name) for p in kernel.params)
