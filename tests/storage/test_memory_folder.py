"""A folder of the memory readout that was damaged, mixed up or meant for another model: refused
with a typed error wherever it is met, and what was in force stays so."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coachhook import Editor, EditRequest, HookSet
from coachhook.errors import BaseModelMismatchError, CorruptFolderError, FolderError
from coachhook.hooks.memory import MemoryHook, MemoryRows
from coachhook.storage.folder import CONFIG_NAME
from coachhook.system.tensor_file import pack
from tests.support.journals import file_like, files, rewrite
from tests.support.memory_readout import FACTS, OTHER, WRITES, editor_of, logits, with_rows
from tests.support.tiny import HIDDEN, TARGETS, tiny_model, tiny_tokenizer

MORE = EditRequest("We think of {}", "Brazil", TARGETS[3])
TEXTS = (*[fact.prompt for fact in FACTS], MORE.prompt, OTHER)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two batches."""
    path = tmp_path_factory.mktemp("edits") / "edits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        editor = with_rows(editor_of())
        editor.edit([MORE], values=torch.ones(1, len(WRITES), HIDDEN))
        editor.save_pretrained(path)
        yield path


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "edits")


def unedited(model: Any) -> bool:
    found, plain = logits(model, *TEXTS), logits(tiny_model("llama"), *TEXTS)
    hooked = any(isinstance(part, MemoryHook | MemoryRows) for part in model.modules())
    return not hooked and all(map(torch.equal, found, plain))


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut off in the middle": lambda data: data[: len(data) // 2],
    "a byte flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
}


@pytest.mark.parametrize("pattern", [CONFIG_NAME, "sketches-*", "batch-0001-*", "batch-0002-*"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_when_loaded_and_resumed(damage: str, pattern: str, folder: Path) -> None:
    path = file_like(folder, pattern)
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    with pytest.raises(CorruptFolderError, match=path.name):
        HookSet.from_pretrained(folder)
    model = tiny_model("llama")
    with pytest.raises(CorruptFolderError, match=path.name):
        Editor.resume(folder, model, tiny_tokenizer())
    assert unedited(model)


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_after_loading_changes_nothing_in_memory_or_on_disk(
    damage: str, folder: Path
) -> None:
    """Rows are read from the folder when they are needed: to attach, to compact, to save."""
    hooks = HookSet.from_pretrained(folder)
    path = file_like(folder, "batch-0001-*")
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole))
    before = files(folder)
    model = tiny_model("llama")
    for run in (
        lambda: hooks.attach(model),
        hooks.compact,
        lambda: hooks.save_pretrained(folder.parent / "elsewhere"),
    ):
        with pytest.raises(CorruptFolderError, match=path.name):
            run()
        assert files(folder) == before
        assert hooks.journal.merged == 0
        assert unedited(model)
    path.write_bytes(whole)
    with hooks.attached(model):
        assert not unedited(model)


def test_damage_while_editing_leaves_the_edits_that_are_in_force(
    folder: Path, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    with Editor.resume(folder, tiny_model("llama"), tiny_tokenizer()) as editor:
        path = file_like(folder, "batch-0001-*")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        want = logits(editor.model, *TEXTS)
        for run in (
            lambda: editor.rollback(1),
            lambda: editor.save_pretrained(tmp_path / "elsewhere"),
        ):
            with pytest.raises(CorruptFolderError, match=path.name):
                run()
            assert all(map(torch.equal, logits(editor.model, *TEXTS), want))
            assert len(editor.hooks.journal.batches) == 2
        path.write_bytes(whole)
        editor.save_pretrained(folder)
    assert files(folder) == files(saved)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate_block": 0}, "gate_block is 0, and the fingerprints are of block 1"),
        ({"gate_block": None}, "names no gate block"),
        ({"write_blocks": None}, "no write blocks"),
        ({"write_blocks": [2]}, "rows.1"),
        ({"write_blocks": [0, 2]}, "runs before"),
    ],
)
def test_entries_of_other_blocks_are_refused(
    changed: dict[str, Any], message: str, folder: Path
) -> None:
    plain = (folder / CONFIG_NAME).read_text()
    config = json.loads(plain)
    config["settings"]["memory"].update(changed)
    (folder / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(CorruptFolderError, match="changed after it was written"):
        HookSet.from_pretrained(folder)
    (folder / CONFIG_NAME).write_text(plain)
    rewrite(folder, lambda found: found["settings"]["memory"].update(changed))
    with pytest.raises(CorruptFolderError, match=message):
        HookSet.from_pretrained(folder)


def test_blocks_that_the_model_does_not_have_are_refused(folder: Path) -> None:
    rewrite(folder, lambda found: found["settings"]["memory"].update(write_blocks=[1, 9]))
    model = tiny_model("llama")
    for check in (True, False):
        with pytest.raises(BaseModelMismatchError, match=r"block 9, and this .* has 4 blocks"):
            HookSet.from_pretrained(folder).attach(model, check=check)
    assert unedited(model)


def test_rows_that_say_edits_which_are_not_there_are_refused(folder: Path) -> None:
    old = file_like(folder, "batch-0001-*")
    tensors = load_file(old)
    records = json.loads(tensors["records"].numpy().tobytes())
    records["edits"][0]["shares"] = [99]
    tensors["records"] = torch.tensor(list(json.dumps(records).encode()), dtype=torch.uint8)
    name, data = pack("batch-0001", tensors)
    (folder / name).write_bytes(data)
    rewrite(folder, lambda found: found["batches"].__setitem__(0, name))
    with pytest.raises(CorruptFolderError, match="row of edit 0 says edits that are not there"):
        HookSet.from_pretrained(folder)


def test_a_folder_of_other_edits_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    hooks = HookSet.from_pretrained(folder)
    hooks.journal.forget_after(1)
    hooks.save_pretrained(tmp_path / "fewer")
    before = files(folder)
    with pytest.raises(FolderError, match=r"changed by another process|holds other edits"):
        HookSet.from_pretrained(tmp_path / "fewer").save_pretrained(folder)
    assert files(folder) == before


def test_a_folder_without_settings_that_came_later_has_todays(folder: Path) -> None:
    before = HookSet.from_pretrained(folder)
    rewrite(folder, lambda found: found["settings"]["memory"].pop("raised"))
    assert HookSet.from_pretrained(folder).config == before.config
    rewrite(folder, lambda found: found["settings"]["memory"].update(unheard_of=1))
    with pytest.raises(CorruptFolderError, match="unheard_of"):
        HookSet.from_pretrained(folder)
