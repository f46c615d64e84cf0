"""Facts for the real small model, and what its tests ask of it."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

import coachhook as ch
from coachhook.editor import SITES, architecture_of
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import complete, starts_with
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model
from coachhook.statistics.measure import key_statistics

FACTS = ch.load_requests(str(files("coachhook.facts") / "demo.jsonl")).requests
# As many of the same kind: common subjects, among them near neighbours of each other's.
MORE = ch.load_requests(Path(__file__).with_name("facts.jsonl")).requests
BATCH = 10


def answers(model: Any, tokenizer: Any, requests: list[EditRequest]) -> list[bool]:
    texts = complete(LanguageModel(model, tokenizer), [r.prompt for r in requests], 8)
    return [starts_with(t, r.target) for t, r in zip(texts, requests, strict=True)]


def open_in_background(editor: ch.Editor) -> float:
    """Share of background tokens that open a gate at any layer."""
    lm = load_model("smollm2")
    config = editor.hooks.config
    statistics = key_statistics(
        lm,
        architecture_of(lm.model, config),
        editor.hooks.layers,
        config.statistics,
        site=SITES[config.readout],
    )
    hooks = editor.hooks.modules(editor.model)
    opened = [hook.read(statistics[k].background.float()).is_open for k, hook in hooks.items()]
    return float(torch.stack(opened).any(0).float().mean())
