"""Batches as the tensors of a file: their factors, and their edits and thresholds as JSON."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from coachhook.errors import CoachhookError, ConfigError, CorruptFolderError, RequestError
from coachhook.hooks.gates import Threshold
from coachhook.journal.journal import (
    FACTORS,
    Base,
    Batch,
    Factors,
    Journal,
    LayerFactors,
    MergedFactors,
    StoredFactors,
    edit_from_json,
    edit_to_json,
)
from coachhook.journal.tensor_file import TensorFile

# The tensor that holds JSON: its bytes in UTF-8, as uint8.
_RECORDS = "records"
_MARKS = ("fingerprints", "owner")


@contextmanager
def whole(path: Path) -> Iterator[None]:
    """Where the contents of `path` make no sense, raises `CorruptFolderError`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, CoachhookError) and not isinstance(error, ConfigError | RequestError):
            raise
        raise CorruptFolderError(
            f"{path} lacks or garbles {error}; restore it from a copy"
        ) from error


def batch_tensors(batch: Batch) -> dict[str, Tensor]:
    """All that `read_batch` needs."""
    tensors = {
        f"{name}.{layer}": getattr(factors, name)
        for layer, factors in batch.layers.items()
        for name in FACTORS
    }
    return tensors | _packed(_batch_to_json(batch))


def read_batch(layers: Sequence[int], file: TensorFile) -> Batch:
    """A batch whose factors stay in `file`. Raises `CorruptFolderError`."""
    with whole(file.path):
        entry, marks = _read(layers, file)
        return _batch_from_json(
            entry, {k: StoredFactors(file, k, *marks[k]) for k in layers}, stored=file
        )


def batch_to_bytes(batch: Batch) -> bytes:
    """All that `batch_from_bytes` needs, as the contents of a safetensors file."""
    return save({name: tensor.contiguous() for name, tensor in batch_tensors(batch).items()})


def batch_from_bytes(layers: Sequence[int], data: bytes) -> Batch:
    """A batch in memory, from `batch_to_bytes`."""
    held = load(data)
    factors: dict[int, Factors] = {
        layer: LayerFactors(**{name: held[f"{name}.{layer}"] for name in FACTORS})
        for layer in layers
    }
    return _batch_from_json(_unpacked(held), factors)


def base_tensors(journal: Journal) -> dict[str, Tensor]:
    """All that `read_base` needs: the base, and of its batches what is kept."""
    assert journal.base is not None
    merged = journal.batches[: journal.merged]
    marks = {
        f"{name}.{layer}": torch.cat([getattr(batch.layers[layer], name) for batch in merged])
        for layer in merged[0].layers
        for name in _MARKS
    }
    entries = [_batch_to_json(batch) | {"fingerprints": _counts(batch)} for batch in merged]
    return dict(journal.base.tensors) | marks | _packed(entries)


def read_base(layers: Sequence[int], file: TensorFile) -> tuple[Base, list[Batch]]:
    """A base whose tensors stay in `file`, and the batches that were merged into it. Raises
    `CorruptFolderError`."""
    with whole(file.path):
        entries, marks = _read(layers, file)
        pieces = {}
        for layer, tensors in marks.items():
            counts = [entry["fingerprints"][str(layer)] for entry in entries]
            pieces[layer] = list(zip(*(tensor.split(counts) for tensor in tensors), strict=True))
        batches = [
            _batch_from_json(entry, {k: MergedFactors(*pieces[k][i]) for k in layers})
            for i, entry in enumerate(entries)
        ]
        return Base(len(batches), file), batches


def read_batch_of_1(layers: Sequence[int], file: TensorFile, entry: Mapping[str, Any]) -> Batch:
    """A batch of format version 1, whose edits are in the configuration's `entry`. It counts as
    not stored, so that saving writes it into a file of its own in the present format."""
    marks = _read_marks(layers, file.read(_mark_names(layers)))
    batch = _batch_from_json(entry, {k: StoredFactors(file, k, *marks[k]) for k in layers})
    for edit, data in zip(batch.edits, entry["edits"], strict=True):
        edit.enabled = bool(data["enabled"])
    return batch


def _counts(batch: Batch) -> dict[str, int]:
    return {str(layer): len(factors.owner) for layer, factors in batch.layers.items()}


def _packed(value: Any) -> dict[str, Tensor]:
    data = bytearray(json.dumps(value, ensure_ascii=False).encode())
    return {_RECORDS: torch.frombuffer(data, dtype=torch.uint8)}


def _mark_names(layers: Sequence[int]) -> list[str]:
    return [f"{name}.{layer}" for layer in layers for name in _MARKS]


def _read_marks(
    layers: Sequence[int], held: Mapping[str, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    return {k: (held[f"fingerprints.{k}"], held[f"owner.{k}"]) for k in layers}


def _read(layers: Sequence[int], file: TensorFile) -> tuple[Any, dict[int, tuple[Tensor, Tensor]]]:
    """The JSON in a file, and the fingerprints of each layer with their owners."""
    held = file.read([_RECORDS, *_mark_names(layers)])
    return _unpacked(held), _read_marks(layers, held)


def _unpacked(held: Mapping[str, Tensor]) -> Any:
    return json.loads(held[_RECORDS].numpy().tobytes())


def _batch_to_json(batch: Batch) -> dict[str, Any]:
    return {
        "edits": [edit_to_json(edit) for edit in batch.edits],
        "thresholds": {str(k): _threshold_to_json(v) for k, v in batch.thresholds.items()},
    }


def _batch_from_json(
    entry: Mapping[str, Any], layers: dict[int, Factors], stored: TensorFile | None = None
) -> Batch:
    if not entry["edits"]:
        raise KeyError("edits of a batch")
    return Batch(
        edits=[edit_from_json(edit) for edit in entry["edits"]],
        layers=layers,
        thresholds={k: _threshold_from_json(entry["thresholds"][str(k)]) for k in layers},
        stored=stored,
    )


def _threshold_to_json(threshold: Threshold) -> dict[str, float | None]:
    # JSON has no infinity, which is the α of a gate that nothing opens.
    return {k: v if math.isfinite(v) else None for k, v in asdict(threshold).items()}


def _threshold_from_json(data: Mapping[str, float | None]) -> Threshold:
    return Threshold(**{k: math.inf if v is None else float(v) for k, v in data.items()})
