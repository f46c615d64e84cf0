"""Scores of background keys, kept from batch to batch, against comparing all with all."""

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from coachhook.editing.background_scores import BackgroundScores
from coachhook.journal.factors import LayerFactors
from coachhook.journal.journal import Journal, Verdict
from tests.support.journals import SKETCH, batch, grow_and_shrink, random_batch, tensor

LAYER = 1
SKETCHED = normalize(tensor(50, SKETCH, seed=0), dim=-1)


def from_scratch(journal: Journal) -> Tensor | None:
    standing = {edit.id for edit in journal.standing()}
    marks = [
        row
        for b in journal.batches
        for row, i in zip(b.layers[LAYER].fingerprints, b.layers[LAYER].owner, strict=True)
        if b.edits[int(i)].id in standing
    ]
    return (SKETCHED @ torch.stack(marks).T).amax(-1) if marks else None


def assert_equal(scores: Tensor | None, want: Tensor | None) -> None:
    assert (scores is None) == (want is None)
    if scores is not None and want is not None:
        # A product may sum in another order in another shape.
        torch.testing.assert_close(scores, want, rtol=0, atol=1e-6)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**30), steps=st.integers(1, 12))
def test_equals_the_full_comparison(seed: int, steps: int) -> None:
    """After corrections of corrections, failed batches, rollbacks, and in whatever order asked."""
    rng = random.Random(seed)
    journal, scores = Journal(), BackgroundScores(SKETCHED)
    for _ in range(steps):
        grow_and_shrink(journal, rng)
        if journal.batches and rng.random() < 0.8:
            assert_equal(scores.of(journal, LAYER), from_scratch(journal))
    assert_equal(BackgroundScores(SKETCHED).of(journal, LAYER), from_scratch(journal))


@pytest.mark.parametrize("refused", [False, True])
def test_a_correction_that_is_refused_after_all_takes_nothing_away(refused: bool) -> None:
    """Its threshold was measured as if it were going to stand."""
    journal, scores = Journal([batch(0)]), BackgroundScores(SKETCHED)
    correction = batch(1)
    correction.edits[0].request = journal.batches[0].edits[0].request
    journal.batches.append(correction)
    scores.of(journal, LAYER)
    if refused:
        correction.edits[0].verdict = Verdict.REFUSED
        factors = correction.layers[LAYER]
        assert isinstance(factors, LayerFactors)
        kept = factors.owner != 0
        correction.layers[LAYER] = replace(
            factors, fingerprints=factors.fingerprints[kept], owner=factors.owner[kept]
        )
    journal.batches.append(random_batch(random.Random(0), 4))
    assert_equal(scores.of(journal, LAYER), from_scratch(journal))


def test_no_fingerprint_no_score() -> None:
    given = random_batch(random.Random(1), 0)
    for edit in given.edits:
        edit.verdict = Verdict.REFUSED
    assert BackgroundScores(SKETCHED).of(Journal([given]), LAYER) is None
