"""The keyed gate: opens at keys that resemble an edited key, and names the edit."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from coachhook.hooks.gates.gate import Evidence, Gate, LayerEdits, PassWatcher, Threshold
from coachhook_kernels import TokenGate, fingerprint_sketch, nearest_fingerprint


class KeyedGate(Gate):
    """Score: the largest cosine between `F k - offset` and the enabled fingerprints of edited keys.

    projection `F` `(s, d_in)`, offset `(s,)`; fingerprints `(f, s)`: unit rows; owner int64 `(f,)`:
    the edit of each fingerprint; enabled bool `(f,)`: whether that edit is in force.
    """

    name = "keyed"
    tells_edits_apart = True
    projection: Tensor
    offset: Tensor
    fingerprints: Tensor
    owner: Tensor
    enabled: Tensor

    def __init__(
        self,
        threshold: Threshold,
        projection: Tensor,
        offset: Tensor,
        fingerprints: Tensor,
        owner: Tensor,
        enabled: Tensor,
    ) -> None:
        super().__init__(threshold)
        self.register_buffer("projection", projection, persistent=False)
        self.register_buffer("offset", offset, persistent=False)
        self.register_buffer("fingerprints", fingerprints, persistent=False)
        self.register_buffer("owner", owner, persistent=False)
        self.register_buffer("enabled", enabled, persistent=False)

    @classmethod
    def build(
        cls, threshold: Threshold, edits: LayerEdits, watcher: PassWatcher | None = None
    ) -> "KeyedGate":
        enabled = edits.in_force[edits.owner]
        return cls(
            threshold, edits.projection, edits.offset, edits.fingerprints, edits.owner, enabled
        )

    @classmethod
    def choose(cls, evidence: Evidence) -> Threshold:
        """The lowest threshold that at most a share `rate` of the background clears, but at least
        the cosine `resemblance` of the settings."""
        scores = evidence.nearest()
        if scores is None:
            return Threshold()
        ceiling = Threshold.above(scores, evidence.rate)
        least = (evidence.settings.resemblance - ceiling.mean) / ceiling.std
        return replace(ceiling, alpha=max(ceiling.alpha, least))

    def switch(self, in_force: Tensor) -> None:
        self.enabled.copy_(in_force.to(self.owner.device)[self.owner])

    def split(self, columns: Callable[[Tensor], Tensor]) -> None:
        self.projection = columns(self.projection)

    def per_token(self) -> TokenGate:
        return TokenGate(
            self.mean,
            self.std,
            self.alpha,
            self.projection,
            self.offset,
            self.fingerprints,
            self.enabled,
        )

    def sketch(self, keys: Tensor) -> Tensor:
        return fingerprint_sketch(keys, self.projection)

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert sketch is not None
        score, index = nearest_fingerprint(sketch, self.offset, self.fingerprints, self.enabled)
        edit = index if self.owner.numel() == 0 else torch.where(index < 0, -1, self.owner[index])
        return score, (score - self.mean) / self.std, edit
