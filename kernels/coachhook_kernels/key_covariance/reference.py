"""Specification of `key_covariance_`: plain torch, any device, any float dtype."""

from torch import Tensor

_BLOCK = 256


def key_covariance_(
    moment: Tensor, keys: Tensor, mask: Tensor | None = None, *, mirror: bool = True
) -> Tensor:
    """`moment += Kᵀ diag(mask) K`, in place, summed in the dtype of `moment`.

    moment `(d, d)` float32 or float64, symmetric; keys `(n, d)` of any float dtype; mask bool
    `(n,)`: rows where it is False are left out, whatever they hold. With `mirror` the result is
    exactly symmetric; without, only its upper triangle is specified, until `mirror_` is called.
    """
    # Converted first: torch fills no 8-bit floats.
    selected = keys.to(moment.dtype)
    if mask is not None:
        selected = selected.masked_fill(~mask.unsqueeze(-1), 0)
    moment.addmm_(selected.mT, selected)
    # A library may sum the two triangles in different orders, and they then differ in the last bit.
    return mirror_(moment) if mirror else moment


def mirror_(moment: Tensor) -> Tensor:
    """Copy the upper triangle of `moment` `(d, d)` onto the lower one, in place."""
    for i in range(0, moment.shape[0], _BLOCK):
        rows = moment[i : i + _BLOCK]
        # torch transposes fast where both sides are contiguous.
        rows[:, :i].copy_(moment[:i, i : i + _BLOCK].contiguous().mT.contiguous())
        corner = rows[:, i : i + _BLOCK]
        corner.copy_(corner.triu() + corner.triu(1).mT)
    return moment
