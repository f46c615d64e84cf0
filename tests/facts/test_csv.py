"""Facts in CSV files: columns, quoting, and the row that a message names."""

import csv
import json
from pathlib import Path

import pytest

from coachhook.errors import RecordError
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest
from tests.support.records import FRANCE, FULL, write

COLUMNS = [
    "id",
    " prompt",
    "subject",
    "target",
    "paraphrases",
    "locality_prompt",
    "locality_answer",
]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "facts.csv"
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        cells = {
            "id": 1,
            "prompt": "The capital of {} is",
            "subject": "France",
            "target": "Lyon",
            "paraphrases": "France's capital is| The seat, of {} |",
            "locality_prompt": "The capital of Spain is",
            "locality_answer": "Madrid",
        }
        writer.writerow(cells[name.strip()] for name in COLUMNS)
        file.write("\r\n")
        writer.writerow([2, "The capital\nof {} is", "France", "Nice", "", "", ""])
        writer.writerow([3, "The capital of Spain is", "France", "Nice", "", "", ""])
        writer.writerow([4, "too short"])
        writer.writerow([5, "The capital of {} is", "France", "x", "", "", "no prompt"])
    loaded = load_requests(path, skip_invalid=True)
    assert loaded.requests == [
        EditRequest(
            FULL.prompt, "France", "Lyon", (*FULL.paraphrases, "The seat, of France"), FULL.locality
        ),
        EditRequest("The capital\nof France is", "France", "Nice"),
    ]
    assert [
        message.removeprefix(f"{path}:").split("(")[0].strip() for message in loaded.skipped
    ] == [
        "6: prompt does not contain the subject; write the subject or {} in it",
        "7: row has 2 fields, the header has 7; quote fields with commas",
        "8: locality prompt is empty; give it at least one character",
    ]


def test_csv_needs_only_three_columns(tmp_path: Path) -> None:
    path = write(
        tmp_path / "facts.csv", "\ntarget,subject,prompt\nLyon,France,The capital of {} is"
    )
    assert load_requests(path).requests == [FRANCE]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("prompt,subject\na,a\n", ":1: the header lacks target"),
        ("prompt,subject,target,target\n", ":1: two columns have the same name"),
        ('prompt,subject,target\na,a,b\na,a,"b\nc,c,d\n', ":3: not valid CSV"),
        ("prompt,subject,target\na,a," + "b" * 200_000, ":2: not valid CSV"),
        ("prompt,subject,target\n", ": holds no records"),
    ],
)
def test_unusable_csv(tmp_path: Path, text: str, part: str) -> None:
    path = write(tmp_path / "facts.csv", text)
    with pytest.raises(RecordError) as caught:
        load_requests(path, skip_invalid=True)
    assert str(caught.value).startswith(f"{path}{part}")


def test_aliases_are_read_in_every_form_of_file(tmp_path: Path) -> None:
    fact = EditRequest("The capital of {} is", "France", "Lyon", aliases=("Gaul", "Frankreich"))
    lines = write(tmp_path / "facts.jsonl", json.dumps(fact.to_dict()))
    assert load_requests(lines).requests == [fact]
    columns = "prompt,subject,target,aliases\nThe capital of {} is,France,Lyon,Gaul|Frankreich\n"
    assert load_requests(write(tmp_path / "facts.csv", columns)).requests == [fact]
    twice = json.dumps(fact.to_dict() | {"aliases": ["Gaul", "Gaul"]})
    with pytest.raises(RecordError, match=r"twice\.jsonl:1: .*given twice"):
        load_requests(write(tmp_path / "twice.jsonl", twice))
