"""Settings for a model that nobody has tuned, found by background keys and by probe edits.

First the keys alone (`separability`): at which layers, and with which size of fingerprint, subjects
differ from ordinary text and from each other. Then probe edits, from coarse to fine: the last
hooked layer, how many layers are hooked, λ, the neighbouring last layers, the clamp. Each trial
changes one setting of the best so far; trials that end at the same layer with the same clamp share
their target values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coachhook.calibration.memory_search import calibrate_memory
from coachhook.calibration.probe_edits import Probes
from coachhook.calibration.profiles import Settings, identity
from coachhook.calibration.separability import (
    SIZES,
    Cosines,
    ProbeSketches,
    Separation,
    probe_sketches,
    separation,
    sink_share,
)
from coachhook.calibration.trials import (
    MINUTES,
    Calibration,
    Trial,
    check_minutes,
    profile_of,
    try_out,
    untried,
)
from coachhook.config import EditConfig
from coachhook.editing.values import optimise_values
from coachhook.editor import Editor
from coachhook.models.architecture import Architecture, check_layers
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import eval_mode
from coachhook.plan import MOST_HOOKED, Sizes, statistics_plan
from coachhook.statistics.measure import KeyStatistics, key_statistics
from coachhook.statistics.source import StatisticsSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Too few blocks remain above a layer in the upper half for a value to act on
# (csrc_notes/editing-capacity.md).
_SHALLOWEST, _DEEPEST, _MOST_CANDIDATES = 0.1, 0.6, 24
# A larger fingerprint must separate better by this much; a layer may separate worse by that much,
# because later layers make values that generalise better.
_WORTHWHILE, _ACCEPTABLE = 0.02, 0.25
_COUNTS = (3, 1, MOST_HOOKED)
# λ is set by the freedom p = kᵀ (λ C₀)⁻¹ k of an average probe's key, which has no unit. Where p
# is far below 1, preserving ordinary text leaves an edit little room.
_FREEDOM, _COARSE, _FINE = 100.0, 10.0, 3.0
_CLAMPS = (0.5, 2.0)
# Shares of ordinary tokens that may open a gate; a larger one must separate better to be taken.
_RATES = (EditConfig.false_alarms, 3e-3)
MOST_TRIALS = 13


@dataclass(frozen=True)
class LayerFigures:
    """What the keys of one layer show before any edit: see `Separation`, `sink_share` and
    `ProbeSketches`. sizes: the best recall - firing at each size of fingerprints."""

    layer: int
    separation: Separation
    sizes: dict[int, float]
    sinks: float
    leverage: float


def candidate_layers(n_blocks: int, most: int = _MOST_CANDIDATES) -> tuple[int, ...]:
    """The blocks whose keys are worth reading: at most `most`, evenly spread from a tenth to six
    tenths of the depth."""
    first, last = int(_SHALLOWEST * n_blocks), max(1, int(_DEEPEST * n_blocks))
    window = range(first, min(last, n_blocks - 1) + 1)
    stride = -(-len(window) // max(1, most))
    return tuple(window[stride - 1 :: stride])


def layers_to_read(
    model: PreTrainedModel,
    architecture: Architecture,
    layers: Sequence[int] | None,
    source: StatisticsSource,
) -> tuple[int, ...]:
    """`layers`, or as many candidates as have statistics that fit in half of the free memory."""
    n_blocks = len(architecture.blocks(model))
    if layers is not None:
        return check_layers(layers, n_blocks)
    one = statistics_plan(Sizes.of(model, architecture), [0], source)
    staying = sum(part.n_bytes for part in one.parts if not part.passing)
    return candidate_layers(
        n_blocks, min(_MOST_CANDIDATES, one.free["cpu"] // 2 // max(1, staying))
    )


def calibrate(
    lm: LanguageModel,
    *,
    readout: str = EditConfig.readout,
    layers: Sequence[int] | None = None,
    template: str | None = None,
    source: StatisticsSource | None = None,
    minutes: float = MINUTES,
) -> Calibration[Any]:
    """Find settings for `lm` under `readout`; the figures of the layers are `LayerFigures`, under
    "memory" `GateFigures`.

    layers: the blocks to hook; under "memory" the first is the gate's and any others are written
    to. What is not given is searched as well. minutes: about how long the search may take; it
    always makes one trial. Raises `ConfigError` for a budget below 0 or an unknown readout,
    `ModelError` for blocks in which no values can be optimised, and what `check_layers`,
    `key_statistics` and `Probes.of` raise.
    """
    source = source or StatisticsSource()
    if readout == "memory":
        return calibrate_memory(
            lm, layers=layers, template=template, source=source, minutes=minutes
        )
    check_minutes(minutes)
    started = time.monotonic()
    config = EditConfig(readout=readout, template=template, statistics=source)
    architecture = Architecture.of(lm.model, template)
    candidates = layers_to_read(lm.model, architecture, layers, config.statistics)
    fixed = None if layers is None else candidates
    with eval_mode(lm.model):
        probes = Probes.of(lm, config.values.contexts)
        bench = _Bench(lm, architecture, config, probes)
        bench.read(candidates)
        figures = bench.figures()
        trials: list[Trial] = []
        choices = _search(bench, fixed, trials)
        cut_short = try_out(choices, bench.trial, trials, MOST_TRIALS, started + 60 * minutes)
    seconds = time.monotonic() - started
    counts = {"probes": len(probes.requests)}
    profile = profile_of(lm.model, identity(lm.model, architecture), trials, counts, seconds)
    return Calibration(profile, figures, trials, seconds, cut_short)


@dataclass(frozen=True)
class _Choice:
    """What the search varies; a trial's other settings follow from the keys."""

    layers: tuple[int, ...]
    freedom: float = _FREEDOM
    clamp: float = 1.0


