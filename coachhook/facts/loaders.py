"""Read edit requests from the files people have: our own records, CounterFact, ZsRE, QAEdit."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coachhook.errors import RecordError, RequestError
from coachhook.facts.request import EditRequest, LocalityPrompt


@dataclass(frozen=True, slots=True)
class LoadedRequests:
    """The requests of a file in order, and one `file:line: reason` per skipped record."""

    requests: list[EditRequest]
    skipped: list[str]


def load_requests(path: str | Path, *, skip_invalid: bool = False) -> LoadedRequests:
    """Read every record of a `.jsonl`, `.ndjson`, `.json` or `.csv` file.

    Each record's format is recognised by its keys (see `_FORMS`); additional keys are ignored. A
    malformed record raises `RecordError`, or with `skip_invalid` is left out and listed in
    `skipped`. A file that cannot be read, is not valid JSON or CSV as a whole, or holds no records
    raises `RecordError` either way.
    """
    path = Path(path)
    if os.path.isdir(path):  # Path.is_dir raises for some impossible names
        raise RecordError(f"{path}: is a directory; give a file of facts")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise RecordError(
            f"{path}: unknown file type {path.suffix!r}; expected one of {', '.join(_READERS)}"
        )
    requests: list[EditRequest] = []
    skipped: list[str] = []
    for line, record in reader(path, _read_text(path)):
        try:
            if isinstance(record, RequestError):
                raise record
            requests.append(_to_request(record))
        except RequestError as error:
            message = f"{path}:{line}: {error}"
            if not skip_invalid:
                raise RecordError(message) from error
            skipped.append(message)
    if not requests and not skipped:
        raise RecordError(f"{path}: holds no records; give at least one fact")
    return LoadedRequests(requests, skipped)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise RecordError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError as error:
        raise RecordError(
            f"{path}: not UTF-8 text (byte {error.start}); save the file as UTF-8"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise RecordError(f"{path}: cannot be read ({error}); check the path") from error


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, object]]:
    # Not splitlines(): U+2028 and similar may occur unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, RequestError(_json_fault(error))


def _read_json(path: Path, text: str) -> Iterator[tuple[int, object]]:
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise RecordError(f"{path}:{line}: {_json_fault(error)}") from error
    candidates = document.values() if isinstance(document, dict) else [document]
    if sum(isinstance(value, list) for value in candidates) != 1:
        raise RecordError(f"{path}: expected a list of records, or an object with one list of them")
    yield from _with_lines(text)


_JSON_GAP = re.compile(r"[ \t\n\r,:]*")


def _with_lines(text: str) -> list[tuple[int, object]]:
    """The items of the first list in a valid JSON list or object, each with the line it starts on.

    Decodes again, value by value, because `json.loads` does not tell where each value starts.
    """
    decode = json.JSONDecoder().raw_decode

    def next_value(at: int) -> int:
        gap = _JSON_GAP.match(text, at)
        return gap.end() if gap else at

    at = next_value(0)
    if text[at] == "{":
        at = next_value(at + 1)
        while text[at] != "[":  # a key, or a value that is no list
            at = next_value(decode(text, at)[1])
    at = next_value(at + 1)
    records: list[tuple[int, object]] = []
    line, counted = 1, 0
    while text[at] != "]":
        line, counted = line + text.count("\n", counted, at), at
        record, end = decode(text, at)
        records.append((line, record))
        at = next_value(end)
    return records


def _json_fault(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "JSON nested too deeply; a record needs three levels"
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg}, column {error.colno}); correct or remove it"
    return f"not readable JSON ({error}); correct or remove it"  # a number of too many digits


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, object]]:
    header: list[str] | None = None
    for line, row in _csv_rows(path, text):
        if header is not None:
            yield line, _csv_record(header, row)
            continue
        header = [name.strip() for name in row]
        if len(set(header)) != len(header):
            raise RecordError(f"{path}:{line}: two columns have the same name; rename one")
        missing = [name for name in ("prompt", "subject", "target") if name not in header]
        if missing:
            raise RecordError(
                f"{path}:{line}: the header lacks {', '.join(missing)}; "
                "the first row must name the columns prompt, subject and target"
            )


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """The rows that are not blank, each with the line it starts on."""
    # Strict, or an unclosed quote would swallow the rest of the file into one field.
    rows = csv.reader(io.StringIO(text), strict=True)
    line = 1
    try:
        for row in rows:
            if row:
                yield line, row
            line = rows.line_num + 1
    except csv.Error as error:
        raise RecordError(f"{path}:{line}: not valid CSV ({error}); correct it") from error


def _csv_record(header: list[str], row: list[str]) -> object:
    """A row as a record of our own format; other columns are ignored."""
    if len(row) != len(header):
        return RequestError(
            f"row has {len(row)} fields, the header has {len(header)}; quote fields with commas"
        )
    cells = dict(zip(header, row, strict=True))
    record: dict[str, Any] = {name: cells[name] for name in ("prompt", "subject", "target")}
    for several in ("paraphrases", "aliases"):
        record[several] = [text for text in cells.get(several, "").split("|") if text.strip()]
    prompt, answer = cells.get("locality_prompt", ""), cells.get("locality_answer", "")
    if prompt.strip() or answer.strip():
        record["locality"] = [{"prompt": prompt, "answer": answer}]
    return record


# Each yields (line number, record); a `RequestError` stands for a record that could not be read.
_READERS: dict[str, Callable[[Path, str], Iterator[tuple[int, object]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
}


def _to_request(record: object) -> EditRequest:
    if not isinstance(record, dict):
        raise RequestError(f"a record must be an object with keys, not {type(record).__name__}")
    for _, required, convert in _FORMS:
        if required <= record.keys():
            return convert(record)
    known = "; ".join(f"{name}: {', '.join(sorted(required))}" for name, required, _ in _FORMS)
    found = ", ".join(sorted(record))[:80] or "none"
    raise RequestError(f"unknown form of record with the keys {found!r}; known are {known}")


def _from_own(record: dict[str, Any]) -> EditRequest:
    request = _request(
        record["prompt"],
        record["subject"],
        record["target"],
        _listed(record, "paraphrases"),
        [_values(item, "prompt", "answer") for item in _listed(record, "locality")],
        record.get("truth"),
    )
    aliases = tuple(_listed(record, "aliases"))
    return replace(request, aliases=aliases) if aliases else request


def _from_qaedit(record: dict[str, Any]) -> EditRequest:
    return _request(
        record["prompt"],
        record["subject"],
        record["target"],
        _listed(record, "rephrase"),
        [_values(item, "loc", "loc_ans") for item in _listed(record, "locality")],
    )


def _from_easyedit(record: dict[str, Any]) -> EditRequest:
    return _request(
        record["prompt"],
        record["subject"],
        record["target_new"],
        _listed(record, "rephrase_prompt"),
        _paired(record, "locality_prompt", "locality_ground_truth"),
        record.get("ground_truth"),
    )


def _from_rome(record: dict[str, Any]) -> EditRequest:
    rewrite = record["requested_rewrite"]
    prompt, subject, new = _values(rewrite, "prompt", "subject", "target_new")
    neighbours = _listed(record, "neighborhood_prompts")
    truth: list[Any] = []
    if neighbours or "target_true" in rewrite:
        truth = list(_values(*_values(rewrite, "target_true"), "str"))
    locality = [(neighbour, *truth) for neighbour in neighbours]
    (target,) = _values(new, "str")
    return _request(prompt, subject, target, _listed(record, "paraphrase_prompts"), locality, truth)


def _from_mend(record: dict[str, Any]) -> EditRequest:
    # MEND's locality questions keep the prefix of the model inputs they were taken from.
    locality = [
        (prompt.removeprefix("nq question: ") if isinstance(prompt, str) else prompt, answer)
        for prompt, answer in _paired(record, "loc", "loc_ans")
    ]
    return _request(
        record["src"],
        record["subject"],
        record["alt"],
        _listed(record, "rephrase"),
        locality,
        record.get("answers"),
    )


# Tried in order: a record of one format must not have all the keys of an earlier one.
_FORMS: tuple[tuple[str, frozenset[str], Callable[[dict[str, Any]], EditRequest]], ...] = (
    ("CounterFact (ROME)", frozenset({"requested_rewrite"}), _from_rome),
    ("CounterFact (EasyEdit)", frozenset({"prompt", "subject", "target_new"}), _from_easyedit),
    ("ZsRE (MEND)", frozenset({"src", "subject", "alt"}), _from_mend),
    ("QAEdit", frozenset({"prompt", "subject", "target", "rephrase"}), _from_qaedit),
    ("coachhook", frozenset({"prompt", "subject", "target"}), _from_own),
)


def _request(
    prompt: Any,
    subject: Any,
    target: Any,
    paraphrases: list[Any],
    locality: list[tuple[Any, ...]],
    truth: Any = None,
) -> EditRequest:
    """A request from values of any type, which the constructors check. truth: of a list the first;
    left out if it is unusable, since only evaluation needs it."""
    if isinstance(prompt, str) and isinstance(subject, str):
        subject = _as_spelled_in(prompt, subject.strip())
    kept = tuple(LocalityPrompt(*pair) for pair in locality)
    first = truth[0] if isinstance(truth, list) and truth else truth
    known = first if isinstance(first, str) and first.strip() else None
    return EditRequest(prompt, subject, target, tuple(paraphrases), kept, known)


def _as_spelled_in(prompt: str, subject: str) -> str:
    """The subject in the letter case of the prompt, which in some data sets differs."""
    if subject in prompt or "{}" in prompt:
        return subject
    spellings = re.findall(re.escape(subject), prompt, re.IGNORECASE)
    return spellings[-1] if spellings else subject


def _values(data: object, *keys: str) -> tuple[Any, ...]:
    """The values under `keys`. Raises `RequestError` if `data` is no object or lacks a key."""
    if not isinstance(data, dict):
        raise RequestError(f"expected an object with {', '.join(keys)}, not {type(data).__name__}")
    for key in keys:
        if key not in data:
            raise RequestError(f"key {key!r} is missing; expected {', '.join(keys)}")
    return tuple(data[key] for key in keys)


def _listed(record: dict[str, Any], key: str) -> list[Any]:
    """The list under `key`; a single text becomes a list, null or a missing key an empty one."""
    value = record.get(key)
    if value is None:
        return []
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise RequestError(f"{key} must be a text or a list, not {type(value).__name__}")
    return value


def _paired(record: dict[str, Any], prompts: str, answers: str) -> list[tuple[Any, ...]]:
    """Pairs of the prompts under one key and the answers under another."""
    left, right = _listed(record, prompts), _listed(record, answers)
    if len(left) != len(right):
        raise RequestError(f"{prompts} has {len(left)} items, {answers} has {len(right)}")
    return list(zip(left, right, strict=True))
