"""What a gate is: it scores a token, standardises the score against a reference population, and
opens where the z-score clears a threshold (csrc_notes/method.md, "Gates").

A gate owns its policy too: what it is built of, how its threshold is chosen after each batch, how
an edit is switched off under it, and what of it is saved.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from coachhook_kernels import Delta, TokenGate, hook_linear


class GateReading(NamedTuple):
    """What a gate says of each token: score and z float32 `(...)`, is_open bool `(...)`, and edit
    int64 `(...)`: the id of the edit that the score stands for, -1 where the gate names none."""

    score: Tensor
    z: Tensor
    is_open: Tensor
    edit: Tensor


@dataclass(frozen=True)
class Threshold:
    """Reference population (mean and deviation of its scores) and least open z-score `alpha`.

    It is what a saved folder keeps of a gate after each batch. A gate that needs more there has a
    subclass of it, with further fields of numbers, as its `threshold_type`.
    """

    mean: float = 0.0
    std: float = 1.0
    alpha: float = float("inf")

    @classmethod
    def above(cls, scores: Tensor, rate: float, least: float = float("-inf")) -> Self:
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

    def to_json(self) -> dict[str, float | None]:
        # JSON has no infinity, which is the α of a gate that nothing opens.
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, float | None]) -> Self:
        return cls(**{k: math.inf if v is None else float(v) for k, v in data.items()})


@dataclass(frozen=True)
class LayerEdits:
    """What the journal says of the edits at one layer.

    projection `F` `(s, d_in)`, offset `(s,)`: how keys become fingerprints; fingerprints `(f, s)`
    with unit rows, owner int64 `(f,)`: the id of the edit each belongs to; in_force bool `(e,)`: by
    id, edits that are written, not superseded and enabled.
    """

    projection: Tensor
    offset: Tensor
    fingerprints: Tensor
    owner: Tensor
    in_force: Tensor


class GateSettings(Protocol):
    """What of `EditConfig` thresholds are chosen by."""

    @property
    def resemblance(self) -> float: ...
    @property
    def calibrated_alpha(self) -> float: ...
    @property
    def sequence_alpha(self) -> float: ...


class Evidence(Protocol):
    """What a layer's threshold can be chosen by after a batch; read when it is asked for.

    rate: largest share of background tokens that may open the gate. before: the threshold after
    the batch before, if there was one. background: keys of ordinary tokens, bfloat16 `(m, d_in)`.
    """

    @property
    def settings(self) -> GateSettings: ...
    @property
    def rate(self) -> float: ...
    @property
    def before(self) -> Threshold | None: ...
    @property
    def background(self) -> Tensor: ...

    def delta(self) -> Delta:
        """Δ of all edits, those that are switched off too, where the layer computes."""

    def delta_in_force(self) -> Delta:
        """Δ as the hook has it now."""

    def nearest(self) -> Tensor | None:
        """Of each background key the largest cosine to any fingerprint that stands, float32
        `(m,)`; None if there is none."""

    def at_subjects(self, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`(n,)`: at the subjects of the batch's bare prompts, what `read` makes of the keys
        `(b, t, d_in)` and the mask of real tokens, bool `(b, t)`, of some texts: `(b, t)`."""


class PassWatcher(Protocol):
    """A forward pre-hook of the base model, for a gate that must know more of a pass than keys."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None: ...


class Gate(nn.Module):
    """A gate of one hooked layer. Its three scalars are 0-d float32 tensors in any model dtype."""

    name: ClassVar[str]
    # Whether an edit that is switched off stays in Δ, and the gate no longer opens for it; under
    # any other gate its share leaves Δ.
    tells_edits_apart: ClassVar[bool] = False
    # What people compare with the threshold when they look at a text: scores, or z-scores.
    compared: ClassVar[str] = "score"
    threshold_type: ClassVar[type[Threshold]] = Threshold

    mean: Tensor
    std: Tensor
    alpha: Tensor

    def __init__(self, threshold: Threshold, watcher: PassWatcher | None = None) -> None:
        super().__init__()
        self.watcher = watcher
        for scalar in ("mean", "std", "alpha"):
            value = torch.tensor(getattr(threshold, scalar), dtype=torch.float32)
            self.register_buffer(scalar, value, persistent=False)

    @classmethod
    def build(
        cls, threshold: Threshold, edits: LayerEdits, watcher: PassWatcher | None = None
    ) -> "Gate":
        """The gate of a layer. watcher: the one that `watch` made for this model."""
        return cls(threshold, watcher)

    @classmethod
    def choose(cls, evidence: Evidence) -> Threshold:
        """The threshold after a batch."""
        raise NotImplementedError

    @classmethod
    def watch(cls, parameters: Sequence[str]) -> PassWatcher | None:
        """What must see every pass of a model whose base model's forward has these `parameters`."""
        return None

    def switch(self, in_force: Tensor) -> None:
        """Follow which edits are in force, bool `(e,)` by id: in place, so that compiled and
        captured graphs see it at their next run. Asked of a gate that tells edits apart."""
        raise NotImplementedError

    def split(self, columns: Callable[[Tensor], Tensor]) -> None:
        """Where processes share a layer's keys, keep of what is as wide as a key the part
        `columns(tensor)` of this process."""

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
        """The gate as the fused operations take it; None for one that they do not know."""
        return None

    def fused(
        self, keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta
    ) -> Tensor | None:
        """The hooked layer's output by one operation; None where there is none for this gate."""
        gate = self.per_token()
        return None if gate is None else hook_linear(keys, weight, bias, delta, gate)[0]

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
