"""The folder of an edited model on disk: written whole or not at all, checked when read.

`hook_config.json` names every other file with its SHA-256 and is replaced last, in one rename. A
process killed at any moment leaves the folder at its last whole batch.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from coachhook.config import EditConfig
from coachhook.errors import (
    CoachhookError,
    ConfigError,
    CorruptFolderError,
    FolderError,
    FolderLockedError,
    NewerFormatError,
    RequestError,
    SaveError,
)
from coachhook.gates import Threshold
from coachhook.journal import Batch, Journal, LayerFactors, edit_from_json, edit_to_json
from coachhook.models import BaseModel

FORMAT_VERSION = 1
CONFIG_NAME = "hook_config.json"
_STAGING = ".writing-"
_OURS = re.compile(r"(batch-\d+|sketches)-[0-9a-f]{64}\.safetensors")


@dataclass
class Contents:
    """All that a folder holds. digest: of its configuration when it was last read or written."""

    base: BaseModel
    config: EditConfig
    sketches: Mapping[int, tuple[Tensor, Tensor]]
    journal: Journal
    digest: str | None = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for one editing process. Raises `FolderLockedError` if another has it."""
    _make(folder)
    # A singleton, so that a process that holds the folder can save into it.
    lock = FileLock(folder / ".lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderLockedError(
            f"{folder} is being edited by another process; wait for it, or use another folder"
        ) from None
    except OSError as error:
        raise SaveError(f"cannot lock {folder}: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def exists(folder: Path) -> bool:
    """Whether `folder` holds hooks."""
    return (folder / CONFIG_NAME).is_file()


def save(folder: Path, contents: Contents) -> None:
    """Write `contents`; files that are already there are kept. See `HookSet.save_pretrained`.

    Where the folder already holds edits, `contents` must come from it (its digest is still
    `contents.digest`) or go on from it; anything else would lose somebody's edits. The digest of
    `contents` is brought up to date.
    """
    with locked(folder):
        sketches, data = _pack("sketches", _flatten_pairs(contents.sketches))
        if exists(folder):
            _check_related(folder, contents, sketches)
        elif any(folder.glob("batch-0002-*.safetensors")):
            raise CorruptFolderError(
                f"{folder} holds batches but no {CONFIG_NAME}, which was there once; restore it "
                "from a copy, or use another folder"
            )
        _store(folder / sketches, data)
        names = [sketches]
        for number, batch in enumerate(contents.journal.batches, 1):
            names.append(_store_batch(folder, number, batch))
        config = _to_json(contents, names)
        config["digest"] = _digest(config)
        _write(folder / CONFIG_NAME, (json.dumps(config, indent=1) + "\n").encode())
        for file in folder.iterdir():
            ours = _OURS.fullmatch(file.name) is not None and file.name not in names
            if ours or file.name.startswith(_STAGING):
                file.unlink(missing_ok=True)
    contents.digest = config["digest"]


def load(folder: Path) -> Contents:
    """Read a folder, checking its version and every checksum. See `HookSet.from_pretrained`."""
    config = read_config(folder)
    try:
        base = BaseModel(
            name=config["base_model"]["name"],
            checksums=config["base_model"]["checksums"],
            template=config["base_model"]["template"],
            shapes={int(k): (v[0], v[1]) for k, v in config["base_model"]["layers"].items()},
        )
        sketches = _read(folder, config["sketches"])
        return Contents(
            base=base,
            config=EditConfig.from_dict(config["settings"]),
            sketches={
                layer: (sketches[f"projection.{layer}"], sketches[f"offset.{layer}"])
                for layer in base.shapes
            },
            journal=Journal([_batch(folder, entry, base) for entry in config["batches"]]),
            digest=config["digest"],
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, CoachhookError) and not isinstance(error, ConfigError | RequestError):
            raise
        raise CorruptFolderError(
            f"{folder / CONFIG_NAME} lacks or garbles {error}; restore it from a copy"
        ) from error


def read_config(folder: Path) -> dict[str, Any]:
    """`hook_config.json`, checked for version and tampering."""
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version = config["format_version"]
    except FileNotFoundError:
        raise FolderError(
            f"{folder} holds no hooks: there is no {CONFIG_NAME}; "
            "name the folder that save_pretrained or 'coachhook edit --hooks' wrote"
        ) from None
    except OSError as error:
        raise FolderError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptFolderError(
            f"{path} is truncated or not ours ({error}); restore it from a copy"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{folder} has format version {version}, this coachhook reads up to {FORMAT_VERSION}; "
            "install a newer coachhook"
        )
    if config.get("digest") != _digest(config):
        raise CorruptFolderError(f"{path} was changed after it was written; restore it from a copy")
    result: dict[str, Any] = config
    return result


def _to_json(contents: Contents, names: Sequence[str]) -> dict[str, Any]:
    base = contents.base
    return {
        "format_version": FORMAT_VERSION,
        "base_model": {
            "name": base.name,
            "checksums": dict(base.checksums),
            "template": base.template,
            "layers": {str(layer): list(shape) for layer, shape in base.shapes.items()},
        },
        "settings": contents.config.to_dict(),
        "sketches": names[0],
        "batches": [
            {
                "file": name,
                "edits": [edit_to_json(edit) for edit in batch.edits],
                "thresholds": {str(k): _threshold_to_json(v) for k, v in batch.thresholds.items()},
            }
            for name, batch in zip(names[1:], contents.journal.batches, strict=True)
        ],
    }


def _threshold_to_json(threshold: Threshold) -> dict[str, float | None]:
    # JSON has no infinity, which is the α of a gate that nothing opens.
    return {k: v if math.isfinite(v) else None for k, v in asdict(threshold).items()}


def _threshold_from_json(data: Mapping[str, float | None]) -> Threshold:
    return Threshold(**{k: math.inf if v is None else float(v) for k, v in data.items()})


def _digest(config: Mapping[str, Any]) -> str:
    body = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _pack(stem: str, tensors: Mapping[str, Tensor]) -> tuple[str, bytes]:
    """A file's name and contents. The name carries the contents' SHA-256, so that a name in the
    checked configuration vouches for them."""
    data = tensors_to_bytes(dict(tensors))
    return f"{stem}-{hashlib.sha256(data).hexdigest()}.safetensors", data


def _store(target: Path, data: bytes) -> None:
    if not target.is_file() or target.stat().st_size != len(data):
        _write(target, data)


def _store_batch(folder: Path, number: int, batch: Batch) -> str:
    # A batch never changes, so a whole file of it that is already here needs no second look.
    if batch.stored is not None:
        name, size = batch.stored
        target = folder / name
        if target.is_file() and target.stat().st_size == size:
            return name
    name, data = _pack(f"batch-{number:04d}", _flatten(batch))
    _store(folder / name, data)
    batch.stored = name, len(data)
    return name


def _check_related(folder: Path, contents: Contents, sketches: str) -> None:
    """Raise `FolderError` where saving would lose edits that nobody asked to forget."""
    config = read_config(folder)
    if contents.digest is not None:
        if config["digest"] != contents.digest:
            raise FolderError(
                f"{folder} was changed by another process since it was read; resume it again"
            )
        return
    there = [entry["edits"] for entry in config["batches"]]
    ours = [[edit_to_json(edit) for edit in batch.edits] for batch in contents.journal.batches]
    for edit in (edit for batches in (there, ours) for batch in batches for edit in batch):
        edit.pop("enabled")
    if (
        config["base_model"]["checksums"] != dict(contents.base.checksums)
        or config["sketches"] != sketches
        or there != ours[: len(there)]
    ):
        raise FolderError(
            f"{folder} holds other edits than these; save to a new folder, or resume that one"
        )


def _flatten_pairs(sketches: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = {f"projection.{layer}": pair[0].contiguous() for layer, pair in sketches.items()}
    return tensors | {f"offset.{layer}": pair[1] for layer, pair in sketches.items()}


def _flatten(batch: Batch) -> dict[str, Tensor]:
    return {
        f"{name}.{layer}": tensor.contiguous()
        for layer, factors in batch.layers.items()
        for name, tensor in factors.tensors().items()
    }


def _batch(folder: Path, entry: Mapping[str, Any], base: BaseModel) -> Batch:
    if not entry["edits"]:
        raise KeyError("edits of a batch")
    tensors = _read(folder, entry["file"])
    names = LayerFactors.__dataclass_fields__
    return Batch(
        edits=[edit_from_json(edit) for edit in entry["edits"]],
        layers={
            layer: LayerFactors(**{name: tensors[f"{name}.{layer}"] for name in names})
            for layer in base.shapes
        },
        thresholds={
            layer: _threshold_from_json(entry["thresholds"][str(layer)]) for layer in base.shapes
        },
        stored=(entry["file"], (folder / entry["file"]).stat().st_size),
    )


def _read(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if Path(name).name != name:
        raise CorruptFolderError(f"{folder / CONFIG_NAME} names a file outside its folder: {name}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptFolderError(
            f"{path} cannot be read ({error.strerror}); restore it from a copy"
        ) from error
    if not name.endswith(f"-{hashlib.sha256(data).hexdigest()}.safetensors"):
        raise CorruptFolderError(
            f"{path} is truncated or was changed after it was written; restore it from a copy"
        )
    try:
        return tensors_from_bytes(data)
    except SafetensorError as error:
        raise CorruptFolderError(f"{path} is not a safetensors file: {error}") from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot make the folder {folder}: {error.strerror}") from error


def _write(target: Path, data: bytes) -> None:
    staging = target.with_name(f"{_STAGING}{os.getpid()}-{target.name[:40]}")
    try:
        with staging.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
    except OSError as error:
        raise SaveError(
            f"cannot write {target}: {error.strerror}; what the folder held before is intact"
        ) from error
    finally:
        staging.unlink(missing_ok=True)
