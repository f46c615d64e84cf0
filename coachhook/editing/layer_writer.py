"""What writing to one layer needs: its inverse, its sketch, and keys of ordinary text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook.config import EditConfig
from coachhook.editing.background_scores import BackgroundScores
from coachhook.editing.inverse import RecursiveInverse, whitening_sketch
from coachhook.statistics.measure import LayerStatistics

# A fingerprint is unusable if more ordinary tokens than the false-alarm rate allows have at least
# this cosine to it. Attention sinks (the keys of first tokens) reach 1.
_DISTINCT = 0.8

# A key is an attention sink if it has at least cosine `ALIKE` to more than a share `_SINK_SHARE` of
# first words: at the default resemblance, a gate that opens at the key opens at those words too.
# Sketches of few dimensions need a higher cosine (see `LayerWriter.sinks`).
ALIKE, _SINK_SHARE = EditConfig.resemblance, 0.01

# Fingerprints compared with all background keys at a time.
_CHUNK = 256


def _fingerprint(keys: Tensor, projection: Tensor, offset: Tensor) -> Tensor:
    return normalize(keys @ projection.T - offset, dim=-1)


def layer_sketch(
    statistics: LayerStatistics, config: EditConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Projection `(s, d_in)` and offset `(s,)` of a layer's fingerprints, float32 on the CPU.

    device: where the whitening is computed, in float64.
    """
    projection = whitening_sketch(
        statistics.moment, config.preservation, config.fingerprint_size, seed=0, device=device
    )
    return projection, (statistics.background.float() @ projection.T).mean(0)


@dataclass
class KeySketches:
    """How keys of a layer are told from ordinary ones.

    projection `(s, d_in)`, offset `(s,)`: its sketch; sketched: unit-norm sketches of ordinary
    tokens, float32 `(m, s)`; first: of first words, float32 `(f, s)`.
    """

    projection: Tensor
    offset: Tensor
    sketched: Tensor
    first: Tensor

    def __post_init__(self) -> None:
        self.background_scores = BackgroundScores(self.sketched)

    @classmethod
    def of_keys(cls, statistics: LayerStatistics, sketch: tuple[Tensor, Tensor]) -> "KeySketches":
        """sketch: projection `(s, d_in)` and offset `(s,)`, float32 on the CPU."""
        return cls(*sketch, *_sketches(statistics, sketch))

    def fingerprint(self, keys: Tensor) -> Tensor:
        """Unit-norm sketches `(n, s)` of keys `(n, d_in)`."""
        return _fingerprint(keys, self.projection, self.offset)

    def of_groups(self, keys: Tensor, sizes: Sequence[int]) -> Tensor:
        """The fingerprint of the mean of each group of keys `(n, d_in)`, `(len(sizes), s)`."""
        if not sizes:
            return torch.zeros(0, self.projection.shape[0])
        groups = keys.float().split(list(sizes))
        return self.fingerprint(torch.stack([group.mean(0) for group in groups]))

    def sinks(self, fingerprints: Tensor) -> Tensor:
        """Which fingerprints `(n, s)` belong to attention sinks, bool `(n,)`: they match first
        words regardless of which word. Any position is tested, not only the first token, because
        the sink may be a token or two further on."""
        # The cosine of unrelated directions has a standard deviation of 1 / √s.
        least = max(ALIKE, min(3 / math.sqrt(fingerprints.shape[1]), 0.95))
        alike = (self.first @ fingerprints.T >= least).sum(0)
        # One first word may be the subject itself.
        return alike > max(1, _SINK_SHARE * len(self.first))

    def distinct(self, fingerprints: Tensor, rate: float) -> Tensor:
        """Which fingerprints `(n, s)` differ from ordinary tokens and first words, bool `(n,)`."""
        allowed = int(rate * len(self.sketched))
        # In parts, because a large batch times the whole background may not fit in memory.
        ceilings = [
            (self.sketched @ some.T).topk(allowed + 1, dim=0).values[-1]
            for some in fingerprints.split(_CHUNK)
        ]
        return (torch.cat(ceilings) < _DISTINCT) & ~self.sinks(fingerprints)

    def share_alike(self, fingerprints: Tensor) -> Tensor:
        """The share of ordinary tokens with at least cosine 0.8 to each fingerprint, `(n,)`."""
        shares = [
            (self.sketched @ some.T >= _DISTINCT).float().mean(0)
            for some in fingerprints.split(_CHUNK)
        ]
        return torch.cat(shares) if shares else torch.zeros(0)


@dataclass
class LayerWriter(KeySketches):
    """What writing to one layer needs besides. solver: the layer's inverse; background: keys of
    ordinary tokens, bfloat16 `(m, d_in)`."""

    solver: RecursiveInverse
    background: Tensor

    @classmethod
    def of(
        cls,
        statistics: LayerStatistics,
        sketch: tuple[Tensor, Tensor],
        solver: RecursiveInverse,
    ) -> "LayerWriter":
        """Build one from a layer's statistics, its hook set's sketch, and its inverse."""
        found = _sketches(statistics, sketch)
        return cls(*sketch, *found, solver=solver, background=statistics.background)


def _sketches(statistics: LayerStatistics, sketch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Unit-norm sketches of ordinary tokens and of first words."""
    # From a small vocabulary the same word is drawn many times.
    first = statistics.first.float().unique(dim=0)
    return _fingerprint(statistics.background.float(), *sketch), _fingerprint(first, *sketch)
