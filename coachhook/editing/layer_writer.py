"""What writing into one layer needs: its inverse, its fingerprints, and what is ordinary there."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook.config import EditConfig
from coachhook.editing.background_scores import BackgroundScores
from coachhook.editing.inverse import RecursiveInverse, whitening_sketch
from coachhook.statistics.measure import LayerStatistics

# A fingerprint that ordinary tokens resemble more than this (cosine, at the allowed rate of false
# alarms) is no fingerprint: attention sinks, the keys of first tokens, reach 1.
_DISTINCT = 0.8

# A key with at least this cosine to those of more than that share of first words is an attention
# sink, since by default a gate that opens at it opens at those words; in few dimensions it takes
# more.
ALIKE, _SINK_SHARE = EditConfig.resemblance, 0.01

# Fingerprints that are compared with all background keys at a time.
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
class LayerWriter:
    """What writing into one layer needs: its inverse, its sketch, and background keys.

    background bfloat16 `(m, d_in)`; sketched float32 `(m, s)`: their unit-norm sketches; first:
    unit-norm sketches of first words, float32 `(f, s)`.
    """

    solver: RecursiveInverse
    projection: Tensor
    offset: Tensor
    background: Tensor
    sketched: Tensor
    first: Tensor

    def __post_init__(self) -> None:
        self.background_scores = BackgroundScores(self.sketched)

    @classmethod
    def of(
        cls,
        statistics: LayerStatistics,
        config: EditConfig,
        sketch: tuple[Tensor, Tensor],
        solver: RecursiveInverse,
    ) -> "LayerWriter":
        """From a layer's statistics, the sketch of its hook set, and its inverse.

        sketch: projection `(s, d_in)` and offset `(s,)`, float32 on the CPU.
        """
        projection, offset = sketch
        # Of a small vocabulary the same word was drawn many times.
        first = statistics.first.float().unique(dim=0)
        return cls(
            solver=solver,
            projection=projection,
            offset=offset,
            background=statistics.background,
            sketched=_fingerprint(statistics.background.float(), projection, offset),
            first=_fingerprint(first, projection, offset),
        )

    def fingerprint(self, keys: Tensor) -> Tensor:
        """Unit-norm sketches `(n, s)` of keys `(n, d_in)`."""
        return _fingerprint(keys, self.projection, self.offset)

    def sinks(self, fingerprints: Tensor) -> Tensor:
        """Which fingerprints `(n, s)` are also those of some first words, whatever these are, bool
        `(n,)`. Not those of first tokens alone: the sink may be a token or two further on."""
        # The cosine of unrelated directions has a deviation of 1 / √s.
        least = max(ALIKE, min(3 / math.sqrt(fingerprints.shape[1]), 0.95))
        alike = (self.first @ fingerprints.T >= least).sum(0)
        # One of them may be the subject's own word.
        return alike > max(1, _SINK_SHARE * len(self.first))

    def distinct(self, fingerprints: Tensor, rate: float) -> Tensor:
        """Which fingerprints `(n, s)` stand out from ordinary tokens and first words, `(n,)`."""
        allowed = int(rate * len(self.sketched))
        # In parts: a large batch against all of the background need not fit in memory.
        ceilings = [
            (self.sketched @ some.T).topk(allowed + 1, dim=0).values[-1]
            for some in fingerprints.split(_CHUNK)
        ]
        return (torch.cat(ceilings) < _DISTINCT) & ~self.sinks(fingerprints)
