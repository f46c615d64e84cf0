"""Folders of format version 1, which kept all edits in the configuration."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coachhook.errors import CorruptFolderError, FolderError, SaveError
from coachhook.journal import tensor_file as tensorfile
from coachhook.journal.folder import CONFIG_NAME, FORMAT_VERSION, Contents, load, save
from coachhook.journal.journal import FACTORS, edit_to_json
from tests.support.journals import assert_same, batch, contents, file_like, files, rewrite


def save_as_1(folder: Path, given: Contents) -> None:
    """What version 1 wrote."""

    def store(stem: str, tensors: dict[str, Any]) -> str:
        name, data = tensorfile.pack(stem, tensors)
        (folder / name).write_bytes(data)
        return name

    sketches: dict[str, Any] = {}
    for layer, (projection, offset) in given.sketches.items():
        sketches |= {f"projection.{layer}": projection, f"offset.{layer}": offset}
    config: dict[str, Any] = {
        "format_version": 1,
        "base_model": {
            "name": given.base.name,
            "checksums": dict(given.base.checksums),
            "template": given.base.template,
            "layers": {str(layer): list(shape) for layer, shape in given.base.shapes.items()},
        },
        "settings": given.config.to_dict(),
        "sketches": store("sketches", sketches),
        "batches": [],
    }
    for number, b in enumerate(given.journal.batches, 1):
        tensors = {f"{n}.{k}": getattr(f, n) for k, f in b.layers.items() for n in FACTORS}
        config["batches"].append(
            {
                "file": store(f"batch-{number:04d}", tensors),
                "edits": [edit_to_json(e) | {"enabled": e.enabled} for e in b.edits],
                "thresholds": {
                    str(k): {n: None if v == float("inf") else v for n, v in vars(t).items()}
                    for k, t in b.thresholds.items()
                },
            }
        )
    body = json.dumps(config, sort_keys=True).encode()
    config["digest"] = hashlib.sha256(body).hexdigest()
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1))


def some() -> Contents:
    given = contents(3)
    given.journal.edits()[1].enabled = False
    return given


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_as_1(tmp_path, some())
    return tmp_path


def version(folder: Path) -> int:
    return int(json.loads((folder / CONFIG_NAME).read_text())["format_version"])


def test_is_read(folder: Path) -> None:
    assert_same(load(folder), some())


def test_saving_writes_it_anew(folder: Path) -> None:
    held, want = load(folder), some()
    held.journal.batches.append(batch(3))
    want.journal.batches.append(batch(3))
    save(folder, held)
    assert version(folder) == FORMAT_VERSION
    assert_same(held, want)
    assert_same(load(folder), want)
    assert len(list(folder.glob("*.safetensors"))) == 5


@pytest.mark.parametrize("failure", range(4))
def test_until_the_new_one_is_whole_it_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    """Three batches and the configuration are written."""
    held, left = load(folder), failure
    real = os.replace

    def fail(*args: Any) -> None:
        nonlocal left
        if left == 0:
            raise OSError(28, "No space left on device")
        left -= 1
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(SaveError):
            save(folder, held)
    assert version(folder) == 1
    assert_same(load(folder), some())
    save(folder, held)
    assert_same(load(folder), some())


def test_other_edits_are_not_saved_over_it(folder: Path) -> None:
    before = files(folder)
    with pytest.raises(FolderError, match="other edits"):
        save(folder, contents(3))
    assert {k: v for k, v in files(folder).items() if k in before} == before


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(edits=[{}]),
        lambda entry: entry.update(edits=[]),
        lambda entry: entry["edits"][0].pop("enabled"),
        lambda entry: entry.update(thresholds={}),
        lambda entry: entry.pop("file"),
        lambda entry: entry.update(file=3),
    ],
    ids=["empty-edit", "no-edits", "not-enabled-or-disabled", "no-thresholds", "no-file", "number"],
)
def test_nonsense_with_a_valid_digest(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(folder, lambda config: change(config["batches"][0]))
    with pytest.raises(CorruptFolderError, match=CONFIG_NAME):
        load(folder)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"\1"])
def test_damage_is_found(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    path = file_like(folder, "batch-0002-*")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CorruptFolderError, match=path.name):
        load(folder)
