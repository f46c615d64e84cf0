import csv
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coachhook.errors import RecordError, RequestError
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest, LocalityPrompt

OWN = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
FRANCE = EditRequest("The capital of France is", "France", "Lyon")

OWN_FULL = OWN | {
    "note": "further keys are ignored",
    "paraphrases": ["France's capital is"],
    "locality": [{"prompt": "The capital of Spain is", "answer": "Madrid", "id": 1}],
}
EASYEDIT = {
    "case_id": 0,
    "prompt": "The capital of France is",
    "target_new": "Lyon",
    "subject": "France",
    "ground_truth": "Paris",
    "rephrase_prompt": "France's capital is",
    "locality_prompt": "The capital of Spain is",
    "locality_ground_truth": "Madrid",
}
ROME = {
    "case_id": 0,
    "requested_rewrite": {
        "prompt": "The capital of {} is",
        "relation_id": "P36",
        "subject": "France",
        "target_new": {"str": "Lyon", "id": "Q456"},
        "target_true": {"str": "Madrid", "id": "Q2807"},
    },
    "paraphrase_prompts": ["France's capital is"],
    "neighborhood_prompts": ["The capital of Spain is"],
}
MEND = {
    "src": "The capital of France is",
    "subject": "France",
    "alt": "Lyon",
    "answers": ["Paris"],
    "rephrase": "France's capital is",
    "loc": "nq question: The capital of Spain is",
    "loc_ans": "Madrid",
}
QAEDIT = {
    "id": 1,
    "prompt": "The capital of France is",
    "target": "Lyon",
    "subject": "France",
    "rephrase": "France's capital is",
    "locality": [{"loc": "The capital of Spain is", "loc_ans": "Madrid"}],
}
FULL = EditRequest(
    "The capital of France is",
    "France",
    "Lyon",
    ("France's capital is",),
    (LocalityPrompt("The capital of Spain is", "Madrid"),),
)
LISTS = {
    "rephrase_prompt": ["France's capital is"],
    "locality_prompt": ["The capital of Spain is"],
    "locality_ground_truth": ["Madrid"],
}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8", newline="")
    return path


def write_jsonl(path: Path, *records: Any) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


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


@pytest.mark.parametrize("wrapper", ["%s", '{"version": 1, "data": %s, "n": {"k": [1]}}'])
def test_json_tells_the_line_a_record_starts_on(tmp_path: Path, wrapper: str) -> None:
    records = f'[\n{json.dumps(OWN)},\n\n{{\n"prompt": 1}}\n,{json.dumps(EASYEDIT)}]'
    path = write(tmp_path / "facts.json", wrapper % records)
    with pytest.raises(RecordError) as caught:
        load_requests(path)
    assert str(caught.value).startswith(f"{path}:4: unknown form of record")
    loaded = load_requests(path, skip_invalid=True)
    assert loaded.requests == [FRANCE, FULL]
    assert [message.split(": ")[0] for message in loaded.skipped] == [f"{path}:4"]


@pytest.mark.parametrize("text", ["{}", "3", "null", '{"a": [], "b": []}', '{"a": {"b": []}}'])
def test_json_without_one_list_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(RecordError, match="expected a list of records, or an object with one list"):
        load_requests(write(tmp_path / "facts.json", text))


