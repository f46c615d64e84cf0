"""The gated correction `Δ k` of a down-projection's output (paper Eq. 15; csrc_notes/method.md,
"Forward")."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear


class Delta(NamedTuple):
    """`Δ = W_h - W_fc`, dense or as factors.

    down: `(r, d_in)` factor `A`, or with `up` None the dense `Δ` of shape `(d_out, d_in)`.
    up:   `(d_out, r)` factor `U` with orthonormal columns, so that `‖Δ k‖ = ‖A k‖`.
    """

    down: Tensor
    up: Tensor | None = None

    def to(self, dtype: torch.dtype, device: torch.device | None = None) -> "Delta":
        up = None if self.up is None else self.up.to(device, dtype)
        return Delta(self.down.to(device, dtype), up)

    def project(self, keys: Tensor) -> Tensor:
        """`A k` (or `Δ k` when dense) for keys `(..., d_in)`; its norm is that of `Δ k`."""
        return linear(keys.to(self.down.dtype), self.down)

    def expand(self, projected: Tensor) -> Tensor:
        """`Δ k` of shape `(..., d_out)` from the result of `project`."""
        return projected if self.up is None else linear(projected, self.up.to(projected.dtype))


def hook_correction(output: Tensor, delta_keys: Tensor, is_open: Tensor) -> Tensor:
    """`output + Δ k` where the gate is open; elsewhere `output` itself, bit for bit.

    output, delta_keys: `(..., d_out)`; is_open: bool `(...)`, a constant in the backward pass.
    """
    return torch.where(is_open.unsqueeze(-1), output + delta_keys.to(output.dtype), output)
