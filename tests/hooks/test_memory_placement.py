"""The memory readout on models that accelerate places over devices: before hooks, and after."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model

from coachhook import Editor, HookSet
from coachhook.errors import ModelError
from coachhook.hooks.memory import MemoryHook, MemoryRows
from tests.support.memory_readout import FACTS, OTHER, config, editor_of, logits, with_rows
from tests.support.tiny import LAYERS, tiny_model, tiny_tokenizer

PROMPTS = [fact.prompt for fact in FACTS]
TEXTS = (*PROMPTS, OTHER)
PARTS = ("model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb")


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[torch.Tensor]]]:
    """A folder, and what the model says with its edits."""
    path = tmp_path_factory.mktemp("edits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        editor = with_rows(editor_of())
        editor.save_pretrained(path)
        yield path, logits(editor.model, *TEXTS)


def dispatched(*on_disk: str, **options: Any) -> Any:
    """Places everything on the CPU, but for some blocks."""

    def place(model: Any, folder: Path) -> Any:
        blocks = {f"model.layers.{i}": "cpu" for i in range(LAYERS)}
        device_map = dict.fromkeys(PARTS, "cpu") | blocks | dict.fromkeys(on_disk, "disk")
        return dispatch_model(
            model, device_map=device_map, offload_dir=str(folder), force_hooks=True, **options
        )

    return place


def on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, str(folder), execution_device=torch.device("cpu"))


def in_memory(model: Any, _: Path) -> Any:
    return cpu_offload(model, execution_device=torch.device("cpu"))


PLACES = {
    "every block by itself": dispatched(),
    "the gate's block on disk": dispatched("model.layers.1"),
    "a write block on disk": dispatched("model.layers.2"),
    "both, and buffers too": dispatched("model.layers.1", "model.layers.2", offload_buffers=True),
    "all on disk": on_disk,
    "all offloaded": in_memory,
}


def equal(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("place", PLACES)
def test_hooks_attached_before_or_after_follow_edits_and_come_off(
    place: str, order: str, edits: tuple[Path, list[torch.Tensor]], tmp_path: Path
) -> None:
    folder, wanted = edits
    plain = logits(tiny_model("llama"), *TEXTS)
    hooks = HookSet.from_pretrained(folder)
    model = tiny_model("llama")
    if order == "before":
        hooks.attach(model)
    model = PLACES[place](model, tmp_path / "weights")
    if order == "after":
        hooks.attach(model)
    assert equal(logits(model, *TEXTS), wanted)
    assert not equal(wanted[:2], plain[:2])
    assert equal(wanted[2:], plain[2:])
    parts = [part for part in model.modules() if isinstance(part, MemoryHook | MemoryRows)]
    assert len(parts) == 3
    assert not any(buffer.is_meta for part in parts for buffer in part.buffers())
    hooks.disable(0)
    assert equal(logits(model, *TEXTS), [plain[0], *wanted[1:]])
    hooks.enable(0)
    hooks.save_pretrained(tmp_path / "again")
    blocks = [block for block in model.model.layers if hasattr(block, "_hf_hook")]
    wrapped = [vars(block)["forward"] for block in blocks]
    hooks.detach(model)
    assert [vars(block).get("forward") for block in blocks] == wrapped
    assert equal(logits(model, *TEXTS), plain)
    with HookSet.from_pretrained(tmp_path / "again").attached(model):
        assert equal(logits(model, *TEXTS), wanted)
    assert equal(logits(model, *TEXTS), plain)


def test_a_model_on_disk_is_edited_like_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = []
    for place in (lambda model, _: model, PLACES["all on disk"]):
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / f"cache {len(reports)}"))
        model = place(tiny_model("llama"), tmp_path / "weights")
        with Editor.from_pretrained(model, tiny_tokenizer(), config=config()) as editor:
            editor.edit(FACTS)
            reports.append((editor.hooks.edits, logits(model, *TEXTS)))
    (edits, found), (others, again) = reports
    assert edits == others
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_without_values_are_refused(edits: tuple[Path, list[torch.Tensor]]) -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(ModelError, match="load the model with its weights"):
        HookSet.from_pretrained(edits[0]).attach(model)
    assert not any(isinstance(part, MemoryHook | MemoryRows) for part in model.modules())