def _search(bench: _Bench, fixed: tuple[int, ...] | None, trials: list[Trial]) -> Iterator[_Choice]:
    """Choices worth a trial, from coarse to fine. The caller must add the trial of each choice to
    `trials` before it asks for the next; the search ends early when a trial is perfect."""
    tried: list[_Choice] = []

    def best() -> _Choice:
        return tried[max(range(len(trials)), key=lambda i: trials[i].scores.rank)]

    def rounds() -> Iterator[list[_Choice]]:
        if fixed is None:
            lasts = bench.last_layers()
            bench.keep(range(max(0, lasts[-1] - max(_COUNTS) + 1), lasts[0] + 2))
            yield [_Choice(_ending_at(last, _COUNTS[0])) for last in lasts]
            yield [replace(best(), layers=_ending_at(best().layers[-1], n)) for n in _COUNTS[1:]]
        else:
            yield [_Choice(fixed)]
        for factor in (_COARSE, _FINE):
            freedom = best().freedom
            yield [replace(best(), freedom=f) for f in (freedom / factor, freedom * factor)]
        # Choices that need new target values come last, since the time may run out.
        if fixed is None:
            last, count = best().layers[-1], len(best().layers)
            near = [i for i in (last - 1, last + 1) if bench.acceptable(i)]
            yield [replace(best(), layers=_ending_at(i, count)) for i in near]
        yield [replace(best(), clamp=clamp) for clamp in _CLAMPS]

    return untried(rounds(), tried, trials)


def _ending_at(last: int, count: int) -> tuple[int, ...]:
    return tuple(range(max(0, last - count + 1), last + 1))


