"""The operations of a hooked layer, as functions of tensors alone.

Each module holds the reference of its operations: plain torch, the specification that any faster
version must agree with. The package depends on torch only and runs on every device.
"""

from coachhook_kernels.correction import Delta, hook_correction
from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear import hook_correction_, hook_linear
from coachhook_kernels.key_covariance import key_covariance_
from coachhook_kernels.scores import difference_norm, fingerprint_similarity, sequence_zscore

__all__ = [
    "Delta",
    "KernelInputError",
    "TokenGate",
    "difference_norm",
    "fingerprint_similarity",
    "hook_correction",
    "hook_correction_",
    "hook_linear",
    "key_covariance_",
    "sequence_zscore",
]
