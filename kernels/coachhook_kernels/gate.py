"""The per-token gates as tensors: what an operation needs to score a key (csrc_notes/method.md,
"Gates")."""

from typing import NamedTuple

import torch
from torch import Tensor

from coachhook_kernels.delta import Delta
from coachhook_kernels.scores import difference_norm, fingerprint_similarity


class TokenGate(NamedTuple):
    """A gate that reads each token by itself; open where `(score - mean) / std >= alpha`.

    mean, std, alpha: 0-d float32. The *keyed* gate, whose score is the largest cosine, also has
    projection `F` `(s, d_in)`, offset `(s,)`, fingerprints `(e, s)` with rows of unit length and
    enabled bool `(e,)`. In the *calibrated* gate these are None, and the score is `‖Δ k‖`.
    """

    mean: Tensor
    std: Tensor
    alpha: Tensor
    projection: Tensor | None = None
    offset: Tensor | None = None
    fingerprints: Tensor | None = None
    enabled: Tensor | None = None

    @property
    def keyed(self) -> bool:
        return self.projection is not None

    def contiguous(self) -> "TokenGate":
        """The gate with all tensors contiguous but the projection, which may have any strides."""
        parts = (self.offset, self.fingerprints, self.enabled)
        return TokenGate(
            *self[:4], *(None if part is None else part.contiguous() for part in parts)
        )

    def is_open(self, score: Tensor) -> Tensor:
        """Which tokens are corrected: bool, of the shape of `score`; a NaN score stays closed."""
        return (score - self.mean) / self.std >= self.alpha

    def read(self, keys: Tensor, delta: Delta) -> tuple[Tensor, Tensor]:
        """Score float32 and nearest fingerprint int64 (-1: none), both `(...)` for keys
        `(..., d_in)`."""
        if self.projection is None:
            score = difference_norm(delta.project(keys))
            return score, torch.full_like(score, -1, dtype=torch.long)
        assert self.offset is not None
        assert self.fingerprints is not None
        assert self.enabled is not None
        return fingerprint_similarity(
            keys, self.projection, self.offset, self.fingerprints, self.enabled
        )
