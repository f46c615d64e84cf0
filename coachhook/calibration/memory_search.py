"""The blocks of the memory readout for a model that nobody has tuned.

First the gate's block, by forward passes alone (`gate_figures`). Then probe edits for what follows
it: where a row is added, and whether several blocks are better than one. Every trial optimises its
own rows, so there are few.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from coachhook.calibration.gate_figures import GateFigures, chosen_gate, gate_figures
from coachhook.calibration.gate_probes import GateProbes
from coachhook.calibration.probe_edits import Probes
from coachhook.calibration.profiles import MemorySettings, identity_of_blocks
from coachhook.calibration.trials import (
    Calibration,
    Trial,
    best_of,
    check_minutes,
    profile_of,
    try_out,
    untried,
)
from coachhook.config import EditConfig
from coachhook.editing.values import check_attention, optimise_shifts
from coachhook.editor import Editor
from coachhook.models.architecture import Architecture, check_layers, memory_blocks
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import eval_mode
from coachhook.plan import Sizes, statistics_plan
from coachhook.statistics.measure import KeyStatistics, key_statistics
from coachhook.statistics.source import StatisticsSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SHALLOWEST, _DEEPEST, _MOST_CANDIDATES = 0.05, 0.6, 12
# Depths of the last write block beside the default one, and how far beside the best is tried.
_DEPTHS, _BESIDE = (0.28, 0.5), 0.05
_SEVERAL = 3
MOST_TRIALS = 1 + len(_DEPTHS) + 2 + 1


def gate_candidates(n_blocks: int, most: int = _MOST_CANDIDATES) -> tuple[int, ...]:
    """The blocks that are worth a gate: at most `most`, evenly spread from 5 % to 60 % of the
    depth, among them that of `memory_blocks`."""
    first, last = int(_SHALLOWEST * n_blocks), min(max(1, int(_DEEPEST * n_blocks)), n_blocks - 1)
    default, _ = memory_blocks(n_blocks)
    apart = (last - first) / max(1, most - 1)
    spread = {first + round(i * apart) for i in range(most)} if last - first >= most else None
    chosen = sorted(spread or range(first, last + 1))
    if default not in chosen:
        nearest = min(chosen, key=lambda block: abs(block - default))
        chosen[chosen.index(nearest)] = default
    return tuple(chosen)


def gates_to_read(
    model: PreTrainedModel,
    architecture: Architecture,
    layers: Sequence[int] | None,
    source: StatisticsSource,
) -> tuple[int, ...]:
    """The gate's block of `layers`, or as many candidates as have statistics that fit in half of
    the free memory. Raises `ConfigError` for blocks that the model does not have."""
    n_blocks = len(architecture.blocks(model))
    if layers is not None:
        return check_layers(layers, n_blocks)[:1]
    one = statistics_plan(Sizes.of(model, architecture, "ffn"), [0], source)
    staying = sum(part.n_bytes for part in one.parts if not part.passing)
    most = one.free["cpu"] // 2 // max(1, staying)
    return gate_candidates(n_blocks, max(1, min(_MOST_CANDIDATES, most)))


def write_candidates(
    n_blocks: int, gate: int, trials: Sequence[Trial]
) -> Iterator[tuple[int, ...]]:
    """Write blocks worth a trial behind the gate at block `gate`, the default's first. The caller
    must add the trial of each to `trials` before it asks for the next; the search ends early when a
    trial is perfect."""
    tried: list[tuple[int, ...]] = []

    def at(depth: float) -> int:
        return max(gate, min(round(depth * n_blocks), n_blocks - 1))

    def best() -> tuple[int, ...]:
        return tried[list(trials).index(best_of(trials))]

    def rounds() -> Iterator[list[tuple[int, ...]]]:
        _, (default,) = memory_blocks(n_blocks)
        yield [(block,) for block in (max(gate, default), *map(at, _DEPTHS))]
        step, last = max(1, round(_BESIDE * n_blocks)), best()[-1]
        yield [(block,) for block in (last - step, last + step) if gate <= block < n_blocks]
        last = best()[-1]
        several = (last - i * step for i in reversed(range(_SEVERAL)))
        yield [tuple(block for block in several if block >= gate)]

    return untried(rounds(), tried, trials)


def calibrate_memory(
    lm: LanguageModel,
    *,
    layers: Sequence[int] | None,
    template: str | None,
    source: StatisticsSource,
    minutes: float,
) -> Calibration[GateFigures]:
    """See `coachhook.calibration.search.calibrate`."""
    check_minutes(minutes)
    started = time.monotonic()
    config = EditConfig(readout="memory", template=template, statistics=source)
    architecture = Architecture.of_blocks(lm.model, template)
    blocks = architecture.blocks(lm.model)
    candidates = gates_to_read(lm.model, architecture, layers, source)
    written = () if layers is None else check_layers(layers, len(blocks))[1:]
    check_attention(blocks)
    with eval_mode(lm.model):
        probes = Probes.of(lm, config.values.contexts)
        statistics = key_statistics(lm, architecture, candidates, source, site="ffn")
        gate_probes = GateProbes.of(lm, probes.requests)
        figures = gate_figures(lm, architecture, statistics, gate_probes, config)
        usual, _ = memory_blocks(len(blocks))
        gate = chosen_gate(figures, len(gate_probes.requests), usual)
        own = {gate.block: statistics[gate.block]}
        trials: list[Trial] = []
        choices = iter([written]) if written else write_candidates(len(blocks), gate.block, trials)

        def trial(write_blocks: tuple[int, ...]) -> Trial:
            settings = MemorySettings(gate.block, write_blocks, round(gate.least, 3))
            return _trial(lm, settings.applied(config), settings, own, probes)

        cut_short = try_out(choices, trial, trials, MOST_TRIALS, started + 60 * minutes)
    seconds = time.monotonic() - started
    identity = identity_of_blocks(lm.model, architecture)
    counts = {"probes": len(probes.requests), **gate_probes.counts}
    profile = profile_of(lm.model, identity, trials, counts, seconds)
    return Calibration(profile, figures, trials, seconds, cut_short)


def _trial(
    lm: LanguageModel,
    config: EditConfig,
    settings: MemorySettings,
    statistics: KeyStatistics,
    probes: Probes,
) -> Trial:
    """Edit all probes in one batch, and score the model."""
    started = time.monotonic()
    requests = probes.requests
    shifts = optimise_shifts(
        lm,
        Architecture.of_blocks(lm.model, config.template),
        settings.write_blocks,
        requests,
        range(len(requests)),
        # As in editing: a whole row reaches every open token.
        replace(config.values, gain=1.0),
    )
    with Editor.from_pretrained(*lm, config=config, statistics=statistics) as editor:
        editor.edit(requests, shifts.shift)
        scores = probes.scores(lm)
    return Trial(settings, scores, time.monotonic() - started)
