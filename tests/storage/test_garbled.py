"""Files with a checksum that fits and contents that do not: refused by name, whatever they hold.

And what is not damage: errors of our own.
"""

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coachhook.errors import CorruptFolderError, OlderFormatError
from coachhook.journal.compaction import merge
from coachhook.storage import batch_file
from coachhook.storage.folder import CONFIG_NAME, load, save
from coachhook.system.tensor_file import pack
from tests.support.journals import LAYERS, contents, file_like, files, rewrite

OTHERS: list[Any] = [None, [], {}, "x", "1", 3, -1, 0.5, float("nan"), True, [3], {"1": 3}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path, contents(2))
    return tmp_path


@pytest.fixture
def compacted(tmp_path: Path) -> Path:
    held = contents(3)
    merge(held.journal, 1, LAYERS, ())
    save(tmp_path, held)
    return tmp_path


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of everything in a document, but for itself."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*place, key)
            yield from places(inner, (*place, key))


def variants(document: Any) -> Iterator[Any]:
    """The document with something else in place of one of its parts, or without it; others in its
    own place. Of all there are, which take several seconds, 300."""
    yield from OTHERS
    everything = [(place, other) for place in places(document) for other in (*OTHERS, ...)]
    for (*parents, last), other in random.Random(0).sample(everything, 300):
        changed = deepcopy(document)
        holder = changed
        for key in parents:
            holder = holder[key]
        if other is ...:
            del holder[last]
        else:
            holder[last] = other
        yield changed


def replace_file(folder: Path, pattern: str, change: Callable[[dict[str, Tensor]], None]) -> str:
    """Put another file in the place of one, named by the configuration. Returns its name."""
    old = file_like(folder, pattern)
    tensors = load_file(old)
    change(tensors)
    name, data = pack(old.name.rpartition("-")[0], tensors)
    (folder / name).write_bytes(data)

    def rename(config: dict[str, Any]) -> None:
        config["batches"] = [name if found == old.name else found for found in config["batches"]]
        for key in ("sketches", "base"):
            config[key] = name if config[key] == old.name else config[key]

    rewrite(folder, rename)
    return name


def with_records(records: Any) -> Callable[[dict[str, Tensor]], None]:
    data = list(json.dumps(records).encode())
    return lambda tensors: tensors.update(records=torch.tensor(data, dtype=torch.uint8))


def records_of(folder: Path, pattern: str) -> Any:
    return json.loads(load_file(file_like(folder, pattern))["records"].numpy().tobytes())


def refusal(folder: Path, otherwise: str) -> str:
    """What `load` says where it refuses the folder."""
    try:
        load(folder)
    except CorruptFolderError as error:
        return str(error)
    return otherwise


def test_whatever_stands_in_the_configuration(folder: Path) -> None:
    original = (folder / CONFIG_NAME).read_text()
    config = json.loads(original)
    del config["digest"]
    for changed in variants(config):
        if not isinstance(changed, dict) or changed.get("format_version") != 2:
            continue
        rewrite(folder, lambda found, changed=changed: (found.clear(), found.update(changed)))
        assert str(folder) in refusal(folder, str(folder))
        (folder / CONFIG_NAME).write_text(original)


