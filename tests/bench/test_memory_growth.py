"""The edits that join a memory in the bench of its growth."""

import json
from pathlib import Path

from bench.editing.memory_growth import joining, made_up
from coachhook import EditRequest

LIVE = [
    EditRequest("{} was born in", "Anna Blue", "Rome"),
    EditRequest("{} was born in", "Otto von Grau", "Oslo"),
    EditRequest("{} lies in", "Troy", "Peru"),
]


def test_made_up_names_are_nobodys_and_say_what_their_last_words_owner_says() -> None:
    found = made_up(LIVE, 10)
    assert [(edit.prompt, edit.target) for edit in found] == [
        ("Otto von Blue was born in", "Rome"),
        ("Anna Grau was born in", "Oslo"),
    ]
    assert [edit.subject for edit in found] == ["Otto von Blue", "Anna Grau"]
    assert made_up(LIVE, 1) == found[:1]


def test_of_other_files_each_subject_without_an_edit_joins_once(tmp_path: Path) -> None:
    others = [*LIVE[:1], EditRequest("{} is", "anna blue", "x"), EditRequest("{} is", "Ida", "y")]
    others += [EditRequest("{} was", "Ida", "z"), EditRequest("{} was", "Uma", "z")]
    for name in ("one", "two"):
        lines = [json.dumps(fact.to_dict()) for fact in others]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    found = joining(LIVE, [tmp_path / "one.jsonl", tmp_path / "two.jsonl"])
    assert [(edit.subject, edit.target) for edit in found] == [("Ida", "y"), ("Uma", "z")]
