"""Files of facts in JSON and JSONL, files that cannot be read, and any bytes at all."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coachhook.errors import RecordError, RequestError
from coachhook.facts.loaders import load_requests
from tests.support.records import (
    EASYEDIT,
    FRANCE,
    FULL,
    MEND,
    OWN,
    OWN_FULL,
    QAEDIT,
    ROME,
    write,
    write_jsonl,
)


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
