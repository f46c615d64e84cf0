"""Writing under the memory readout: forms, rivals, thresholds, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import normalize

from coachhook import EditConfig, Editor, EditRequest, StatisticsSource, ValueConfig
from coachhook.config import MemoryConfig
from coachhook.editing.forms import forms_of, rivals_of
from coachhook.editing.memory_writing import _between, ceiling
from coachhook.errors import ConfigError, RequestError
from coachhook.facts.request import check_aliases
from coachhook.journal.journal import Verdict
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

LM = tiny_lm(tiny_model("llama"))
FACT = EditRequest("They moved to {}", "New France", TARGETS[0])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


def shown(row: Any) -> str:
    text: str = tiny_tokenizer().decode(row.ids[: row.subject + 1])
    return text


def test_a_name_is_met_bare_in_a_sentence_at_starts_in_both_cases_and_under_aliases() -> None:
    request = EditRequest("They moved to {} then", "New France", TARGETS[0], aliases=("Québec",))
    config = MemoryConfig(contexts=("we saw {}", "of {}!"), starts=("\n{}", "({}"))
    found = [
        (form.alias, [shown(row) for row in form.rows]) for form in forms_of(LM, [request], config)
    ]
    assert found == [
        (None, ["They moved to New France"]),
        (None, ["we saw New France", "of New France"]),
        (None, ["\nNew France", "(New France"]),
        (None, ["New France"]),
        (None, ["we saw NEW FRANCE", "of NEW FRANCE"]),
        (None, ["we saw new france", "of new france"]),
        ("Québec", ["we saw Québec", "of Québec"]),
        ("Québec", ["\nQuébec", "(Québec"]),
        ("Québec", ["Québec"]),
    ]


def test_a_name_of_one_token_is_not_read_as_the_first_of_a_text() -> None:
    request = EditRequest("They moved to {}", "X", TARGETS[0])
    config = MemoryConfig(contexts=("we saw {}",), starts=("\n{}",))
    shown_rows = [[shown(row) for row in form.rows] for form in forms_of(LM, [request], config)]
    assert shown_rows == [["They moved to X"], ["we saw X"], ["\nX"], ["we saw x"]]


RIVALS = MemoryConfig(contexts=("we saw {}", "of {}"), rivals=3)


def rival_names(subjects: list[str], others: list[str]) -> list[tuple[int, str]]:
    requests = [EditRequest("They saw {} today", subject, TARGETS[0]) for subject in subjects]
    return [(rival.request, rival.name) for rival in rivals_of(LM, requests, others, RIVALS)]


def test_rivals_end_alike_and_begin_as_others() -> None:
    others = ["Anna Blue", "Otto von Grau", "Ida Blue", "Rome"]
    found = rival_names(["Anna Blue", "Rome"], others)
    # Of one word, nothing is left to change; and Ida Blue is another's own name.
    assert {number for number, _ in found} == {0}
    assert found[0] == (0, "Otto von Blue")
    assert len(found) == 3
    assert all(name.endswith(" Blue") and name not in others for _, name in found)


def test_rivals_are_made_of_our_own_names_where_there_are_no_others() -> None:
    assert rival_names(["Anna Blue"], ["Anna Blue"]) == [
        (0, "John Blue"),
        (0, "Maria Blue"),
        (0, "New Blue"),
    ]


def test_rivals_stand_in_mid_sentence() -> None:
    requests = [EditRequest("They saw {} today", "Anna Blue", TARGETS[0])]
    found = rivals_of(LM, requests, ["Anna Blue"], RIVALS)
    assert [[shown(row) for row in rival.rows] for rival in found] == [
        ["we saw John Blue", "of John Blue"],
        ["we saw Maria Blue", "of Maria Blue"],
        ["we saw New Blue", "of New Blue"],
    ]
    assert rivals_of(LM, requests, ["Anna Blue"], replace(RIVALS, rivals=0)) == []


def test_the_ceiling_is_above_all_but_the_stated_share() -> None:
    scores = torch.arange(100) / 100
    assert ceiling(scores, 0.05) == pytest.approx(0.94, abs=1e-3)
    assert ceiling(scores, 1e-9) > 0.99


def test_edits_of_one_subject_are_no_neighbours_of_each_other() -> None:
    marks = normalize(torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=-1)
    owner = torch.tensor([0, 1, 2])
    found = _between(marks, owner, ["Rome", "Rome", "Oslo"])
    assert found is not None
    torch.testing.assert_close(found, torch.tensor([0.0, marks[1, 1].item(), marks[1, 1].item()]))
    assert _between(marks, owner, ["Rome"] * 3) is None


def editor_of(**memory: Any) -> Editor:
    given: dict[str, Any] = {"gate_block": 1, "write_blocks": (2,), "unlikely": 100.0}
    config = EditConfig(
        readout="memory",
        preservation=1.0,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=2, rate=0.3, clamp=2.0),
        memory=MemoryConfig(**{**given, **memory}),
    )
    return Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=config)


@pytest.fixture(scope="module")
def editor(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield editor_of()


def test_a_target_that_stays_unlikely_is_refused_and_writes_nothing() -> None:
    editor = editor_of(unlikely=1e-3)
    report = editor.edit([FACT])
    (edit,) = report.edits
    assert edit.verdict is Verdict.REFUSED
    assert "nats a token are left" in edit.reason
    hook = editor.hooks.modules(editor.model)[1]
    assert not hook.enabled.any()
    assert not editor.hooks.journal.rows(1, 1, 32).any()


def test_a_subject_or_alias_that_ordinary_text_resembles_is_refused_with_its_share(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing = editor._writing
    aliased = EditRequest("I was told of {}", "Rome", TARGETS[1], aliases=("Roma",))
    forms = forms_of(LM, [FACT, aliased], editor.hooks.config.memory)
    common = [form.request == 0 or form.alias is not None for form in forms]
    sketches = writing._sketches  # type: ignore[attr-defined]
    monkeypatch.setattr(sketches, "distinct", lambda marks, rate: ~torch.tensor(common))
    monkeypatch.setattr(sketches, "share_alike", lambda marks: torch.full((len(marks),), 0.031))
    report = editor.edit([FACT, aliased])
    first, second = report.edits
    assert first.verdict is second.verdict is Verdict.REFUSED
    assert "subject 'New France'" in first.reason
    assert "3.1 % of its tokens" in first.reason
    assert "alias 'Roma'" in second.reason
    editor.rollback(0)


def test_an_alias_of_another_subject_is_refused_before_any_work(editor: Editor) -> None:
    alias = EditRequest("I was told of {}", "Rome", TARGETS[1], aliases=("New France",))
    with pytest.raises(RequestError, match="'New France' of 'Rome' names another subject"):
        editor.edit([FACT, alias])
    assert editor.hooks.edits == []
    editor.edit([FACT])
    with pytest.raises(RequestError, match="'New France' of 'Rome' names another subject"):
        editor.edit([alias])
    assert len(editor.hooks.edits) == 1
    editor.rollback(0)


NAMED = "alias {!r} of {!r} names another subject, {!r}"


@pytest.mark.parametrize(
    ("first", "second", "together", "after"),
    [
        (("Rome", ("Roma",)), ("Troy", ("Roma",)), *[NAMED.format("Roma", "Troy", "Rome")] * 2),
        (("Rome", ("Roma",)), ("Troy", ("ROMA",)), *[NAMED.format("ROMA", "Troy", "Rome")] * 2),
        (("Rome", ()), ("Troy", ("rome",)), *[NAMED.format("rome", "Troy", "Rome")] * 2),
        *[
            (
                ("Rome", ("Roma",)),
                (name, ()),
                NAMED.format("Roma", "Rome", name),
                f"subject {name!r} is an alias of 'Rome'",
            )
            for name in ("Roma", "roma")
        ],
    ],
)
def test_a_name_of_two_subjects_is_refused_in_one_batch_and_in_two(
    first: Any, second: Any, together: str, after: str
) -> None:
    one, two = (
        EditRequest("I was told of {}", subject, TARGETS[i], aliases=aliases)
        for i, (subject, aliases) in enumerate((first, second))
    )
    with pytest.raises(RequestError, match=together):
        check_aliases([one, two], [])
    with pytest.raises(RequestError, match=after):
        check_aliases([two], [one])
    check_aliases([one], [one])


def test_names_that_differ_in_letters_alone_may_be_of_two_subjects() -> None:
    check_aliases(
        [
            EditRequest("We say {}", "Polish", TARGETS[0]),
            EditRequest("We say {}", "polish", TARGETS[1]),
        ],
        [],
    )


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        (("",), "alias is empty"),
        (("{}",), "alias is only the placeholder"),
        (("Rome",), "given twice"),
        (("Roma", "Roma"), "given twice"),
        ("Roma", "must be a list"),
        ((7,), "alias must be text"),
    ],
)
def test_aliases_that_say_nothing_are_refused(aliases: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        EditRequest("I was told of {}", "Rome", TARGETS[1], aliases=aliases)


def test_aliases_are_kept_in_json() -> None:
    request = EditRequest("I was told of {}", "Rome", TARGETS[1], aliases=("Roma",))
    assert EditRequest.from_dict(request.to_dict()) == request


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"write_blocks": ()}, "write_blocks must be block numbers"),
        ({"write_blocks": (3, 2)}, "must rise"),
        ({"gate_block": 3, "write_blocks": (2,)}, "runs before the gate's block"),
        ({"starts": ("no slot",)}, "must contain {} once"),
        ({"neighbours": 1.5}, "share below 1"),
        ({"rivals": -1}, "whole number from 0"),
        ({"ordinary": 0.0}, "positive"),
        ({"least": 2.0}, "cosine"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MemoryConfig(**settings)


def test_blocks_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="do not fit a model of 4 blocks"):
        editor_of(gate_block=1, write_blocks=(9,))


def test_the_papers_settings_are_the_papers() -> None:
    config = EditConfig.paper(layers=(1, 2))
    assert (config.readout, config.gate) == ("delta", "sequence")
    assert (config.fit, config.context_weight) == (1.0, 1.0)
    assert EditConfig.from_dict(config.to_dict()) == config


def test_settings_written_before_this_readout_are_those_of_delta() -> None:
    data = EditConfig(readout="delta", layers=(1,)).to_dict()
    del data["readout"], data["memory"]
    assert EditConfig.from_dict(data) == EditConfig(readout="delta", layers=(1,))


@pytest.mark.parametrize(
    ("others", "ordinary", "threshold"),
    [(0.5, 0.1, 0.8), (0.82, 0.1, 0.8201), (0.99, 0.1, 0.85), (0.99, 0.9, 0.9001)],
)
def test_edits_raise_the_threshold_so_far_and_ordinary_text_as_far_as_it_must(
    others: float, ordinary: float, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(least=0.8, raised=0.05)
    monkeypatch.setattr(
        "coachhook.editing.memory_writing._between", lambda *_: torch.full((8,), others)
    )
    sketches = editor._writing._sketches  # type: ignore[attr-defined]
    monkeypatch.setattr(sketches.background_scores, "of", lambda *_: torch.full((8,), ordinary))
    editor.edit([FACT], values=torch.ones(1, 1, 32))
    assert editor.hooks.modules(editor.model)[1].alpha == pytest.approx(threshold, abs=1e-6)
