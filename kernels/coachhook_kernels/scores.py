"""Scores of the three gates: how much a token looks like an edited one
(csrc_notes/method.md, "Gates")."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn.functional import linear


def difference_norm(projected: Tensor) -> Tensor:
    """`‖Δ k‖` in float32, shape `(...)`, from `Delta.project` output `(..., r)` (Eq. 16-17)."""
    wide = torch.promote_types(projected.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(projected, dim=-1, dtype=wide)
    return norm.float()


def fingerprint_sketch(keys: Tensor, projection: Tensor) -> Tensor:
    """`F k` of shape `(..., s)` for keys `(..., d_in)` and `F` `(s, d_in)`, in the dtype of `F`."""
    with _no_autocast(keys.device):
        return linear(keys.to(projection.dtype), projection)


def nearest_fingerprint(
    sketch: Tensor, offset: Tensor, fingerprints: Tensor, enabled: Tensor
) -> tuple[Tensor, Tensor]:
    """`fingerprint_similarity` from the sketches `F k` `(..., s)` of the keys."""
    projected = sketch.float() - offset.float()
    if fingerprints.shape[0] == 0:
        finite = projected.isfinite().all(dim=-1)
        nothing = torch.full_like(finite, -1, dtype=torch.long)
        return torch.where(finite, -1.0, torch.nan), nothing
    # A bias of -inf excludes disabled fingerprints, and only the largest product is divided by the
    # norm: both cost less than a pass over all cosines.
    disabled = projected.new_zeros(enabled.shape).masked_fill_(~enabled, -torch.inf)
    with _no_autocast(sketch.device):
        best, index = linear(projected, fingerprints.float(), disabled).max(dim=-1)
    score = best / torch.linalg.vector_norm(projected, dim=-1).clamp_min(1e-12)
    return score.clamp_min(-1.0), index.masked_fill(~(score > -torch.inf), -1)


def fingerprint_similarity(
    keys: Tensor, projection: Tensor, offset: Tensor, fingerprints: Tensor, enabled: Tensor
) -> tuple[Tensor, Tensor]:
    """Largest cosine between `F k - offset` and the enabled fingerprints, and its fingerprint.

    keys `(..., d_in)`; projection `F` `(s, d_in)`; offset `(s,)`, the mean of `F k` over ordinary
    tokens; fingerprints `(e, s)` with rows of unit length; enabled bool `(e,)`. Returns the cosine
    float32 `(...)` and the index int64 `(...)`: -1 and -1 where no fingerprint is enabled.
    """
    sketch = fingerprint_sketch(keys, projection)
    return nearest_fingerprint(sketch, offset, fingerprints, enabled)


def sequence_zscore(norms: Tensor, mask: Tensor) -> Tensor:
    """z-scores of `norms` `(b, t)` over the real tokens (`mask` true) of each sequence (Eq. 18-19).

    In a sequence of one real token the standard deviation is undefined: z is NaN, as in the paper,
    and opens no gate. Padding gets NaN too. Deviations are squared in float32: where all are below
    1e-19 the squares underflow, and z is meaningless.
    """
    norms = norms.float()
    count = mask.sum(-1, keepdim=True)
    mean = torch.where(mask, norms, 0).sum(-1, keepdim=True) / count
    centred = norms - mean
    variance = torch.where(mask, centred.square(), 0).sum(-1, keepdim=True) / (count - 1)
    return torch.where(mask, centred / variance.sqrt(), torch.nan)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context without autocast, which would round the cosines to half precision."""
    # Of meta tensors torch knows no autocast, and raises when asked.
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
