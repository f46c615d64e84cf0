"""`hook_linear_sequence`: the paper's own gate, standardised over each sequence."""

from coachhook_kernels.hook_linear_sequence.op import hook_linear_sequence

__all__ = ["hook_linear_sequence"]
