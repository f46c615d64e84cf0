"""The operations of a hooked layer, as functions of tensors alone.

Each operation has a reference in plain torch, which specifies what its Triton kernels compute. The
package depends on torch only; Triton, where it is installed, is imported at first use.
"""

from coachhook_kernels.delta import Delta, hook_correction
from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear import hook_correction_, hook_linear
from coachhook_kernels.hook_linear_sequence import hook_linear_sequence
from coachhook_kernels.key_covariance import key_covariance_
from coachhook_kernels.memory import MemoryGate, memory_add_, memory_gate
from coachhook_kernels.scores import (
    difference_norm,
    fingerprint_similarity,
    fingerprint_sketch,
    nearest_fingerprint,
    sequence_zscore,
)

__all__ = [
    "Delta",
    "KernelInputError",
    "MemoryGate",
    "TokenGate",
    "difference_norm",
    "fingerprint_similarity",
    "fingerprint_sketch",
    "hook_correction",
    "hook_correction_",
    "hook_linear",
    "hook_linear_sequence",
    "key_covariance_",
    "memory_add_",
    "memory_gate",
    "nearest_fingerprint",
    "sequence_zscore",
]
