"""The folder of an edited model on disk: written whole or not at all, checked when read.

`hook_config.json` names every other file with its SHA-256 and is replaced last, in one rename. A
process killed at any moment leaves the folder as last saved.

A batch's file holds its edits too, so the cost of saving one more batch does not depend on how many
there are: the configuration only gains a file name.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import TypedDict

from coachhook.config import EditConfig, completed
from coachhook.errors import (
    CorruptFolderError,
    FolderError,
    FolderLockedError,
    NewerFormatError,
    OlderFormatError,
    SaveError,
)
from coachhook.hooks.gates import GATES, Threshold
from coachhook.journal.journal import Base, Batch, Journal
from coachhook.models.base import BaseModel
from coachhook.storage.batch_file import (
    Expected,
    base_tensors,
    batch_tensors,
    intact,
    read_base,
    read_batch,
)
from coachhook.system.files import file_lock, remove_unwritten
from coachhook.system.json_shapes import Count, MisshapenError, Number, checked, parsed
from coachhook.system.progress import each
from coachhook.system.tensor_file import TensorFile, check, pack, write

FORMAT_VERSION = 2
CONFIG_NAME = "hook_config.json"
_OURS = re.compile(r"(batch-\d+|base-\d+|sketches)-[0-9a-f]{64}\.safetensors")


class _ModelEntry(TypedDict):
    """`BaseModel` in JSON. layers: `[d_in, d_out]` of each hooked layer."""

    name: str
    checksums: dict[str, str]
    template: str
    layers: dict[Number, list[Count]]


class _Versioned(TypedDict):
    format_version: Any


class ConfigEntry(TypedDict):
    """`hook_config.json`. sketches, base, batches: names of files beside it; disabled: ids of
    disabled edits; settings: an `EditConfig`; digest: SHA-256 of all the other fields."""

    format_version: int
    base_model: _ModelEntry
    settings: dict[str, Any]
    sketches: str
    base: str | None
    batches: list[str]
    disabled: list[Count]
    digest: str


@dataclass
class Contents:
    """All that a folder holds. digest: its configuration's, as last read or written."""

    base: BaseModel
    config: EditConfig
    sketches: Mapping[int, tuple[Tensor, Tensor]]
    journal: Journal
    digest: str | None = None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder for this process. Raises `FolderLockedError` if another has locked it,
    `SaveError` if it cannot be made or locked."""
    with ExitStack() as holding:
        try:
            # Reentrant: a process that has locked the folder locks it again to save.
            holding.enter_context(file_lock(folder / ".lock"))
        except BlockingIOError:
            raise FolderLockedError(
                f"{folder} is being edited by another process; wait for it, or use another folder"
            ) from None
        except OSError as error:
            raise SaveError(f"cannot make or lock {folder}: {error.strerror}") from error
        yield


def exists(folder: Path) -> bool:
    """Whether `folder` holds hooks."""
    return (folder / CONFIG_NAME).is_file()


def save(folder: Path, contents: Contents) -> None:
    """Write `contents`; files already there are not written again. See `HookSet.save_pretrained`.

    If the folder already holds edits, `contents` must have been read from it (`contents.digest` is
    still the folder's) or continue its batches; anything else would lose somebody's edits. Updates
    `contents.digest`; from now on the batches read their factors from the folder.
    """
    journal, folder = contents.journal, folder.resolve()
    with locked(folder):
        sketches, data = pack("sketches", _flatten_pairs(contents.sketches))
        if exists(folder):
            _check_related(folder, contents, sketches)
        elif any(folder.glob("batch-0002-*.safetensors")) or any(folder.glob("base-*.safetensors")):
            raise CorruptFolderError(
                f"{folder} holds batches but no {CONFIG_NAME}, which was there once; restore it "
                "from a copy, or use another folder"
            )
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        if sizes.get(sketches) != len(data):
            write(folder / sketches, data)
        base = None if journal.base is None else _store(folder, sizes, *_base(journal))
        unmerged = range(journal.merged, len(journal.batches))
        batches = [_store(folder, sizes, *_batch(journal, i)) for i in unmerged]
        config: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "base_model": _model_to_json(contents.base),
            "settings": contents.config.to_dict(),
            "sketches": sketches,
            "base": None if base is None else base.name,
            "batches": [file.name for file in batches],
            "disabled": [edit.id for edit in journal.edits() if not edit.enabled],
        }
        config["digest"] = digest = _digest(config)
        write(folder / CONFIG_NAME, (json.dumps(config, indent=1) + "\n").encode())
        if journal.base is not None and base is not None:
            journal.base.tensors = base
        for i, file in zip(unmerged, batches, strict=True):
            if journal.batches[i].stored is not file:
                journal.batches[i].move_to(file)
        for name in sizes.keys() - {sketches, config["base"], *config["batches"]}:
            if _OURS.fullmatch(name) is not None:
                (folder / name).unlink(missing_ok=True)
        remove_unwritten(folder)
    contents.digest = digest


def follow(folder: Path, journal: Journal) -> None:
    """Read the factors of `journal`'s batches from `folder`, where another process has just saved
    them, from now on; batches whose files this process does not see there stay in memory."""
    if not exists(folder):
        return
    names = read_config(folder)["batches"]
    for batch, name in zip(journal.batches[journal.merged :], names, strict=True):
        if batch.stored is None and (folder / name).is_file():
            batch.move_to(_file(folder, name))


def load(folder: Path) -> Contents:
    """Read a folder, checking its version and every checksum. See `HookSet.from_pretrained`.

    Of each batch only edits, thresholds and fingerprints are read; its other factors stay on disk.
    """
    config = read_config(folder)
    with intact(folder / CONFIG_NAME):
        base = _model_from_json(config["base_model"])
        settings = EditConfig.from_dict(config["settings"])
        sketches = _sketches(base, _file(folder, config["sketches"]))
        expected = Expected(
            layers=base.shapes,
            sizes={layer: len(offset) for layer, (_, offset) in sketches.items()},
            threshold=threshold_type(settings),
            rows=_rows(settings, base),
        )
        journal = _journal(folder, config, expected)
        if [edit.id for edit in journal.edits()] != list(range(len(journal.edits()))):
            raise MisshapenError("the edits are not numbered from 0, one by one")
        for edit in journal.edits():
            if any(other >= len(journal.edits()) for other in edit.shares):
                raise MisshapenError(f"the row of edit {edit.id} says edits that are not there")
        return Contents(base, settings, sketches, journal, config["digest"])


def threshold_type(settings: EditConfig) -> type[Threshold]:
    """The type of a layer's threshold under these settings."""
    return GATES[settings.gate].threshold_type if settings.readout == "delta" else Threshold


def _rows(settings: EditConfig, base: BaseModel) -> int | None:
    """How many rows an edit has. Raises `MisshapenError` if the settings do not say, or name
    another gate block than the one whose keys were measured."""
    if settings.readout == "delta":
        return None
    if settings.memory.gate_block is None or settings.memory.write_blocks is None:
        raise MisshapenError("settings.memory names no gate block or no write blocks")
    if base.layers != (settings.memory.gate_block,):
        raise MisshapenError(
            f"settings.memory.gate_block is {settings.memory.gate_block}, and the fingerprints are "
            f"of block {', '.join(map(str, base.layers))}"
        )
    return len(settings.memory.write_blocks)


def read_config(folder: Path) -> ConfigEntry:
    """`hook_config.json`, checked for version, tampering and shape."""
    path = folder / CONFIG_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FolderError(
            f"{folder} holds no hooks: there is no {CONFIG_NAME}; "
            "name the folder that save_pretrained or 'coachhook edit --hooks' wrote"
        ) from None
    except OSError as error:
        raise FolderError(f"cannot read {path}: {error.strerror}") from error
    with intact(path):
        config = parsed(data)
        version = checked(config, _Versioned)["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise NewerFormatError(
                f"{folder} has format version {version}, this coachhook reads {FORMAT_VERSION}; "
                "install a newer coachhook"
            )
        if version < FORMAT_VERSION:
            raise OlderFormatError(
                f"{folder} has format version {version}, which no released coachhook wrote; "
                f"this one reads only {FORMAT_VERSION}; edit the facts again into a new folder"
            )
        if config.get("digest") != _digest(config):
            raise MisshapenError("it was changed after it was written")
        found: ConfigEntry = checked(config, ConfigEntry)
        checked(completed(found["settings"]), EditConfig, "settings")
        return found


def _model_to_json(base: BaseModel) -> dict[str, Any]:
    return {
        "name": base.name,
        "checksums": dict(base.checksums),
        "template": base.template,
        "layers": {str(layer): list(shape) for layer, shape in base.shapes.items()},
    }


def _model_from_json(entry: _ModelEntry) -> BaseModel:
    shapes = {}
    for layer, shape in entry["layers"].items():
        if len(shape) != 2:
            raise MisshapenError(f"base_model.layers.{layer}: expected two numbers, found {shape}")
        shapes[int(layer)] = (shape[0], shape[1])
    return BaseModel(entry["name"], entry["checksums"], entry["template"], shapes)


def _sketches(base: BaseModel, file: TensorFile) -> dict[int, tuple[Tensor, Tensor]]:
    """Projection `(s, d_in)` and offset `(s,)` of each layer. Raises `MisshapenError`."""
    headers = file.headers()
    try:
        for layer, (d_in, _) in base.shapes.items():
            size, _ = check(headers, f"projection.{layer}", torch.float32, None, d_in)
            check(headers, f"offset.{layer}", torch.float32, size)
    except MisshapenError as error:
        raise MisshapenError(f"it does not fit {file.name}: {error}") from error
    return {k: (file[f"projection.{k}"], file[f"offset.{k}"]) for k in base.shapes}


def _digest(config: Mapping[str, Any]) -> str:
    body = {key: value for key, value in config.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


# For `_store`: the stem of a file name, the file if already stored, and what makes its tensors.
_Parts = tuple[str, TensorFile | None, Callable[[], Mapping[str, Tensor]]]


def _batch(journal: Journal, index: int) -> _Parts:
    batch = journal.batches[index]
    return f"batch-{index + 1:04d}", batch.stored, partial(batch_tensors, batch)


def _base(journal: Journal) -> _Parts:
    assert journal.base is not None
    stored = journal.base.tensors if isinstance(journal.base.tensors, TensorFile) else None
    return f"base-{journal.merged:04d}", stored, partial(base_tensors, journal)


def _store(
    folder: Path,
    sizes: Mapping[str, int],
    stem: str,
    stored: TensorFile | None,
    tensors: Callable[[], Mapping[str, Tensor]],
) -> TensorFile:
    """The file in `folder` with these contents, written unless it is there already.

    sizes: in bytes, of the files in the folder, by name.
    """
    if stored is None:
        name, data = pack(stem, tensors())
    elif sizes.get(stored.name) == stored.size:
        # Stored files never change: one of the right size that is here already is not read again.
        same = stored.path.parent == folder
        return stored if same else TensorFile(folder / stored.name, stored.size)
    else:
        name, data = stored.name, stored.data()
    if sizes.get(name) != len(data):
        write(folder / name, data)
    return TensorFile(folder / name, len(data))


def _check_related(folder: Path, contents: Contents, sketches: str) -> None:
    """Raise `FolderError` if saving `contents` would lose edits that it does not continue."""
    config = read_config(folder)
    if contents.digest is not None:
        if config["digest"] != contents.digest:
            raise FolderError(
                f"{folder} was changed by another process since it was read; resume it again"
            )
        return
    journal, there = contents.journal, config["batches"]
    last = min(len(journal.batches), journal.merged + len(there))
    ours = [_name(*_batch(journal, i)) for i in range(journal.merged, last)]
    base = None if journal.base is None else _name(*_base(journal))
    if (
        config["base_model"]["checksums"] != dict(contents.base.checksums)
        or config["sketches"] != sketches
        or config["base"] != base
        or there != ours
    ):
        raise FolderError(
            f"{folder} holds other edits than these; save to a new folder, or resume that one"
        )


def _name(stem: str, stored: TensorFile | None, tensors: Callable[[], Mapping[str, Tensor]]) -> str:
    return pack(stem, tensors())[0] if stored is None else stored.name


def _flatten_pairs(sketches: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    tensors = {f"projection.{layer}": pair[0] for layer, pair in sketches.items()}
    return tensors | {f"offset.{layer}": pair[1] for layer, pair in sketches.items()}


def _journal(folder: Path, config: ConfigEntry, expected: Expected) -> Journal:
    base: Base | None = None
    batches: list[Batch] = []
    if config["base"] is not None:
        base, batches = read_base(expected, _file(folder, config["base"]))
    for name in each("reading the folder", config["batches"]):
        batches.append(read_batch(expected, _file(folder, name)))
    disabled = set(config["disabled"])
    for edit in (edit for batch in batches for edit in batch.edits):
        edit.enabled = edit.id not in disabled
    return Journal(batches, base)


def _file(folder: Path, name: str) -> TensorFile:
    path = folder.resolve() / name
    if Path(name).name != name:
        raise CorruptFolderError(f"{folder / CONFIG_NAME} names a file outside its folder: {name}")
    try:
        return TensorFile(path, path.stat().st_size)
    except OSError as error:
        raise CorruptFolderError(
            f"{path} cannot be read ({error.strerror}); load the folder again if another process "
            "is compacting it or rolling it back, else restore it from a copy"
        ) from error
