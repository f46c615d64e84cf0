"""Commands that read a model before it is edited: key statistics, and settings that suit it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coachhook.cli.arguments import Json, Layers, Model, Template, TextFile, checked, parse_layers
from coachhook.cli.views.console import show, tell
from coachhook.cli.views.preparation import calibration_view, statistics_entries, statistics_view


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
    layers: Layers = None,
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
    from dataclasses import asdict

    from coachhook.calibration import profiles
    from coachhook.calibration.probe_edits import probe_requests
    from coachhook.calibration.search import MOST_TRIALS, layers_to_read
    from coachhook.calibration.search import calibrate as search
    from coachhook.models.architecture import Architecture
    from coachhook.models.loading import load_model
    from coachhook.plan import Sizes, calibration_plan, check_weights
    from coachhook.statistics.source import StatisticsSource

    chosen = parse_layers(layers)
    source = StatisticsSource(None if text is None else str(text.resolve()))
    check_weights(model)
    lm = load_model(model)
    architecture = Architecture.of(lm.model, template)
    read = layers_to_read(lm.model, architecture, chosen, source)
    sizes = Sizes.of(lm.model, architecture)
    needed = calibration_plan(sizes, read, source, lm.tokenizer, probe_requests(), MOST_TRIALS)
    plan = checked(needed, shown=not as_json)
    result = search(lm, layers=chosen, template=template, source=source, minutes=budget)
    path = output or profiles.default_path(result.profile.identity)
    profiles.save(result.profile, path)
    if not result.took:
        tell(
            "warning: under no settings did half of the probe edits take; these are the best found"
        )
    document = {
        "model": model,
        "profile": str(path),
        "plan": plan,
        "settings": result.profile.to_dict()["settings"],
        "layers": [asdict(layer) for layer in result.layers],
        "trials": [asdict(trial) for trial in result.trials],
        "seconds": result.seconds,
        "cut_short": result.cut_short,
    }
    show(document, calibration_view, as_json=as_json)
