"""What one batch of target values becomes in one layer, against the closed form."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from coachhook import EditConfig, EditRequest, StatisticsSource, ValueConfig
from coachhook.editing.contexts import Contexts
from coachhook.editing.inverse import RecursiveInverse
from coachhook.editing.layer_writer import LayerWriter
from coachhook.editing.write_batch import _solve
from coachhook.editor import Editor
from coachhook.models.architecture import Architecture
from coachhook.statistics.measure import key_statistics
from tests.support.closed_form import D_IN, closed_form, moment, random, relative_error, weighted
from tests.support.tiny import TARGETS, tiny_lm, tiny_model

LAYER = 1
WEIGHT = 0.09
CONFIG = EditConfig(
    readout="delta",
    layers=(LAYER,),
    preservation=1.0,
    context_weight=WEIGHT,
    false_alarms=0.05,
    statistics=StatisticsSource(n_tokens=1024),
    values=ValueConfig(steps=2),
)
BATCHES = [
    [EditRequest("The capital of {}", "France", TARGETS[0])],
    [EditRequest("We think of {}", "Brazil", TARGETS[1])],
]


def test_keys_under_contexts_count_by_their_weight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    lm = tiny_lm(tiny_model("llama"))
    statistics = key_statistics(lm, Architecture.of(lm.model), (LAYER,), CONFIG.statistics)
    accumulated = weighted(statistics[LAYER].moment, CONFIG.preservation)
    with Editor.from_pretrained(*lm, config=CONFIG, statistics=statistics) as editor:
        hook = editor.hooks.modules(lm.model)[LAYER]
        for number, requests in enumerate(BATCHES):
            contexts = Contexts.of(lm, requests, CONFIG.values.contexts)
            (keys,), _ = contexts.read(lm.model, [hook], 1024)
            editor.edit(requests)
            factors = editor.hooks.journal.batches[number].layers[LAYER]
            weights = torch.tensor([1.0, WEIGHT, WEIGHT])[:, None]
            columns = weights.sqrt() * keys
            torch.testing.assert_close(factors.keys, columns)
            # Σ w k, times fit, behind the inverse of all that counts.
            want = (weights.sqrt() * closed_form(accumulated, columns, CONFIG.fit)).sum(0)
            assert relative_error(factors.solutions[0].double(), want) <= 1e-5
            accumulated = accumulated + columns.double().T @ columns.double()


@pytest.mark.parametrize("size", [8, 16, 32, 64])
def test_a_sink_is_what_first_words_share_and_not_what_a_small_sketch_confuses(size: int) -> None:
    first = normalize(random(1000, size, seed=1, dtype=torch.float32), dim=-1)
    first[:12] = first[0]
    writer = LayerWriter(
        solver=RecursiveInverse(moment(), 1.0),
        projection=torch.eye(size),
        offset=torch.zeros(size),
        background=torch.zeros(1, size),
        sketched=torch.zeros(1, size),
        first=first,
    )
    others = normalize(random(500, size, seed=2, dtype=torch.float32), dim=-1)
    assert writer.sinks(torch.cat([first[:1], others])).tolist() == [True, *[False] * 500]


@pytest.mark.parametrize("like", ["ordinary tokens", "first words"])
def test_they_stand_in_for_a_bare_key_that_is_not_distinct(like: str) -> None:
    writer = LayerWriter(
        solver=RecursiveInverse(moment(), 1.0),
        projection=torch.eye(D_IN),
        offset=torch.zeros(D_IN),
        background=torch.zeros(1, D_IN),
        sketched=torch.zeros(4, D_IN),
        first=torch.zeros(100, D_IN),
    )
    keys = random(6, D_IN, seed=1, dtype=torch.float32)
    # Two edits in three contexts. What the second edit's bare prompt must not look like does: all
    # of the ordinary tokens, two of a hundred first words.
    others = writer.sketched if like == "ordinary tokens" else writer.first[:2]
    others[:] = keys[1] / keys[1].norm()
    factors = _solve(writer, keys, torch.ones(2, 3), CONFIG, rate=0.1)
    lengths = torch.tensor([1.0, WEIGHT**0.5, 1.0, WEIGHT**0.5, 1.0])[:, None]
    torch.testing.assert_close(factors.keys, lengths * keys[[0, 2, 3, 4, 5]])
    assert sorted(factors.owner.tolist()) == [0, 0, 1]


def test_a_folder_that_does_not_say_weighed_all_keys_alike() -> None:
    data = CONFIG.to_dict()
    assert EditConfig.from_dict(data) == CONFIG
    del data["context_weight"]
    assert EditConfig.from_dict(data).context_weight == 1
