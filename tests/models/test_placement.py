"""Models that accelerate has placed, block by block: edited and served as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model

from coachhook import (
    EditConfig,
    Editor,
    EditRequest,
    HookLinear,
    HookSet,
    StatisticsSource,
    ValueConfig,
)
from coachhook.errors import CoachhookError
from tests.support.tiny import LAYERS, TARGETS, tiny_model, tiny_tokenizer

CONFIG = EditConfig(
    layers=(1, 2),
    preservation=1.0,
    false_alarms=0.02,
    statistics=StatisticsSource(n_tokens=512),
    values=ValueConfig(steps=10, rate=0.3, clamp=8.0),
)
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))


def placed(model: Any, device_map: dict[str, str], **options: Any) -> Any:
    return dispatch_model(model, device_map=device_map, force_hooks=True, **options)


def by_block(last: str) -> dict[str, str]:
    """Everything on the CPU, each block by itself, the last hooked one on `last`."""
    parts = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    blocks = {f"model.layers.{i}": "cpu" for i in range(LAYERS)}
    return dict.fromkeys(parts, "cpu") | blocks | {"model.layers.2": last}


def edited(model: Any) -> tuple[Editor, torch.Tensor]:
    editor = Editor.from_pretrained(model, tiny_tokenizer(), config=CONFIG)
    editor.edit(FACTS)
    ids = editor.tokenizer(FACTS[0].prompt, return_tensors="pt")
    with torch.no_grad():
        return editor, model(**ids).logits


def test_a_placed_model_is_edited_like_any_other() -> None:
    plain, wanted = edited(tiny_model("llama"))
    editor, found = edited(placed(tiny_model("llama"), by_block("cpu")))
    torch.testing.assert_close(found, wanted)
    for layer, hook in editor.hooks.modules(editor.model).items():
        ours, theirs = hook.delta, plain.hooks.modules(plain.model)[layer].delta
        torch.testing.assert_close(ours.down, theirs.down)
        assert hook.down.device == hook.base.weight.device
    editor.close()
    assert not any(isinstance(module, HookLinear) for module in editor.model.modules())


def test_blocks_work_again_after_an_edit() -> None:
    """Optimising values takes blocks' forwards away for a while; accelerate's wrappers return."""
    model = placed(tiny_model("llama"), by_block("cpu"))
    before = [block.forward for block in model.model.layers]
    editor, _ = edited(model)
    editor.close()
    assert [block.forward for block in model.model.layers] == before


def test_a_hooked_layer_may_be_kept_on_disk(tmp_path: Path) -> None:
    _, wanted = edited(tiny_model("llama"))
    offloaded = placed(tiny_model("llama"), by_block("disk"), offload_dir=str(tmp_path / "off"))
    assert offloaded.model.layers[2].mlp.down_proj.weight.is_meta
    editor, found = edited(offloaded)
    torch.testing.assert_close(found, wanted)
    editor.save_pretrained(tmp_path / "edits")
    editor.close()
    with HookSet.from_pretrained(tmp_path / "edits").attached(offloaded):
        ids = editor.tokenizer(FACTS[0].prompt, return_tensors="pt")
        torch.testing.assert_close(offloaded(**ids).logits, wanted)


def test_weights_without_values_are_refused() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(CoachhookError, match="load the model with its weights"):
        Editor.from_pretrained(model, tiny_tokenizer(), config=CONFIG)
