"""Accumulation of the uncentred second moment of keys: the public functions."""

from coachhook_kernels.key_covariance.op import key_covariance_, mirror_, require_symmetric

__all__ = ["key_covariance_", "mirror_", "require_symmetric"]