class _Bench:
    """The model and the probes, with everything measured so far."""

    def __init__(
        self,
        lm: LanguageModel,
        architecture: Architecture,
        config: EditConfig,
        probes: Probes,
    ) -> None:
        self.lm, self.architecture = lm, architecture
        self.config, self.probes = config, probes
        self.statistics: KeyStatistics = {}
        self.sketches: dict[int, ProbeSketches] = {}
        self._cosines: dict[tuple[int, int], Cosines] = {}
        self._values: dict[tuple[int, float], Tensor] = {}

    def read(self, layers: Sequence[int]) -> None:
        """Measure the statistics and sketches of those `layers` that have none yet."""
        missing = [layer for layer in layers if layer not in self.statistics]
        if missing:
            measured = key_statistics(self.lm, self.architecture, missing, self.config.statistics)
            self.statistics |= measured
            self.sketches |= probe_sketches(
                self.lm,
                self.architecture,
                measured,
                self.probes.requests,
                self.config.values.contexts,
            )

    def keep(self, layers: Sequence[int]) -> None:
        """Measure those `layers` that the model has, and drop the statistics of all others."""
        n_blocks = len(self.architecture.blocks(self.lm.model))
        wanted = [layer for layer in layers if layer < n_blocks]
        self.statistics = {k: v for k, v in self.statistics.items() if k in wanted}
        self.read(wanted)

    def figures(self) -> list[LayerFigures]:
        """Figures of the layers read so far. Sets `self.size`, the size of the fingerprints."""
        values = {
            layer: {size: self._separation(layer, size).value for size in SIZES}
            for layer in self.sketches
        }
        # Layers that are unusable at every size have no vote on the size.
        best = max(max(value.values()) for value in values.values())
        usable = [v for v in values.values() if max(v.values()) >= best - _ACCEPTABLE]
        mean = {size: fmean(value[size] for value in usable) for size in SIZES}
        self.size = next(size for size in SIZES if mean[size] >= max(mean.values()) - _WORTHWHILE)
        return [
            LayerFigures(
                layer=layer,
                separation=self._separation(layer, self.size),
                sizes=values[layer],
                sinks=sink_share(sketches, self.size),
                leverage=sketches.leverage,
            )
            for layer, sketches in self.sketches.items()
        ]

    def last_layers(self) -> list[int]:
        """At most three acceptable last layers, deepest first, since values generalise better at
        deeper layers; further apart in deeper models."""
        usable = [layer for layer in self.sketches if self.acceptable(layer)]
        apart = max(1, round(len(self.architecture.blocks(self.lm.model)) / 15))
        lasts = [usable[-1]]
        for layer in reversed(usable):
            if len(lasts) < 3 and layer <= lasts[-1] - apart:
                lasts.append(layer)
        return lasts

    def acceptable(self, last: int) -> bool:
        """Whether keys at `last` tell subjects apart nearly as well as at the best layer."""
        if last not in self.sketches:
            return False
        values = {layer: self._separation(layer, self.size).value for layer in self.sketches}
        return values[last] >= max(values.values()) - _ACCEPTABLE

    def _separation(self, layer: int, size: int) -> Separation:
        return separation([self._at(layer, size)], self.config.false_alarms / _COUNTS[0])

    def _at(self, layer: int, size: int) -> Cosines:
        if (layer, size) not in self._cosines:
            self._cosines[layer, size] = Cosines.of(self.sketches[layer], size)
        return self._cosines[layer, size]

    def trial(self, choice: _Choice) -> Trial:
        """Edit all probes in one batch with the settings of `choice`, and score the model."""
        started = time.monotonic()
        self.read(choice.layers)
        settings = self._settings(choice)
        config = settings.applied(self.config)
        values = self._target_values(choice, config)
        statistics = {layer: self.statistics[layer] for layer in choice.layers}
        with Editor.from_pretrained(*self.lm, config=config, statistics=statistics) as editor:
            editor.edit(self.probes.requests, values)
            scores = self.probes.scores(self.lm)
        return Trial(settings, scores, time.monotonic() - started)

    def _target_values(self, choice: _Choice, config: EditConfig) -> Tensor:
        key = (choice.layers[-1], choice.clamp)
        if key not in self._values:
            self._values[key] = optimise_values(
                self.lm,
                self.architecture,
                choice.layers[-1],
                self.probes.requests,
                config.values,
            ).hidden
        return self._values[key]

    def _settings(self, choice: _Choice) -> Settings:
        """λ from the leverage of the probes, the gate's floor from their cosines."""
        cosines = [self._at(layer, self.size) for layer in choice.layers]
        leverage = fmean(self.sketches[layer].leverage for layer in choice.layers)
        by_rate = {rate: separation(cosines, rate / len(cosines)) for rate in _RATES}
        most = max(separated.value for separated in by_rate.values())
        rate = next(rate for rate in _RATES if by_rate[rate].value >= most - _WORTHWHILE)
        return Settings(
            layers=choice.layers,
            # The probes cannot resolve more than two significant figures.
            preservation=float(f"{leverage / choice.freedom:.2g}"),
            clamp=choice.clamp,
            fingerprint_size=self.size,
            resemblance=by_rate[rate].floor,
            false_alarms=rate,
        )
