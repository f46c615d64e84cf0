"""A hooked layer in one operation: base projection, score, gate and correction."""

from coachhook_kernels.hook_linear.op import hook_correction_, hook_linear

__all__ = ["hook_correction_", "hook_linear"]