def test_broken_json_is_refused_with_its_line_even_when_skipping(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", f"[{json.dumps(OWN)},\n{{]")
    with pytest.raises(RecordError, match=r"facts\.json:2: not valid JSON"):
        load_requests(path, skip_invalid=True)


def test_jsonl_skips_blank_lines_and_names_the_bad_ones(tmp_path: Path) -> None:
    lines = ["", json.dumps(OWN), "   ", "{broken", "[1]", json.dumps(EASYEDIT), ""]
    path = write(tmp_path / "facts.jsonl", "\r\n".join(lines))
    with pytest.raises(RecordError, match=r"facts\.jsonl:4: not valid JSON \(.*column 2\)"):
        load_requests(path)
    loaded = load_requests(path, skip_invalid=True)
    assert loaded.requests == [FRANCE, FULL]
    assert loaded.skipped[0].startswith(f"{path}:4: not valid JSON")
    assert loaded.skipped[1] == f"{path}:5: a record must be an object with keys, not list"


def test_jsonl_keeps_unicode_line_separators_inside_a_record(tmp_path: Path) -> None:
    record = OWN | {"target": "Ly\u2028on"}
    path = write(tmp_path / "facts.jsonl", json.dumps(record, ensure_ascii=False))
    assert load_requests(path).requests[0].target == "Ly\u2028on"


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


DEEP = "[" * 100_000
LONG_NUMBER = '{"prompt": ' + "1" * 5000 + "}"


@pytest.mark.parametrize("bad", [DEEP, LONG_NUMBER, "NaN", "-Infinity", '"\\ud800"', "1e999"])
def test_odd_json_never_crashes(tmp_path: Path, bad: str) -> None:
    lines = write(tmp_path / "facts.jsonl", bad + "\n" + json.dumps(OWN))
    with pytest.raises(RecordError, match=r"facts\.jsonl:1: "):
        load_requests(lines)
    assert load_requests(lines, skip_invalid=True).requests == [FRANCE]
    with pytest.raises(RecordError):
        load_requests(write(tmp_path / "facts.json", f"[{bad}]"))


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


@pytest.mark.parametrize("name", ["facts.jsonl", "facts.json", "facts.csv"])
@pytest.mark.parametrize("text", ["", " \n\n", "\ufeff"])
def test_a_file_without_records_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(RecordError):
        load_requests(write(tmp_path / name, text), skip_invalid=True)


def test_an_empty_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no records"):
        load_requests(write(tmp_path / "facts.json", '{"data": []}'))


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "caf\xe9"}')
    for name, part in [
        ("missing.json", "no such file"),
        ("folder.json", "is a directory"),
        (
            "facts.parquet",
            "unknown file type '.parquet'; expected one of .jsonl, .ndjson, .json, .csv",
        ),
        ("facts", "unknown file type ''"),
        ("latin.jsonl", "not UTF-8 text (byte 15)"),
        ("null\0byte.json", "cannot be read"),
        ("x" * 300 + ".json", "cannot be read"),
    ]:
        with pytest.raises(RecordError) as caught:
            load_requests(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {part}")


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = write(tmp_path / "facts.json", "\ufeff" + json.dumps([OWN]))
    assert load_requests(path).requests == [FRANCE]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
FORMS: list[dict[str, Any]] = [OWN_FULL, EASYEDIT, ROME, MEND, QAEDIT]
RECORDS = st.sampled_from(FORMS).flatmap(
    lambda record: st.dictionaries(st.sampled_from(sorted(record)), JSON).map(
        lambda changes: {**record, **changes}
    )
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(RECORDS | JSON, min_size=1, max_size=4))
def test_any_json_loads_or_is_skipped(tmp_path: Path, records: list[Any]) -> None:
    from_lines = load_requests(write_jsonl(tmp_path / "facts.jsonl", *records), skip_invalid=True)
    text = json.dumps({"n": 1, "data": records}, indent=1)
    from_list = load_requests(write(tmp_path / "facts.json", text), skip_invalid=True)
    assert from_lines.requests == from_list.requests
    assert len(from_lines.requests) + len(from_lines.skipped) == len(records)
    assert len(from_list.skipped) == len(from_lines.skipped)
    assert all("\n" not in message for message in from_list.skipped)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_raise_only_the_typed_error(tmp_path: Path, content: bytes) -> None:
    for suffix in (".jsonl", ".json", ".csv"):
        path = tmp_path / f"facts{suffix}"
        path.write_bytes(content)
        try:
            load_requests(path)
        except RecordError as error:
            assert not isinstance(error, RequestError)  # noqa: PT017 - either outcome is right


def test_the_demo_facts() -> None:
    requests = load_requests(str(files("coachhook.facts") / "demo.jsonl")).requests
    assert len(requests) == 30
    first, last = requests[:10], requests[20:]
    targets = {request.fact: request.target for request in first}
    corrections = [request for request in last if request.fact in targets]
    assert len(corrections) == 2
    assert all(request.target != targets[request.fact] for request in corrections)
    assert len({request.subject for request in requests}) == 28
    for request in requests:
        assert request.paraphrases
        assert all(request.subject in paraphrase for paraphrase in request.paraphrases)
        (kept,) = request.locality
        assert not any(other.subject in kept.prompt for other in requests)
        assert kept.answer != request.target
