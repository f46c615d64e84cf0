"""The interface of gates: a gate scores each token, standardises the score against a reference
population, and opens where the z-score reaches a threshold (csrc_notes/method.md, "Gates").

A gate also owns its policy: what it is built from, how its threshold is chosen after each batch,
how edits are disabled, and what is saved in a folder.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from coachhook_kernels import Delta, TokenGate, hook_linear


class GateReading(NamedTuple):
    """A gate's result per token: score and z float32 `(...)`, is_open bool `(...)`, and edit int64
    `(...)`: the id of the edit whose fingerprint gave the score, -1 if none."""

    score: Tensor
    z: Tensor
    is_open: Tensor
    edit: Tensor


@dataclass(frozen=True)
class Threshold:
    """Reference population (mean and standard deviation of its scores) and `alpha`, the lowest
    z-score that opens the gate.

    This is all that a folder stores of a gate after each batch. A gate that needs more sets its
    `threshold_type` to a subclass with further numeric fields.
    """

    mean: float = 0.0
    std: float = 1.0
    alpha: float = float("inf")

    @classmethod
    def above(cls, scores: Tensor, rate: float, least: float = float("-inf")) -> Self:
        """The lowest threshold that at most a share `rate` of background `scores` `(n,)` reaches.

        least: a floor for alpha. A score equal to the threshold opens the gate.
        """
        scores = scores.double()
        mean, std = scores.mean(), scores.std().clamp_min(1e-6)
        allowed = int(rate * scores.numel())
        ceiling = scores.sort(descending=True).values[allowed]
        # One part in 10⁵ above the highest score that must stay closed, as a margin for rounding.
        alpha = (ceiling - mean) / std + 1e-5 * (ceiling.abs() / std + 1)
        return cls(mean.item(), std.item(), max(alpha.item(), least))

    def to_json(self) -> dict[str, float | None]:
        # JSON has no infinity, the α of a gate that never opens.
        return {k: v if math.isfinite(v) else None for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, data: Mapping[str, float | None]) -> Self:
        return cls(**{k: math.inf if v is None else float(v) for k, v in data.items()})


@dataclass(frozen=True)
class LayerEdits:
    """The edits of a journal at one layer, as a gate is built from them.

    projection `F` `(s, d_in)`, offset `(s,)`: map keys to fingerprints; fingerprints `(f, s)`: unit
    rows; owner int64 `(f,)`: the id of the edit each belongs to; in_force bool `(e,)`: by id, which
    edits are written, not superseded and enabled.
    """

    projection: Tensor
    offset: Tensor
    fingerprints: Tensor
    owner: Tensor
    in_force: Tensor


class GateSettings(Protocol):
    """The fields of `EditConfig` that gates choose their thresholds by."""

    @property
    def resemblance(self) -> float: ...
    @property
    def calibrated_alpha(self) -> float: ...
    @property
    def sequence_alpha(self) -> float: ...


class Evidence(Protocol):
    """What a gate may use to choose a layer's threshold after a batch; computed on access.

    rate: largest share of background tokens that may open the gate. before: the threshold after
    the previous batch, or None. background: keys of ordinary tokens, bfloat16 `(m, d_in)`.
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
        """Δ of all edits, disabled ones included, on the layer's device and in its dtype."""

    def delta_in_force(self) -> Delta:
        """Δ as it is in the hook now."""

    def nearest(self) -> Tensor | None:
        """Largest cosine of each background key to the fingerprints of edits that are written and
        not superseded, float32 `(m,)`; None if there are no such fingerprints."""

    def at_subjects(self, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """`read` maps the keys `(b, t, d_in)` of some texts and their mask of real tokens, bool
        `(b, t)`, to values `(b, t)`; returns those at the n subjects of the batch's bare prompts,
        `(n,)`."""


class PassWatcher(Protocol):
    """A forward pre-hook of the base model, for a gate that needs more of a pass than its keys."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None: ...


class Gate(nn.Module):
    """A gate of one hooked layer. mean, std and alpha are 0-d float32 in any model dtype."""

    name: ClassVar[str]
    # True: a disabled edit stays in Δ and the gate no longer opens for it. False: it leaves Δ.
    tells_edits_apart: ClassVar[bool] = False
    # What a trace compares with the threshold: "score" or "z".
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
        """The gate of a layer. watcher: the result of `watch` for this model."""
        return cls(threshold, watcher)

    @classmethod
    def choose(cls, evidence: Evidence) -> Threshold:
        """The threshold after a batch."""
        raise NotImplementedError

    @classmethod
    def watch(cls, parameters: Sequence[str]) -> PassWatcher | None:
        """The pre-hook this gate needs, or None. parameters: those of the base model's forward."""
        return None

    def switch(self, in_force: Tensor) -> None:
        """Set which edits are in force, bool `(e,)` by id: in place, so that compiled and captured
        graphs see it in their next run. Called only on gates that tell edits apart."""
        raise NotImplementedError

    def split(self, columns: Callable[[Tensor], Tensor]) -> None:
        """Where the keys are split over processes, replace each tensor of width `d_in` by this
        process's columns of it, `columns(tensor)`."""

    def forward(self, keys: Tensor, projected: Tensor, sketch: Tensor | None = None) -> GateReading:
        """Read keys `(..., d_in)`. projected: `Δ.project(keys)`, `(..., r)`; sketch: the result of
        `self.sketch(keys)`, if the caller already has it."""
        sketch = self.sketch(keys) if sketch is None else sketch
        score, z, edit = self.standardise(projected, sketch)
        return GateReading(score, z, z >= self.alpha, edit)

    def sketch(self, keys: Tensor) -> Tensor | None:
        """What the gate reads besides `projected`, a linear map of the keys; None if nothing."""
        return None

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score, z-score and edit id of each token."""
        raise NotImplementedError

    def passes(self, rows: int) -> Iterator[None]:
        """For a warm-up with `rows` tokens: each kind of pass that has kernels of its own, set up
        while the caller runs it."""
        yield

    def per_token(self) -> TokenGate | None:
        """The gate in the form fused operations take; None if they do not support it."""
        return None

    def fused(
        self, keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta
    ) -> Tensor | None:
        """The hooked layer's output by one fused operation; None if this gate has none."""
        gate = self.per_token()
        return None if gate is None else hook_linear(keys, weight, bias, delta, gate)[0]

    def least_open(self) -> Tensor:
        """The threshold in units of the score, 0-d float32."""
        return self.mean + self.alpha * self.std

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Gate":
        # Follow the device but not the dtype: rounding to bfloat16 would change the threshold.
        scalars = {name: self._buffers[name] for name in ("mean", "std", "alpha")}
        super()._apply(fn, recurse)
        for name, value in scalars.items():
            moved = self._buffers[name]
            assert value is not None
            assert moved is not None
            self._buffers[name] = value.to(moved.device)
        return self
