"""Target values: edits a second, ours against the published procedure, in one run.

Ours optimises all requests together, in three variants: with the default settings, with the
published procedure's prefixes, and with its prefixes and all of its steps. The same editor writes
the values of each; reliability is the share of the bare prompts' target tokens that are then first
choices.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import coachhook as ch
from bench.editing.published_values import published_value, sampled_prefixes
from coachhook.editing.values import optimise_values
from coachhook.evaluation.metrics import target_hits
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import encode_request

PREFIXES = 6
PREFIX_TOKENS = 10
PUBLISHED_STEPS = 25


def measure(
    editor: ch.Editor,
    requests: Sequence[ch.EditRequest],
    steps: int = PUBLISHED_STEPS,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """`values_speedup` and its sources: seconds an edit, final losses (nats), reliability.

    editor: without edits. steps: of the published procedure. `values_speedup_if_it_stopped`:
    against the published procedure, had it stopped at `enough` as ours does.
    """
    lm = LanguageModel(editor.model, editor.tokenizer)
    architecture = Architecture(editor.hooks.base.template)
    layer = editor.hooks.layers[-1]
    block = architecture.blocks(lm.model)[layer]
    ours = editor.hooks.config.values
    prefixes = sampled_prefixes(lm, PREFIXES, PREFIX_TOKENS, seed=0)
    theirs = replace(ours, contexts=prefixes, gain=1.0, steps=steps)
    every_step = replace(theirs, enough=-math.inf)
    settings = {
        "ours": ours,
        "ours, published prefixes": theirs,
        "ours, published prefixes, every step": every_step,
    }
    rows: dict[str, dict[str, Any]] = {}
    values: dict[str, Tensor] = {}
    with torch.inference_mode(False), editor.hooks.off(lm.model):
        for name, config in settings.items():
            started = time.perf_counter()
            optimised = optimise_values(lm, architecture, layer, requests, config)
            seconds = time.perf_counter() - started
            rows[name] = {"seconds_per_edit": seconds / len(requests)}
            rows[name]["loss"] = optimised.loss.mean().item()
            values[name] = optimised.hidden
        started = time.perf_counter()
        published = []
        for request in requests:
            published.append(published_value(lm, block, request, theirs))
            progress(1)
        seconds = time.perf_counter() - started
    rows["published"] = {"seconds_per_edit": seconds / len(requests)}
    rows["published"]["loss"] = fmean(value.loss for value in published)
    values["published"] = torch.stack([value.hidden for value in published])
    for name, row in rows.items():
        row["speedup"] = rows["published"]["seconds_per_edit"] / row["seconds_per_edit"]
        row["reliability"] = reliability(editor, requests, values[name])
    until_enough = fmean(value.seconds_to_enough for value in published)
    return {
        "values_speedup": rows["ours"]["speedup"],
        "values_speedup_if_it_stopped": until_enough / rows["ours"]["seconds_per_edit"],
        "edits": len(requests),
        "rows": rows,
    }


def reliability(editor: ch.Editor, requests: Sequence[ch.EditRequest], values: Tensor) -> float:
    """Mean share of target tokens that are first choices while `values` are written; they are
    rolled back at the end."""
    editor.edit(requests, values)
    lm = LanguageModel(editor.model, editor.tokenizer)
    hits = target_hits(lm, [encode_request(lm.tokenizer, request) for request in requests])
    editor.rollback(0)
    return fmean(hits)
