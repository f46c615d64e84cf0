"""What a record of each form becomes, and what a malformed one is told."""

import json
from pathlib import Path
from typing import Any

import pytest

from coachhook.errors import RecordError
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest
from tests.support.records import (
    EASYEDIT,
    FRANCE,
    FULL,
    LISTS,
    MEND,
    OWN,
    OWN_FULL,
    QAEDIT,
    ROME,
    write,
    write_jsonl,
)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (OWN, FRANCE),
        (OWN_FULL, FULL),
        (FULL.to_dict(), FULL),
        (EASYEDIT, FULL),
        (EASYEDIT | LISTS, FULL),
        ({key: EASYEDIT[key] for key in ("prompt", "subject", "target_new")}, FRANCE),
        (ROME, FULL),
        ({"requested_rewrite": ROME["requested_rewrite"]}, FRANCE),
        (MEND, FULL),
        ({key: MEND[key] for key in ("src", "subject", "alt")}, FRANCE),
        (QAEDIT, FULL),
        (OWN | {"paraphrases": None, "locality": None}, FRANCE),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".NDJSON", ".json"])
def test_every_record_form(
    tmp_path: Path, record: dict[str, Any], expected: EditRequest, suffix: str
) -> None:
    text = json.dumps(record)
    path = write(tmp_path / f"facts{suffix}", f"[{text}]" if suffix == ".json" else text)
    loaded = load_requests(str(path))
    assert loaded.requests == [expected]
    assert loaded.skipped == []


@pytest.mark.parametrize(
    ("record", "truth"),
    [
        (EASYEDIT, "Paris"),
        (EASYEDIT | {"ground_truth": ["Paris", "Lutetia"]}, "Paris"),
        (EASYEDIT | {"ground_truth": " "}, None),
        (EASYEDIT | {"ground_truth": 3}, None),
        (EASYEDIT | {"ground_truth": []}, None),
        (ROME, "Madrid"),
        (MEND, "Paris"),
        (QAEDIT, None),
        (OWN, None),
        (OWN | {"truth": " Paris "}, "Paris"),
    ],
)
def test_what_a_target_replaces(tmp_path: Path, record: dict[str, Any], truth: str | None) -> None:
    (request,) = load_requests(write_jsonl(tmp_path / "facts.jsonl", record)).requests
    assert request.truth == truth
    assert EditRequest.from_dict(request.to_dict()).truth == truth
    assert ("truth" in request.to_dict()) == (truth is not None)


@pytest.mark.parametrize(
    ("prompt", "subject", "spelling"),
    [
        ("who wrote the song hey jude?", "Hey Jude", "hey jude"),
        ("hey jude, or HEY JUDE", " Hey Jude ", "HEY JUDE"),
        ("who wrote a+b (song)", "A+B (Song)", "a+b (song)"),
    ],
)
def test_the_subject_takes_the_prompts_letter_case(
    tmp_path: Path, prompt: str, subject: str, spelling: str
) -> None:
    path = write_jsonl(tmp_path / "f.jsonl", {"prompt": prompt, "subject": subject, "target": "x"})
    (request,) = load_requests(path).requests
    assert request.subject == spelling


def test_a_prompt_with_a_slot_keeps_the_subjects_spelling(tmp_path: Path) -> None:
    record = {"prompt": "In france, {} is", "subject": "France", "target": "x"}
    (request,) = load_requests(write_jsonl(tmp_path / "f.jsonl", record)).requests
    assert request.prompt == "In france, France is"


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({"prompt": "p", "target": "t"}, "unknown form of record with the keys 'prompt, target'"),
        ({}, "unknown form of record with the keys 'none'"),
        (OWN | {"subject": "Spain", "prompt": "France is"}, "prompt does not contain the subject"),
        (OWN | {"target": 5}, "target must be text, not int"),
        (OWN | {"target": float("nan")}, "target must be text, not float"),
        (OWN | {"target": ""}, "target is empty"),
        (OWN | {"prompt": None}, "prompt must be text"),
        (OWN | {"subject": ""}, "subject is empty"),
        (OWN | {"paraphrases": 3}, "paraphrases must be a text or a list"),
        (OWN | {"paraphrases": [3]}, "paraphrase must be text"),
        (OWN | {"locality": [{"prompt": "a"}]}, "key 'answer' is missing"),
        (OWN | {"locality": ["a"]}, "expected an object with prompt, answer, not str"),
        (OWN | {"locality": {"prompt": "a"}}, "locality must be a text or a list"),
        (EASYEDIT | {"target_new": None}, "target must be text"),
        (EASYEDIT | {"locality_prompt": ["a", "b"]}, "locality_prompt has 2 items, "),
        (EASYEDIT | {"locality_ground_truth": None}, "locality_prompt has 1 items, "),
        ({"requested_rewrite": "x"}, "expected an object with prompt, subject, target_new"),
        ({"requested_rewrite": {"prompt": "p"}}, "key 'subject' is missing"),
        ({"requested_rewrite": OWN | {"target_new": "x"}}, "expected an object with str, not str"),
        (
            {"requested_rewrite": OWN | {"target_new": {"str": "x"}}, "neighborhood_prompts": "n"},
            "key 'target_true' is missing",
        ),
        (MEND | {"loc": 4}, "loc must be a text or a list"),
        (MEND | {"loc": [4]}, "locality prompt must be text"),
        (MEND | {"alt": ["a"]}, "target must be text, not list"),
        (QAEDIT | {"locality": [{"loc": "a"}]}, "key 'loc_ans' is missing"),
    ],
)
def test_malformed_records_are_told_with_file_and_line(
    tmp_path: Path, record: Any, part: str
) -> None:
    path = write_jsonl(tmp_path / "facts.jsonl", OWN, record)
    with pytest.raises(RecordError) as caught:
        load_requests(path)
    assert str(caught.value).startswith(f"{path}:2: {part}")
    loaded = load_requests(path, skip_invalid=True)
    assert loaded.requests == [FRANCE]
    assert loaded.skipped == [str(caught.value)]