@pytest.mark.parametrize("pattern", ["batch-0001-*", "base-0002-*"])
def test_whatever_stands_in_the_records_of_a_file(compacted: Path, pattern: str) -> None:
    if pattern.startswith("batch"):
        pattern = "batch-0003-*"
    records = records_of(compacted, pattern)
    before = files(compacted)
    for changed in variants(records):
        name = replace_file(compacted, pattern, with_records(changed))
        said = refusal(compacted, name)
        assert name in said or CONFIG_NAME in said
        for path in compacted.iterdir():
            if path.name not in before:
                path.unlink()
        (compacted / CONFIG_NAME).write_bytes(before[CONFIG_NAME])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [], "the document: Input should be an object, found []"),
        (lambda r: r | {"edits": {"0": r["edits"][0]}}, "edits: Input should be a valid array"),
        (lambda r: r | {"edits": []}, "edits: List should have at least 1 item"),
        (lambda r: {"edits": r["edits"]}, "thresholds is missing"),
        (lambda r: r | {"thresholds": {"1": r["thresholds"]["1"]}}, "layer 3 is missing"),
        (lambda r: r | {"thresholds": {"1": {}, "3": {}}}, "threshold of layer 1: expected"),
        (lambda r: [r["edits"][0].update(id="0"), r][1], "edits[0].id: Input should be a valid"),
        (lambda r: [r["edits"][0].update(id=-1), r][1], "edits[0].id: Input should be great"),
        (lambda r: [r["edits"][0].update(reason=3), r][1], "edits[0].reason: Input should be"),
        (lambda r: [r["edits"][1].update(verdict="x"), r][1], "edits[1].verdict: Input should be"),
        (lambda r: [r["edits"][1]["request"].pop("subject"), r][1], "subject"),
    ],
)
def test_what_is_wrong_in_a_batch_is_told(
    folder: Path, change: Callable[[Any], Any], message: str
) -> None:
    changed = change(records_of(folder, "batch-0001-*"))
    name = replace_file(folder, "batch-0001-*", with_records(changed))
    with pytest.raises(CorruptFolderError) as caught:
        load(folder)
    assert name in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fingerprints.1"), "tensor fingerprints.1 is missing"),
        (lambda t: t.pop("residuals.3"), "tensor residuals.3 is missing"),
        (lambda t: t.update({"owner.1": t["owner.1"].float()}), "expected torch.int64"),
        (lambda t: t.update({"owner.1": t["owner.1"][:2]}), "expected torch.int64 of shape (3)"),
        (lambda t: t.update({"owner.1": t["owner.1"] + 1}), "belong to edits that are not there"),
        (lambda t: t.update({"owner.1": t["owner.1"] - 1}), "belong to edits that are not there"),
        (lambda t: t.update({"keys.3": t["keys.3"].half()}), "expected torch.float32 of shape"),
        (lambda t: t.update({"keys.3": t["keys.3"][:, :5].clone()}), "of shape (any, 12), found"),
        (lambda t: t.update({"residuals.1": t["residuals.1"][:1]}), "of shape (2, 8), found"),
        (lambda t: t.update({"records": t["records"].float()}), "tensor records: expected"),
        (lambda t: t.update({"fingerprints.1": torch.zeros(3, 9)}), "of shape (any, 4), found"),
    ],
)
def test_a_tensor_of_another_kind_is_told(
    folder: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    name = replace_file(folder, "batch-0001-*", change)
    with pytest.raises(CorruptFolderError) as caught:
        load(folder)
    assert name in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("down.1"), "tensor down.1 is missing"),
        (lambda t: t.update({"down.3": t["down.3"].double()}), "tensor down.3: expected"),
        (lambda t: t.update({"up.1": torch.zeros(8, 5)}), "tensor up.1: expected"),
        (lambda t: [t.pop("keys.1", None), t.pop("gram.1", None)], "tensor keys.1 is missing"),
        (lambda t: t.update({"owner.1": t["owner.1"] + 9}), "belong to edits that are not there"),
    ],
)
def test_a_base_of_another_kind_is_told(
    compacted: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    name = replace_file(compacted, "base-0002-*", change)
    with pytest.raises(CorruptFolderError) as caught:
        load(compacted)
    assert name in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("counts", "message"),
    [((-1, 7), "or equal to 0, found -1"), ((3, 4), "count 7 fingerprints of layer 1")],
)
def test_a_base_that_miscounts(compacted: Path, counts: tuple[int, int], message: str) -> None:
    records = records_of(compacted, "base-0002-*")
    for entry, count in zip(records, counts, strict=True):
        entry["fingerprints"]["1"] = count
    replace_file(compacted, "base-0002-*", with_records(records))
    with pytest.raises(CorruptFolderError) as caught:
        load(compacted)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.update({"offset.1": t["offset.1"].half()}),
        lambda t: t.update({"offset.1": t["offset.1"][:2]}),
        lambda t: t.update({"projection.3": t["projection.3"][:, :2].clone()}),
        lambda t: t.pop("projection.3"),
    ],
)
def test_sketches_of_another_kind(
    folder: Path, change: Callable[[dict[str, Tensor]], None]
) -> None:
    replace_file(folder, "sketches-*", change)
    with pytest.raises(CorruptFolderError, match=r"sketches-\w+.safetensors.*tensor (offset|proj)"):
        load(folder)


def test_saving_over_a_garbled_configuration_is_refused(folder: Path) -> None:
    rewrite(folder, lambda config: config.update(base_model=[]))
    before = files(folder)
    with pytest.raises(CorruptFolderError, match="base_model: Input should be an object, found"):
        save(folder, contents(3))
    assert files(folder) == before


@pytest.mark.parametrize("error", [AttributeError, TypeError, KeyError, IndexError, ValueError])
def test_a_bug_is_not_taken_for_damage(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def broken(*_: Any) -> None:
        raise error("'list' object has no attribute 'items'")

    monkeypatch.setattr(batch_file, "edit_from_json", broken)
    with pytest.raises(error):
        load(folder)


@pytest.mark.parametrize("version", [0, 1])
def test_an_earlier_format_is_named(folder: Path, version: int) -> None:
    """Version 1 kept all edits in the configuration, under the same names."""
    rewrite(
        folder, lambda config: config.update(format_version=version, batches=[{"file": "batch"}])
    )
    before = files(folder)
    for attempt in (lambda: load(folder), lambda: save(folder, contents(3))):
        with pytest.raises(OlderFormatError, match=f"format version {version}"):
            attempt()
    assert {k: v for k, v in files(folder).items() if k in before} == before
