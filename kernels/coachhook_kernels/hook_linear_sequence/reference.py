"""Specification of `hook_linear_sequence`: plain torch, differentiable."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels.delta import Delta, hook_correction
from coachhook_kernels.scores import difference_norm, sequence_zscore


def hook_linear_sequence(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    mask: Tensor | None,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`W_fc k + b`, plus `Δ k` where the z-score of `‖Δ k‖` is at least alpha (paper Eq. 15-20).

    keys `(b, l, d_in)`; weight `(d_out, d_in)`; bias `(d_out,)` or None; mask bool `(b, l)`, true
    for real tokens, or None: all are. Returns the output `(b, l, d_out)`, and score `‖Δ k‖` and
    z-score over the real tokens of each sequence, both float32 `(b, l)`.
    """
    projected = delta.project(keys)
    score = difference_norm(projected.detach())
    z = sequence_zscore(score, torch.ones_like(score, dtype=torch.bool) if mask is None else mask)
    output = linear(keys, weight, bias)
    return hook_correction(output, delta.expand(projected), z >= alpha), score, z
