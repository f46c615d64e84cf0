"""Typed errors of the kernels package."""


class KernelInputError(ValueError):
    """An operation was given tensors that do not fit together: shape, dtype, device or layout."""
