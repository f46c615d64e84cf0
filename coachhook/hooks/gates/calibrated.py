"""The calibrated gate: the paper's difference norm, taken token by token."""

import torch
from torch import Tensor

from coachhook.hooks.gates.gate import Evidence, Gate, Threshold
from coachhook_kernels import TokenGate, difference_norm

# Background keys whose norms are computed at a time.
_AT_ONCE = 4096


class CalibratedGate(Gate):
    """Opens where `‖Δ k‖` is far above its distribution over background keys of the layer."""

    name = "calibrated"

    @classmethod
    def choose(cls, evidence: Evidence) -> Threshold:
        """The lowest threshold that at most a share `rate` of the background clears, with a floor
        for α. Δ includes disabled edits, so that the threshold still fits when they are enabled."""
        delta = evidence.delta()
        pieces = evidence.background.split(_AT_ONCE)
        norms = [difference_norm(delta.project(p.to(delta.down.device))) for p in pieces]
        return Threshold.above(
            torch.cat(norms).cpu(), evidence.rate, evidence.settings.calibrated_alpha
        )

    def per_token(self) -> TokenGate:
        return TokenGate(self.mean, self.std, self.alpha)

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        score = difference_norm(projected)
        return score, (score - self.mean) / self.std, torch.full_like(score, -1, dtype=torch.long)
