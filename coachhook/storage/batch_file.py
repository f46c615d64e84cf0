"""Batches as tensors of a file: their factors, and one tensor of JSON for edits and thresholds."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field
from safetensors.torch import load, save
from torch import Tensor
from typing_extensions import TypedDict

from coachhook.errors import ConfigError, CorruptFolderError, RequestError
from coachhook.hooks.gates import Threshold
from coachhook.journal.factors import LayerFactors, MergedFactors, StoredFactors
from coachhook.journal.journal import Base, Batch, EditEntry, Journal, edit_from_json, edit_to_json
from coachhook.journal.memory import MemoryFactors, StoredMemory
from coachhook.system.json_shapes import Count, MisshapenError, checked, parsed
from coachhook.system.tensor_file import Headers, TensorFile, check

# Name of the tensor that holds the JSON: its UTF-8 bytes, as uint8.
_RECORDS = "records"
_MARKS = ("fingerprints", "owner")

T = TypeVar("T")


class _BatchEntry(TypedDict):
    """A batch in JSON, without its factors. thresholds: by layer, the fields of `Threshold`."""

    edits: Annotated[list[EditEntry], Field(min_length=1)]
    thresholds: dict[str, dict[str, float | None]]


class _MergedEntry(_BatchEntry):
    """A merged batch. fingerprints: by layer, how many of the base's fingerprints it owns."""

    fingerprints: dict[str, Count]


@dataclass(frozen=True)
class Expected:
    """What the batches of a folder must hold. By hooked layer, layers: `(d_in, d_out)`, and sizes:
    s, the length of a fingerprint; threshold: the threshold type of the folder's gate; rows: under
    the memory readout, how many each edit has."""

    layers: Mapping[int, tuple[int, int]]
    sizes: Mapping[int, int]
    threshold: type[Threshold]
    rows: int | None = None


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Raise `CorruptFolderError` if the block finds the contents of `path` malformed."""
    try:
        yield
    except (MisshapenError, ConfigError, RequestError) as error:
        raise CorruptFolderError(
            f"{path} is damaged, or not ours: {error}; restore it from a copy"
        ) from error


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """The batch as tensors that `read_batch` can read back."""
    tensors = {
        f"{name}.{layer}": getattr(factors, name)
        for layer, factors in batch.layers.items()
        for name in factors.NAMES
    }
    return tensors | _packed(_batch_to_json(batch))


def read_batch(expected: Expected, file: TensorFile) -> Batch:
    """A batch whose factors stay in `file`. Raises `CorruptFolderError` if it is malformed."""
    with intact(file.path):
        headers = file.headers()
        entry: _BatchEntry = checked(_records(file, headers), _BatchEntry)
        n = len(entry["edits"])
        for layer, (d_in, d_out) in expected.layers.items():
            if expected.rows is not None:
                check(headers, f"rows.{layer}", torch.bfloat16, n, expected.rows, d_out)
                continue
            check(headers, f"residuals.{layer}", torch.float32, n, d_out)
            check(headers, f"solutions.{layer}", torch.float32, n, d_in)
            check(headers, f"keys.{layer}", torch.float32, None, d_in)
        marks = _read_marks(expected, file, headers)
        for layer, (_, owner) in marks.items():
            _check_owner(owner, n, layer)
        kind = StoredFactors if expected.rows is None else StoredMemory
        factors: dict[int, Any] = {k: kind(file, k, *marks[k]) for k in marks}
        return _batch_from_json(entry, factors, expected.threshold, stored=file)


def batch_to_bytes(batch: Batch) -> bytes:
    """The batch as the contents of a safetensors file, for `batch_from_bytes`."""
    return save({name: tensor.contiguous() for name, tensor in batch_tensors(batch).items()})


def batch_from_bytes(
    layers: Sequence[int], data: bytes, threshold: type[Threshold] = Threshold
) -> Batch:
    """A batch in memory, from the result of `batch_to_bytes`."""
    held = load(data)
    factors: dict[int, Any] = {}
    for layer in layers:
        kind = MemoryFactors if f"rows.{layer}" in held else LayerFactors
        factors[layer] = kind(**{name: held[f"{name}.{layer}"] for name in kind.NAMES})
    return _batch_from_json(_unpacked(held[_RECORDS]), factors, threshold)


def base_tensors(journal: Journal) -> dict[str, Tensor]:
    """The base, and what is kept of its batches, as tensors that `read_base` can read back."""
    assert journal.base is not None
    merged = journal.batches[: journal.merged]
    marks = {
        f"{name}.{layer}": torch.cat([getattr(batch.layers[layer], name) for batch in merged])
        for layer in merged[0].layers
        for name in _MARKS
    }
    entries = [_batch_to_json(batch) | {"fingerprints": _counts(batch)} for batch in merged]
    return dict(journal.base.tensors) | marks | _packed(entries)


def read_base(expected: Expected, file: TensorFile) -> tuple[Base, list[Batch]]:
    """A base whose tensors stay in `file`, and the batches that were merged into it. Raises
    `CorruptFolderError` if the file is malformed."""
    with intact(file.path):
        headers = file.headers()
        entries: list[_MergedEntry] = checked(_records(file, headers), list[_MergedEntry])
        _check_merged(expected, headers)
        merged: list[dict[int, Any]] = [{} for _ in entries]
        n_edits = sum(len(entry["edits"]) for entry in entries)
        for layer, (_, d_out) in expected.layers.items() if expected.rows is not None else ():
            check(headers, f"rows.{layer}", torch.bfloat16, n_edits, expected.rows, d_out)
        for layer, marks in _read_marks(expected, file, headers).items():
            counts = [_of_layer(entry["fingerprints"], layer) for entry in entries]
            if sum(counts) != len(marks[1]):
                raise MisshapenError(
                    f"the batches count {sum(counts)} fingerprints of layer {layer}, and there "
                    f"are {len(marks[1])}"
                )
            pieces = zip(*(tensor.split(counts) for tensor in marks), strict=True)
            for factors, entry, (rows, owner) in zip(merged, entries, pieces, strict=True):
                _check_owner(owner, len(entry["edits"]), layer)
                factors[layer] = MergedFactors(rows, owner)
        batches = [
            _batch_from_json(entry, factors, expected.threshold)
            for entry, factors in zip(entries, merged, strict=True)
        ]
        return Base(len(batches), file), batches


def _check_merged(expected: Expected, headers: Headers) -> None:
    """Raise `MisshapenError` unless a base's file has Δ and keys (or their Gram) per layer."""
    if expected.rows is not None:
        return
    for layer, (d_in, d_out) in expected.layers.items():
        if f"up.{layer}" in headers:
            rank, _ = check(headers, f"down.{layer}", torch.float32, None, d_in)
            check(headers, f"up.{layer}", torch.float32, d_out, rank)
        else:
            check(headers, f"down.{layer}", torch.float32, d_out, d_in)
        if f"gram.{layer}" in headers:
            check(headers, f"gram.{layer}", torch.float64, d_in, d_in)
        else:
            check(headers, f"keys.{layer}", torch.float32, None, d_in)


