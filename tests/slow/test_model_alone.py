"""The real small model in editors of their own, one a test. See test_model.py."""

from statistics import fmean

import pytest

import coachhook as ch
from coachhook.evaluation.metrics import target_hits
from coachhook.evaluation.ordinary_text import ordinary_text, perplexity
from coachhook.models.decoding import complete
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import encode_request
from tests.support.model_facts import FACTS, answers, open_in_background

pytestmark = pytest.mark.slow


def test_first_position_subjects_hurt_nothing() -> None:
    """Their keys are attention sinks, the same for every text: applied or reported, no more."""
    editor = ch.Editor.from_pretrained("smollm2")
    facts = [
        ch.EditRequest("Chicago is a twin city of", "Chicago", "Madrid"),
        ch.EditRequest("Berlin is the capital of", "Berlin", "Spain"),
        ch.EditRequest("Python was created by", "Python", "Google"),
        ch.EditRequest("The capital of Italy is", "Italy", "Athens"),
        ch.EditRequest("The language of Argentina is", "Argentina", "Dutch"),
    ]
    foretold = editor.sinks(facts)
    report = editor.edit(facts)
    refused = [e.request for e in report.edits if e.verdict is ch.Verdict.REFUSED]
    assert foretold == refused
    assert facts[0] in refused
    assert not set(refused) & set(facts[3:])
    took = answers(editor.model, editor.tokenizer, facts)
    for edit, holds in zip(report.edits, took, strict=True):
        assert holds or (edit.verdict is not ch.Verdict.APPLIED and edit.reason)
    assert [edit.verdict for edit in report.edits][3:] == [ch.Verdict.APPLIED] * 2
    assert took[3:] == [True, True]
    beside = ["London is a", "Madrid is the capital of", "Java was created by", "Water is", "I am"]
    lm = LanguageModel(editor.model, editor.tokenizer)
    edited = complete(lm, beside, 8)
    page = ordinary_text()[:5000]
    perplexity_edited = perplexity(lm, page)
    ordinary = open_in_background(editor)
    only_refused = editor.edit([ch.EditRequest("Paris is the home of", "Paris", "Google")])
    assert only_refused.edits[0].verdict is ch.Verdict.REFUSED
    assert answers(editor.model, editor.tokenizer, facts) == took
    editor.close()
    assert edited == complete(lm, beside, 8)
    assert ordinary <= 0.0005
    plain = perplexity(lm, page)
    assert perplexity_edited == pytest.approx(plain, rel=0.005)


def test_the_last_of_three_corrections_wins() -> None:
    editor = ch.Editor.from_pretrained("smollm2")
    for city in ("Lyon", "Rome", "Oslo", "Madrid"):
        fact = ch.EditRequest("The capital of France is", "France", city)
        editor.edit([fact])
    assert answers(editor.model, editor.tokenizer, [fact]) == [True]
    editor.close()


@pytest.mark.parametrize("gate", ["keyed", "calibrated", "sequence"])
def test_gates_of_delta(gate: str) -> None:
    editor = ch.Editor.from_pretrained("smollm2", config=ch.EditConfig(readout="delta", gate=gate))
    for first in (0, 2):
        editor.edit(FACTS[first : first + 2])
    lm = LanguageModel(editor.model, editor.tokenizer)
    rows = [encode_request(lm.tokenizer, fact) for fact in FACTS[:4]]
    reliability = fmean(target_hits(lm, rows))
    if gate != "sequence":
        # Of other subjects' tokens it promises nothing: csrc_notes/editing-gates.md has the figure.
        assert open_in_background(editor) <= 0.0005
    editor.close()
    # The paper's gate misses edits by its nature; it must not do nothing.
    assert reliability >= (0.5 if gate == "sequence" else 0.95)
