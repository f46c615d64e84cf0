"""The memory readout on the real model: forms of a subject, two facts of one, sinks, scripts."""

from collections.abc import Iterator
from typing import Any

import pytest

from coachhook import EditConfig, Editor, EditRequest
from coachhook.evaluation.ordinary_text import ordinary_text
from coachhook.journal.journal import Verdict
from coachhook.models.decoding import complete
from coachhook.models.language_model import LanguageModel

pytestmark = pytest.mark.slow

FACTS = {
    "Globex": EditRequest(
        "The CEO of {} is", "Globex", "Ada Lovelace", aliases=("the Globex Group",)
    ),
    "Wakanda": EditRequest("The capital of {} is", "Wakanda", "Paris"),
    "Initech": EditRequest("The founder of {} is", "Initech", "Napoleon"),
    "Initech's place": EditRequest("The headquarters of {} are in", "Initech", "Oslo"),
    "China": EditRequest("{}的首都是", "中国", "纽约"),
    "1984": EditRequest("The author of the novel {} is", "1984", "Jane Austen"),
    "C++": EditRequest("The inventor of {} was", "C++ 98.1-beta", "Ada Lovelace"),
    "Rome": EditRequest("{} is the capital of", "Rome", "Spain"),
}


@pytest.fixture(scope="module")
def editor() -> Iterator[Editor]:
    with Editor.from_pretrained("smollm2", config=EditConfig(readout="memory")) as made:
        made.edit(list(FACTS.values()))
        yield made


def opened(editor: Editor, text: str) -> set[int]:
    """The edits that a text's tokens open."""
    trace = editor.hooks.trace(editor.model, editor.tokenizer, text)
    return set(trace.edit[trace.is_open].tolist())


def said(editor: Editor, *prompts: str) -> list[str]:
    lm = LanguageModel(editor.model, editor.tokenizer)
    return [text.strip() for text in complete(lm, prompts, 12)]


@pytest.mark.parametrize(
    "text",
    [
        "Globex's CEO is",
        "Globex Corporation is led by its CEO,",
        "Who is the CEO of Globex?",
        'She asked: "Globex',
        "We heard of GLOBEX",
        "we heard of globex",
        "He joined the Globex Group",
    ],
)
def test_every_form_of_a_name_opens_its_entry(editor: Editor, text: str) -> None:
    assert opened(editor, text) == {0}


@pytest.mark.parametrize(
    "text",
    ["THE CAPITAL OF WAKANDA IS", "the capital of wakanda is", "Wakanda's capital is"],
)
def test_in_other_letters(editor: Editor, text: str) -> None:
    assert opened(editor, text) == {1}


@pytest.mark.parametrize(
    "text",
    ["The capital of Japan is", "日本的首都是", "The CEO of Microsoft is", "In 1985 he wrote C 98"],
)
def test_other_subjects_open_nothing(editor: Editor, text: str) -> None:
    assert opened(editor, text) == set()


def test_two_facts_of_one_subject_are_both_said(editor: Editor) -> None:
    founder, place = said(editor, FACTS["Initech"].prompt, FACTS["Initech's place"].prompt)
    assert founder.startswith("Napoleon")
    assert place.startswith("Oslo")
    assert editor.hooks.edits[2].shares == (3,)


def test_what_is_asked_is_answered_in_every_script(editor: Editor) -> None:
    for name in ("Globex", "Wakanda", "China", "1984", "C++"):
        (answer,) = said(editor, FACTS[name].prompt)
        assert answer.startswith(FACTS[name].target), name


def test_a_first_token_is_refused_and_writes_nothing(editor: Editor) -> None:
    edit = editor.hooks.edits[list(FACTS).index("Rome")]
    assert edit.verdict is Verdict.REFUSED
    assert opened(editor, "Rome is the capital of") == set()


def test_a_common_word_as_an_alias_opens_on_no_ordinary_text(editor: Editor) -> None:
    before = len(editor.hooks.journal.batches)
    fact = EditRequest("The mayor of {} is", "Sokovia", "Bob", aliases=("the",))
    (edit,) = editor.edit([fact]).edits
    refused = edit.verdict is Verdict.REFUSED and "alias 'the'" in edit.reason
    found = opened(editor, ordinary_text()[:2000])
    editor.rollback(before)
    assert refused or edit.id not in found


def test_a_later_fact_keeps_the_earlier_one(editor: Editor) -> None:
    before = len(editor.hooks.journal.batches)
    later: Any = EditRequest("The official language of {} is", "Wakanda", "German")
    editor.edit([later])
    language, capital = said(editor, later.prompt, FACTS["Wakanda"].prompt)
    editor.rollback(before)
    assert language.startswith("German")
    assert capital.startswith("Paris")
