"""Commands that read a model before it is edited: key statistics, and settings that suit it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coachhook.cli.arguments import (
    Json,
    Layers,
    Model,
    Readout,
    Template,
    TextFile,
    checked,
    parse_layers,
)
from coachhook.cli.views.calibration import VIEWS
from coachhook.cli.views.console import show, tell
from coachhook.cli.views.preparation import statistics_entries, statistics_view

if TYPE_CHECKING:
    from coachhook.calibration.trials import Calibration
    from coachhook.config import EditConfig
    from coachhook.models.language_model import LanguageModel
    from coachhook.plan import Plan


def statistics(
    model: Model,
    layers: Layers = None,
    template: Template = None,
    text: TextFile = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of text to read; without it, 8 a dimension and 16,384 at least."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure the key statistics that editing needs, or find them in the cache.

    Several processes share the work: torchrun --nproc-per-node 2 -m coachhook statistics …
    """
    from coachhook.models.architecture import Architecture, check_layers, default_layers
    from coachhook.models.loading import load_model
    from coachhook.plan import Sizes, check_weights, statistics_plan
    from coachhook.statistics.measure import key_statistics
    from coachhook.statistics.source import StatisticsSource
    from coachhook.system.processes import joined

    chosen = parse_layers(layers)
    source = StatisticsSource(None if text is None else str(text.resolve()), tokens)
    check_weights(model)
    with joined() as processes:
        lm = load_model(model)
        architecture = Architecture.of(lm.model, template)
        n_blocks = len(architecture.blocks(lm.model))
        hooked = check_layers(chosen or default_layers(n_blocks), n_blocks)
        plan = checked(
            statistics_plan(Sizes.of(lm.model, architecture), hooked, source),
            shown=processes.is_first and not as_json,
        )
        measured = key_statistics(lm, architecture, hooked, source, processes)
        if processes.is_first:
            document = {"model": model, "plan": plan, "layers": statistics_entries(measured)}
            show(document, statistics_view, as_json=as_json)


def calibrate(
    model: Model,
    readout: Readout = "delta",
    layers: Annotated[
        str | None,
        typer.Option(
            help="Blocks to hook: 8,9,10 or 8-12; under memory the gate's, then those written to."
        ),
    ] = None,
    template: Template = None,
    text: TextFile = None,
    budget: Annotated[
        float, typer.Option(min=0, help="Minutes; it ends at the first trial after them.")
    ] = 6,
    output: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write the profile here; 'edit' must then be told."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the settings that suit a model by probe edits; 'edit' uses them from then on."""
    from coachhook.calibration import profiles
    from coachhook.calibration.search import calibrate as search
    from coachhook.config import EditConfig, readout_of
    from coachhook.models.loading import load_model
    from coachhook.plan import check_weights
    from coachhook.statistics.source import StatisticsSource

    chosen = parse_layers(layers)
    source = StatisticsSource(None if text is None else str(text.resolve()))
    config = EditConfig(readout=readout_of(readout, chosen), template=template, statistics=source)
    check_weights(model)
    lm = load_model(model)
    plan = checked(_calibration_plan(lm, config, chosen), shown=not as_json)
    result = search(
        lm,
        readout=config.readout,
        layers=chosen,
        template=template,
        source=source,
        minutes=budget,
    )
    path = output or profiles.default_path(result.profile.identity)
    profiles.save(result.profile, path)
    if not result.took:
        tell(
            "warning: under no settings did half of the probe edits take; these are the best found"
        )
    document = {
        "model": model,
        "readout": config.readout,
        "profile": str(path),
        "plan": plan,
        **_calibration_entries(result),
    }
    show(document, VIEWS[config.readout], as_json=as_json)


def _calibration_plan(
    lm: LanguageModel, config: EditConfig, layers: tuple[int, ...] | None
) -> Plan:
    """What a search under the readout of `config` will need."""
    from coachhook.calibration import memory_search, search
    from coachhook.calibration.probe_edits import probe_requests
    from coachhook.editor import SITES, architecture_of, placed
    from coachhook.memory_plan import memory_calibration_plan
    from coachhook.plan import Sizes, calibration_plan

    architecture, source = architecture_of(lm.model, config), config.statistics
    sizes = Sizes.of(lm.model, architecture, SITES[config.readout])
    probes = probe_requests()
    if config.readout == "memory":
        gates = memory_search.gates_to_read(lm.model, architecture, layers, source)
        given = (placed(config, lm.model), lm.tokenizer, probes, memory_search.MOST_TRIALS)
        return memory_calibration_plan(sizes, gates, *given)
    read = search.layers_to_read(lm.model, architecture, layers, source)
    return calibration_plan(sizes, read, source, lm.tokenizer, probes, search.MOST_TRIALS)


def _calibration_entries(result: Calibration[Any]) -> dict[str, Any]:
    """What a search saw and chose."""
    from dataclasses import asdict

    return {
        "settings": result.profile.to_dict()["settings"],
        "figures": dict(result.profile.figures),
        "layers": [asdict(layer) for layer in result.layers],
        "trials": [asdict(trial) for trial in result.trials],
        "seconds": result.seconds,
        "cut_short": result.cut_short,
    }
