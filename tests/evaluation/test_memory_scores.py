"""Which forms open an edit of a memory and what comes close: against every cosine, one by one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook import EditConfig, Editor, EditRequest, StatisticsSource, ValueConfig
from coachhook.config import MemoryConfig
from coachhook.evaluation import memory_scores as scoring
from coachhook.evaluation.memory_forms import (
    FORMS,
    LOCALITY,
    MADE_UP,
    PARAPHRASE,
    PROMPT,
    SUBJECT,
    Text,
    own_texts,
    texts_beside,
)
from coachhook.evaluation.memory_scores import MemoryScores, memory_scores
from coachhook.facts.request import LocalityPrompt
from coachhook.journal.journal import Verdict
from coachhook.models.language_model import LanguageModel
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

GATE = 1
LM = tiny_lm(tiny_model("llama"))
BARE = EditRequest("They moved to {}", "France", TARGETS[0])
FULL = EditRequest(
    "We all know {} well",
    "Anna Blue",
    TARGETS[1],
    paraphrases=("Who is Anna Blue? Anna Blue is", "She is"),
    locality=(
        LocalityPrompt("The weather stayed dry", "so"),
        LocalityPrompt("They moved to France", "so"),
        LocalityPrompt("Blanche is well", "so"),
    ),
    aliases=("Blanche",),
)
OTHER = EditRequest("It was {}", "Otto Grau", TARGETS[2], paraphrases=("Otto Grau was",))
FACTS = [BARE, FULL, OTHER]


def named(text: Text) -> str:
    """What of a text the model has read where the name ends."""
    return str(tiny_tokenizer().decode(text.row.ids[: text.row.subject + 1]))


def test_a_subject_is_met_in_its_prompt_in_every_form_by_every_alias_and_in_paraphrases() -> None:
    found = own_texts(LM, [BARE, FULL])
    assert {text.kind for text in found if text.request == 0} == {PROMPT, *FORMS}
    assert [(text.kind, named(text)) for text in found if text.request == 1] == [
        ("its prompt", "We all know Anna Blue"),
        ("text start", "Anna Blue"),
        ("possessive at the start", "Anna Blue"),
        ("after a newline", "\nAnna Blue"),
        ("after a quote", 'She said: "Anna Blue'),
        ("mid-sentence", "We went to see Anna Blue"),
        ("upper case", "We went to see ANNA BLUE"),
        ("lower case", "We went to see anna blue"),
        ("alias", "We went to see Blanche"),
        ("paraphrase", "Who is Anna Blue? Anna Blue"),
    ]
    assert found[3].text == "\nFrance"
    assert any(text.text == "Anna Blue's" for text in found)


def test_beside_it_stand_prompts_without_a_name_other_subjects_and_made_up_names() -> None:
    found = texts_beside(LM, [FULL, OTHER], FACTS)
    assert [(text.kind, text.request, text.text) for text in found] == [
        (SUBJECT, 0, "We all know Anna Blue well"),
        (LOCALITY, -1, "The weather stayed dry"),
        (SUBJECT, 1, "It was Otto Grau"),
        (MADE_UP, -1, "We all know Otto Blue"),
        (MADE_UP, -1, "It was Anna Grau"),
    ]
    assert named(found[0]) == "We all know Anna Blue"
    # France is no name where it is not edited.
    assert "They moved to France" in [text.text for text in texts_beside(LM, [FULL], [FULL])]


def test_texts_longer_than_the_context_are_left_out() -> None:
    assert LM.context_length is not None
    long = "x" * LM.context_length
    request = replace(FULL, aliases=(long, "Blanche"), locality=(LocalityPrompt(long + "y", "so"),))
    assert [text.kind for text in own_texts(LM, [request])].count("alias") == 1
    assert [text.kind for text in texts_beside(LM, [request], [])] == [SUBJECT]


def editor_of(*facts: EditRequest, readout: str = "memory", unlikely: float = 100.0) -> Editor:
    # A random model tells no subject from another; the threshold is set by each test.
    config = EditConfig(
        readout=readout,
        layers=None if readout == "memory" else (1,),
        preservation=1.0,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=2, rate=0.3, clamp=2.0),
        memory=MemoryConfig(
            gate_block=GATE, write_blocks=(2,), starts=("a {}",), ordinary=0.9, unlikely=unlikely
        ),
    )
    editor = Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=config)
    editor.edit(facts)
    return editor


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield editor_of(*FACTS)


def scores_of(editor: Editor, *facts: EditRequest) -> MemoryScores | None:
    return memory_scores(LanguageModel(editor.model, editor.tokenizer), editor.hooks, facts)


def found_in(editor: Editor, *facts: EditRequest) -> MemoryScores:
    found = scores_of(editor, *facts)
    assert found is not None
    return found


def opening_at(editor: Editor, threshold: float, *, rivals: bool = False) -> None:
    """rivals: whether they keep closed what resembles them."""
    editor.hooks.refresh()
    hook = editor.hooks.modules(editor.model)[GATE]
    hook.threshold.fill_(threshold)
    if not rivals:
        hook.enabled &= hook.edit >= 0


@torch.no_grad()
def sketches(editor: Editor, text: str, end: int | None = None) -> Tensor:
    """Unit sketches `(t, s)` of the tokens of `text` or, up to `end`, of its last one `(1, s)`."""
    hook, keys = editor.hooks.modules(editor.model)[GATE], []
    handle = hook.site.register_forward_pre_hook(lambda _, args: keys.append(args[0]))
    editor.model(input_ids=torch.tensor([tiny_tokenizer()(text[:end])["input_ids"]]))
    handle.remove()
    found = normalize(keys[0][0] @ hook.projection.T - hook.offset, dim=-1)
    return found if end is None else found[-1:]


def marks(editor: Editor, *edits: int) -> Tensor:
    fingerprints, owner = editor.hooks.journal.fingerprints(GATE, 64)
    return fingerprints[torch.isin(owner, torch.tensor(edits))]


def test_every_cosine_and_opening_is_that_of_the_texts_one_by_one(edited: Editor) -> None:
    for threshold in (0.999, 0.9, -0.5):
        opening_at(edited, threshold)
        found = found_in(edited, *FACTS)
        assert (found.block, found.threshold) == (GATE, pytest.approx(threshold))
        assert [entry.edit for entry in found.entries] == [0, 1, 2]
        for entry in found.entries:
            own = [text for text in own_texts(LM, FACTS) if text.request == entry.edit]
            assert [(form.kind, form.text) for form in entry.forms] == [
                (text.kind, text.text) for text in own
            ]
            for form, text in zip(entry.forms, own, strict=True):
                name = "Blanche" if text.kind == "alias" else entry.subject
                if text.kind in ("upper case", "lower case"):
                    name = name.upper() if text.kind == "upper case" else name.lower()
                end = text.text.rfind(name) + len(name)
                key = sketches(edited, text.text, end)
                own_cosine = float((key @ marks(edited, entry.edit).T).max())
                others = [edit for edit in range(3) if edit != entry.edit]
                rival = float((key @ marks(edited, *others).T).max())
                assert form.cosine == pytest.approx(own_cosine, abs=1e-4)
                if min(abs(own_cosine - rival), abs(own_cosine - threshold)) > 1e-4:
                    assert form.opens == (own_cosine > rival and own_cosine >= threshold)
        assert all(entry.forms[0].cosine == pytest.approx(1) for entry in found.entries)
        kinds = {population.kind: population for population in found.own}
        assert kinds[PARAPHRASE].n == 2
        for kind, population in kinds.items():
            forms = [f for entry in found.entries for f in entry.forms if f.kind == kind]
            assert population.n == len(forms)
            assert population.opens == pytest.approx(sum(f.opens for f in forms) / len(forms))
            assert population.cosines[0] == pytest.approx(min(f.cosine for f in forms))
            assert population.cosines[-1] == pytest.approx(max(f.cosine for f in forms))


def beside_one_by_one(editor: Editor, edit: int) -> dict[str, Tensor]:
    """For each text beside an edit, the cosines of its tokens to the edit, `(t,)`."""
    texts = {"The weather stayed dry": None, "We all know Otto Blue": -1, "It was Anna Grau": -1}
    texts |= {"They moved to France": -1, "We all know Anna Blue": -1, "It was Otto Grau": -1}
    prompts = ["They moved to France", "We all know Anna Blue", "It was Otto Grau"]
    found = {}
    for text, last in texts.items():
        if text != prompts[edit]:
            keys = sketches(editor, text)
            keys = keys if last is None else keys[-1:]
            found[text] = (keys @ marks(editor, edit).T).amax(1)
    return found


def test_the_closest_text_beside_an_edit_is_the_closest_of_all(edited: Editor) -> None:
    opening_at(edited, 0.999)
    found = found_in(edited, BARE, replace(FULL, paraphrases=()), OTHER)
    # "They moved to France" is a locality prompt as well, but an edited subject stands in it.
    for entry in found.entries:
        assert entry.nearest is not None
        cosines = {
            text: float(c.max()) for text, c in beside_one_by_one(edited, entry.edit).items()
        }
        best = max(cosines, key=lambda text: cosines[text])
        assert entry.nearest.cosine == pytest.approx(cosines[best], abs=1e-4)
        assert entry.nearest.text.startswith(best)
        assert entry.nearest.opens == (cosines[best] >= 0.999)


def test_what_reaches_other_edits_is_counted_once_a_text(edited: Editor) -> None:
    for threshold, share in ((1.01, 0.0), (-1.0, 1.0)):
        opening_at(edited, threshold)
        beside = {population.kind: population for population in found_in(edited, *FACTS).beside}
        assert {kind: p.n for kind, p in beside.items()} == {LOCALITY: 1, SUBJECT: 3, MADE_UP: 2}
        assert beside[LOCALITY].opens == beside[MADE_UP].opens == share
        # The prompts open their own edits, which is no mistake.
        assert beside[SUBJECT].opens == 0
    opening_at(edited, -1.0, rivals=True)
    (made_up,) = [p for p in found_in(edited, *FACTS).beside if p.kind == MADE_UP]
    # A random model tells few names apart.
    assert made_up.opens < 1
    every = [beside_one_by_one(edited, edit) for edit in range(3)]
    weather = max(float(c["The weather stayed dry"].max()) for c in every)
    assert beside[LOCALITY].cosines[-1] == pytest.approx(weather, abs=1e-4)
    to_others = [
        max(float(c[text].max()) for c in every if text in c)
        for text in ("They moved to France", "We all know Anna Blue", "It was Otto Grau")
    ]
    assert beside[SUBJECT].cosines[0] == pytest.approx(min(to_others), abs=1e-4)
    assert beside[SUBJECT].cosines[-1] == pytest.approx(max(to_others), abs=1e-4)


def test_in_parts_it_is_the_same(edited: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    opening_at(edited, 0.9)
    whole = found_in(edited, *FACTS)
    monkeypatch.setattr(scoring, "_AT_ONCE", 1)
    assert [entry.nearest and entry.nearest.text for entry in found_in(edited, *FACTS).entries] == [
        entry.nearest and entry.nearest.text for entry in whole.entries
    ]
    for one, other in zip(found_in(edited, *FACTS).beside, whole.beside, strict=True):
        assert one.cosines == pytest.approx(other.cosines, abs=1e-5)


def test_only_what_is_asked_for_and_stands_is_shown(edited: Editor) -> None:
    (entry,) = found_in(edited, OTHER, replace(BARE, target="Bern")).entries
    assert (entry.edit, entry.subject, entry.prompt) == (2, "Otto Grau", "It was Otto Grau")
    assert scores_of(edited, replace(BARE, target="Bern")) is None


def test_an_edit_that_is_switched_off_is_met_but_does_not_open(edited: Editor) -> None:
    opening_at(edited, 0.999)
    before = found_in(edited, *FACTS).entries[1]
    edited.hooks.disable(1)
    try:
        opening_at(edited, -1.0)
        found = found_in(edited, *FACTS)
        entry = found.entries[1]
        assert (before.enabled, entry.enabled) == (True, False)
        assert before.forms[0].opens
        assert not any(form.opens for form in entry.forms)
        assert [f.cosine for f in entry.forms] == pytest.approx([f.cosine for f in before.forms])
        assert entry.nearest is not None
        assert not entry.nearest.opens
        # It reaches no other text either: what is left are the other two.
        beside = {population.kind: population for population in found.beside}
        weather = [
            float(beside_one_by_one(edited, edit)["The weather stayed dry"].max())
            for edit in (0, 2)
        ]
        assert beside[LOCALITY].cosines[-1] == pytest.approx(max(weather), abs=1e-4)
        edited.hooks.disable(0)
        met = {population.kind: population.n for population in found_in(edited, *FACTS).beside}
        # The prompt of the only one in force has no other to open.
        assert met[SUBJECT] == 2
        edited.hooks.disable(2)
        found = found_in(edited, *FACTS)
        assert len(found.entries) == 3
        assert found.beside == []
    finally:
        for edit in range(3):
            edited.hooks.enable(edit)


def test_one_edit_without_anything_beside_it() -> None:
    editor = editor_of(BARE)
    found = found_in(editor, BARE)
    (entry,) = found.entries
    assert entry.nearest is None
    assert found.beside == []
    assert {population.kind for population in found.own} == {PROMPT, *FORMS}
    assert all(population.n == 1 for population in found.own)


def test_facts_of_one_subject_are_not_beside_each_other() -> None:
    second = EditRequest("I was told of {}", "France", TARGETS[1])
    editor = editor_of(BARE, second)
    found = found_in(editor, BARE, second)
    assert found.beside == []
    opened = [form.opens for entry in found.entries for form in entry.forms if form.kind == PROMPT]
    assert opened == [True, True]


def test_what_was_refused_or_replaced_is_left_out() -> None:
    refused = editor_of(BARE, unlikely=1e-3)
    assert refused.hooks.edits[0].verdict is Verdict.REFUSED
    assert scores_of(refused, BARE) is None
    aliased = replace(BARE, aliases=("Québec",))
    editor = editor_of(aliased)
    editor.edit([replace(BARE, target=TARGETS[3])])
    assert scores_of(editor, aliased) is None
    (entry,) = found_in(editor, replace(aliased, target=TARGETS[3])).entries
    assert entry.edit == 1
    # The fingerprints of what was replaced are no longer the subject's.
    (alias,) = [form for form in entry.forms if form.kind == "alias"]
    key = sketches(editor, alias.text, len(alias.text))
    assert alias.cosine == pytest.approx(float((key @ marks(editor, 1).T).max()), abs=1e-4)
    assert alias.cosine < float((key @ marks(editor, 0).T).max()) - 1e-3


def test_the_other_readout_has_none() -> None:
    assert scores_of(editor_of(BARE, readout="delta"), BARE) is None
