"""A folder checked when it is read: what is damaged, missing, newer or nonsense is named."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coachhook.errors import CorruptFolderError, FolderError, NewerFormatError
from coachhook.storage.folder import CONFIG_NAME, FORMAT_VERSION, load, save
from coachhook.system.tensor_file import pack
from tests.support.journals import contents, file_like, files, rewrite


def leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from leaves(inner, (*place, key))
    else:
        yield place


def other_value(value: Any) -> Any:
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, str):
        return value + "x"
    return 0.0 if math.isinf(value) else value + 1


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        save(tmp_path, contents(2))
        return tmp_path

    @pytest.mark.parametrize("pattern", [CONFIG_NAME, "sketches-*", "batch-0001-*", "batch-0002-*"])
    @pytest.mark.parametrize(
        "damage",
        [
            pytest.param(lambda data: data[: len(data) // 2], id="truncated"),
            pytest.param(lambda data: data[:-1] if data[-1] != 10 else data[:-3], id="short"),
            pytest.param(lambda data: b"", id="emptied"),
            pytest.param(lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], id="flipped"),
            pytest.param(lambda data: bytes(len(data)), id="zeroed"),
            pytest.param(lambda data: b"\xff\xfe" + data, id="prefixed"),
        ],
    )
    def test_is_found_and_the_file_named(
        self, folder: Path, damage: Callable[[bytes], bytes], pattern: str
    ) -> None:
        path = file_like(folder, pattern)
        path.write_bytes(damage(path.read_bytes()))
        with pytest.raises(CorruptFolderError) as caught:
            load(folder)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize("pattern", ["sketches-*", "batch-0001-*", "batch-0002-*"])
    def test_a_missing_file_is_named(self, folder: Path, pattern: str) -> None:
        path = file_like(folder, pattern)
        path.unlink()
        with pytest.raises(CorruptFolderError) as caught:
            load(folder)
        assert path.name in str(caught.value)

    @pytest.mark.parametrize("made", [False, True], ids=["no-folder", "empty-folder"])
    def test_no_hooks_here(self, tmp_path: Path, made: bool) -> None:
        folder = tmp_path / "nothing"
        if made:
            folder.mkdir()
        with pytest.raises(FolderError, match=CONFIG_NAME) as caught:
            load(folder)
        assert not isinstance(caught.value, CorruptFolderError)
        assert str(folder) in str(caught.value)

    def test_every_field_of_the_configuration_is_guarded(self, folder: Path) -> None:
        path = folder / CONFIG_NAME
        original = path.read_text()
        places = list(leaves(json.loads(original)))
        assert len(places) > 35
        for place in places:
            config = json.loads(original)
            *parents, last = place
            holder = config
            for key in parents:
                holder = holder[key]
            holder[last] = other_value(holder[last])
            path.write_text(json.dumps(config))
            with pytest.raises(FolderError):
                load(folder)

    @pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "{}", "[" * 100_000, '{"a":'])
    def test_another_files_json_is_not_ours(self, folder: Path, text: str) -> None:
        folder.joinpath(CONFIG_NAME).write_text(text)
        with pytest.raises(CorruptFolderError, match=CONFIG_NAME):
            load(folder)

    @pytest.mark.parametrize(
        "key",
        ["base_model", "settings", "sketches", "base", "batches", "disabled"],
        ids=lambda key: f"no-{key}",
    )
    def test_a_configuration_without_a_part(self, folder: Path, key: str) -> None:
        rewrite(folder, lambda config: config.pop(key))
        with pytest.raises(CorruptFolderError, match=key):
            load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda c: c.update(base_model=[]), id="model-is-a-list"),
            pytest.param(lambda c: c.update(batches={"a": 1}), id="batches-are-a-map"),
            pytest.param(lambda c: c.update(batches=[3]), id="batch-is-a-number"),
            pytest.param(lambda c: c.update(sketches=None), id="no-name"),
            pytest.param(lambda c: c.update(settings="x"), id="settings-are-text"),
            pytest.param(lambda c: c["settings"].update(gate="magic"), id="unknown-gate"),
            pytest.param(lambda c: c["settings"].update(values=None), id="no-values"),
            pytest.param(lambda c: c.update(disabled=3), id="disabled-is-a-number"),
            pytest.param(lambda c: c.update(base=3), id="base-is-a-number"),
            pytest.param(lambda c: c["base_model"].update(layers={"9": [12, 8]}), id="other-layer"),
            pytest.param(lambda c: c["base_model"].update(layers={"1": [1]}), id="shape-is-short"),
        ],
    )
    def test_nonsense_with_a_valid_digest(
        self, folder: Path, change: Callable[[dict[str, Any]], None]
    ) -> None:
        rewrite(folder, change)
        with pytest.raises(CorruptFolderError, match=CONFIG_NAME):
            load(folder)

    @pytest.mark.parametrize(
        "records",
        [
            b'{"edits": [], "thresholds": {}}',
            b'{"edits": [{}], "thresholds": {}}',
            b'{"edits": 3}',
            b"[]",
            b"null",
            b'{"edits": [',
            b"\xff",
            b"",
        ],
    )
    def test_nonsense_in_the_file_of_a_batch(self, folder: Path, records: bytes) -> None:
        tensors = load_file(file_like(folder, "batch-0001-*"))
        tensors["records"] = torch.tensor(list(records), dtype=torch.uint8)
        name, data = pack("batch-0001", tensors)
        (folder / name).write_bytes(data)
        rewrite(folder, lambda config: config["batches"].__setitem__(0, name))
        with pytest.raises(CorruptFolderError, match=name):
            load(folder)

    @pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
    @pytest.mark.parametrize("which", ["sketches", "batch"])
    def test_a_name_outside_the_folder_is_refused(
        self, folder: Path, which: str, absolute: bool
    ) -> None:
        pattern = "sketches-*" if which == "sketches" else "batch-0001-*"
        path = file_like(folder, pattern)
        outside = folder.parent / path.name
        path.rename(outside)
        name = str(outside) if absolute else f"../{path.name}"

        def point_outside(config: dict[str, Any]) -> None:
            if which == "sketches":
                config["sketches"] = name
            else:
                config["batches"][0] = name

        rewrite(folder, point_outside)
        with pytest.raises(CorruptFolderError, match="outside") as caught:
            load(folder)
        assert name in str(caught.value)

    def test_a_file_that_is_no_safetensors(self, folder: Path) -> None:
        data = b"not tensors"
        name = f"batch-0001-{hashlib.sha256(data).hexdigest()}.safetensors"
        folder.joinpath(name).write_bytes(data)
        rewrite(folder, lambda config: config["batches"].__setitem__(0, name))
        with pytest.raises(CorruptFolderError, match="batch-0001"):
            load(folder)

    def test_a_file_of_another_kind_in_place_of_a_batch(self, folder: Path) -> None:
        name = file_like(folder, "sketches-*").name
        rewrite(folder, lambda config: config["batches"].__setitem__(0, name))
        with pytest.raises(CorruptFolderError):
            load(folder)

    @pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 99])
    def test_a_newer_version_is_named(self, folder: Path, version: int) -> None:
        path = folder / CONFIG_NAME
        path.write_text(json.dumps({"format_version": version, "all_else": "is different"}))
        with pytest.raises(NewerFormatError) as caught:
            load(folder)
        assert str(version) in str(caught.value)
        assert f"reads {FORMAT_VERSION}" in str(caught.value)
        before = files(folder)
        with pytest.raises(NewerFormatError):
            save(folder, contents(3))
        assert {k: v for k, v in files(folder).items() if k in before} == before
