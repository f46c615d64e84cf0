"""Specification of `hook_linear` and `hook_correction_`: plain torch, differentiable."""

from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels.delta import Delta, hook_correction
from coachhook_kernels.gate import TokenGate


def hook_linear(
    keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta, gate: TokenGate
) -> tuple[Tensor, Tensor, Tensor]:
    """`W_fc k + b`, plus `Δ k` where the gate is open (paper Eq. 15-20, per token).

    keys `(..., d_in)`; weight `(d_out, d_in)`; bias `(d_out,)` or None. Returns the output
    `(..., d_out)`, the score and the nearest fingerprint, both `(...)`.
    """
    score, index = gate.read(keys.detach(), delta)
    corrected = delta.expand(delta.project(keys))
    return hook_correction(linear(keys, weight, bias), corrected, gate.is_open(score)), score, index
