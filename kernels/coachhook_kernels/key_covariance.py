"""Accumulation of the uncentred second moment of keys."""

from torch import Tensor


def key_covariance_(moment: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """`moment += Kᵀ diag(mask) K`, in place, summed in the dtype of `moment`.

    moment `(d, d)` float32 or float64, symmetric; keys `(n, d)` of any float dtype; mask bool
    `(n,)`: masked rows count for nothing, whatever they hold.
    """
    selected = keys if mask is None else keys.masked_fill(~mask.unsqueeze(-1), 0)
    selected = selected.to(moment.dtype)
    return moment.addmm_(selected.mT, selected)