def _counts(batch: Batch) -> dict[str, int]:
    return {str(layer): len(factors.owner) for layer, factors in batch.layers.items()}


def _packed(value: Any) -> dict[str, Tensor]:
    data = bytearray(json.dumps(value, ensure_ascii=False).encode())
    return {_RECORDS: torch.frombuffer(data, dtype=torch.uint8)}


def _read_marks(
    expected: Expected, file: TensorFile, headers: Headers
) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, the fingerprints in a file and their owners."""
    for layer, size in expected.sizes.items():
        n, _ = check(headers, f"fingerprints.{layer}", torch.float32, None, size)
        check(headers, f"owner.{layer}", torch.int64, n)
    held = file.read([f"{name}.{layer}" for layer in expected.layers for name in _MARKS])
    return {k: (held[f"fingerprints.{k}"], held[f"owner.{k}"]) for k in expected.layers}


def _check_owner(owner: Tensor, n: int, layer: int) -> None:
    if len(owner) and not 0 <= int(owner.min()) <= int(owner.max()) < n:
        raise MisshapenError(f"fingerprints of layer {layer} belong to edits that are not there")


def _records(file: TensorFile, headers: Headers) -> Any:
    """The JSON in a file."""
    check(headers, _RECORDS, torch.uint8, None)
    return _unpacked(file[_RECORDS])


def _unpacked(records: Tensor) -> Any:
    return parsed(records.numpy().tobytes())


def _batch_to_json(batch: Batch) -> dict[str, Any]:
    return {
        "edits": [edit_to_json(edit) for edit in batch.edits],
        "thresholds": {str(k): v.to_json() for k, v in batch.thresholds.items()},
    }


def _batch_from_json(
    entry: _BatchEntry,
    layers: dict[int, Any],
    threshold: type[Threshold],
    stored: TensorFile | None = None,
) -> Batch:
    """Raises `MisshapenError` for thresholds of another type, `RequestError` for an invalid
    request."""
    thresholds = {}
    for layer in layers:
        found = _of_layer(entry["thresholds"], layer)
        names = sorted(field.name for field in fields(threshold))
        if sorted(found) != names:
            raise MisshapenError(
                f"threshold of layer {layer}: expected {names}, found {sorted(found)}"
            )
        thresholds[layer] = threshold.from_json(found)
    edits = [edit_from_json(edit) for edit in entry["edits"]]
    of_rivals = [place for place, edit in enumerate(edits) for _ in edit.rivals]
    for layer, factors in layers.items():
        last = factors.owner[-len(of_rivals) :].tolist() if of_rivals else []
        if last != of_rivals:
            raise MisshapenError(
                f"the last fingerprints of layer {layer} are not those of the edits' "
                f"{len(of_rivals)} rivals"
            )
    return Batch(edits, layers, thresholds, stored)


def _of_layer(by_layer: Mapping[str, T], layer: int) -> T:
    """The entry of a layer in a JSON object, whose keys are strings."""
    if str(layer) not in by_layer:
        raise MisshapenError(f"layer {layer} is missing, there are {sorted(by_layer)}")
    return by_layer[str(layer)]
