"""The published hook's forward, operation by operation: the baseline of the fused forms.

Both weights are dense, both project every token, and a boolean mask copies the edited rows into the
output. On a GPU the mask makes the host wait.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def published(
    keys: Tensor, weight: Tensor, hook_weight: Tensor, bias: Tensor | None, alpha: float
) -> Tensor:
    """keys `(b, l, d_in)`; weight and hook_weight `(d_out, d_in)`; output `(b, l, d_out)`."""
    output = linear(keys, weight, bias)
    edited = linear(keys, hook_weight, bias)
    norms = torch.linalg.vector_norm(edited - output, dim=-1)
    z = (norms - norms.mean(-1, keepdim=True)) / norms.std(-1, keepdim=True)
    is_open = z >= alpha
    output[is_open] = edited[is_open]
    return output


def published_select(
    keys: Tensor, weight: Tensor, hook_weight: Tensor, bias: Tensor | None, alpha: float
) -> Tensor:
    """The same with `torch.where` in place of the masked copy, so that a CUDA graph can hold it."""
    output = linear(keys, weight, bias)
    edited = linear(keys, hook_weight, bias)
    norms = torch.linalg.vector_norm(edited - output, dim=-1)
    z = (norms - norms.mean(-1, keepdim=True)) / norms.std(-1, keepdim=True)
    return torch.where((z >= alpha).unsqueeze(-1), edited, output)
