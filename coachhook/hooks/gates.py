"""Gates: score a token, standardise against a reference population, compare with a threshold.

Three gates share one interface (design section 2): `keyed` compares a token's key with the
fingerprints of edited keys, `calibrated` is the paper's difference norm taken per token, and
`sequence` is the paper's own, standardised over the tokens of one sequence (Eq. 16-20).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from coachhook_kernels import (
    TokenGate,
    difference_norm,
    fingerprint_sketch,
    nearest_fingerprint,
    sequence_zscore,
)


class GateReading(NamedTuple):
    """What a gate says of each token: score and z float32 `(...)`, is_open bool `(...)`, and edit
    int64 `(...)`: the id of the edit that the score stands for, -1 where the gate names none."""

    score: Tensor
    z: Tensor
    is_open: Tensor
    edit: Tensor


@dataclass(frozen=True)
class Threshold:
    """Reference population (mean and deviation of its scores) and least open z-score `alpha`."""

    mean: float = 0.0
    std: float = 1.0
    alpha: float = float("inf")

    @classmethod
    def above(cls, scores: Tensor, rate: float, least: float = float("-inf")) -> "Threshold":
        """The lowest threshold that at most `rate` of background `scores` `(n,)` clear.

        `least` is a floor for alpha. Ties count: a score equal to the threshold is open.
        """
        scores = scores.double()
        mean, std = scores.mean(), scores.std().clamp_min(1e-6)
        allowed = int(rate * scores.numel())
        ceiling = scores.sort(descending=True).values[allowed]
        # One part in 10⁵ above the highest score that must stay closed, clear of rounding.
        alpha = (ceiling - mean) / std + 1e-5 * (ceiling.abs() / std + 1)
        return cls(mean.item(), std.item(), max(alpha.item(), least))


class Gate(nn.Module):
    """A gate of one hooked layer. Its three scalars are 0-d float32 tensors in any model dtype."""

    name: ClassVar[str]
    mean: Tensor
    std: Tensor
    alpha: Tensor

    def __init__(self, threshold: Threshold) -> None:
        super().__init__()
        for scalar in ("mean", "std", "alpha"):
            value = torch.tensor(getattr(threshold, scalar), dtype=torch.float32)
            self.register_buffer(scalar, value, persistent=False)

    def forward(self, keys: Tensor, projected: Tensor, sketch: Tensor | None = None) -> GateReading:
        """Read keys `(..., d_in)`, with `projected = Δ.project(keys)` of shape `(..., r)`; and with
        `sketch(keys)`, where that has been made already."""
        sketch = self.sketch(keys) if sketch is None else sketch
        score, z, edit = self.standardise(projected, sketch)
        return GateReading(score, z, z >= self.alpha, edit)

    def sketch(self, keys: Tensor) -> Tensor | None:
        """What the gate reads of keys beside `projected`, linear in them."""
        return None

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score, z-score and edit id of each token."""
        raise NotImplementedError

    def per_token(self) -> TokenGate | None:
        """The gate as the fused operations take it; None for one that reads whole sequences."""
        return None

    def least_open(self) -> Tensor:
        """The threshold in units of the score, 0-d float32."""
        return self.mean + self.alpha * self.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        # A threshold rounded to bfloat16 is another threshold: follow the device, not the dtype.
        scalars = {name: self._buffers[name] for name in ("mean", "std", "alpha")}
        super()._apply(fn, recurse)
        for name, value in scalars.items():
            moved = self._buffers[name]
            assert value is not None
            assert moved is not None
            self._buffers[name] = value.to(moved.device)
        return self


class KeyedGate(Gate):
    """Opens on keys that resemble an edited key; says which edit it was.

    projection `F` `(s, d_in)`, offset `(s,)`, fingerprints `(e, s)` with unit rows, owner int64
    `(e,)` the edit of each fingerprint, enabled bool `(e,)`.
    """

    name = "keyed"
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


class CalibratedGate(Gate):
    """Opens where `‖Δ k‖` is far above its distribution over background keys of the layer."""

    name = "calibrated"

    def per_token(self) -> TokenGate:
        return TokenGate(self.mean, self.std, self.alpha)

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        score = difference_norm(projected)
        return score, (score - self.mean) / self.std, torch.full_like(score, -1, dtype=torch.long)


class SequenceMask:
    """Forward pre-hook of a base model that tells its gates which tokens of a pass are real.

    parameters: names of the base model's forward parameters, in order.
    """

    def __init__(self, parameters: Sequence[str] = ()) -> None:
        self.parameters = tuple(parameters)
        self.mask: Tensor | None = None
        self.batch: int | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        self.batch = inputs.shape[0] if isinstance(inputs, Tensor) else None

    def of(self, leading: Sequence[int]) -> tuple[tuple[int, int], Tensor | None]:
        """`(b, t)` of a pass whose tokens have shape `leading`, and the bool mask of the real ones
        (None: all). Some architectures flatten batch and sequence before the FFN, and a cached pass
        brings only the last `t` tokens."""
        batch = self.batch if self.mask is None else self.mask.shape[0]
        if batch is None:
            batch = leading[0] if len(leading) > 1 else 1
        length = math.prod(leading) // max(batch, 1)
        if self.mask is None:
            return (batch, length), None
        return (batch, length), self.mask[:, self.mask.shape[1] - length :].bool()


class SequenceGate(Gate):
    """The paper's gate: z-score of `‖Δ k‖` over the real tokens of the same sequence."""

    name = "sequence"

    def __init__(self, threshold: Threshold, context: SequenceMask) -> None:
        super().__init__(threshold)
        self.context = context

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        score = difference_norm(projected)
        shape, mask = self.context.of(score.shape)
        norms = score.reshape(shape)
        mask = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask
        z = sequence_zscore(norms, mask).reshape(score.shape)
        return score, z, torch.full_like(score, -1, dtype=torch.long)


GATES = (KeyedGate.name, CalibratedGate.name, SequenceGate.name)
