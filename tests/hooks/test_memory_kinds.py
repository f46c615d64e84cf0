"""The memory readout asks for nothing but blocks: kinds of models that the registry does not know,
mixtures of experts among them, are edited, generate, and are left as they were."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coachhook import EditConfig, Editor, EditRequest, HookSet, StatisticsSource, ValueConfig
from coachhook.config import MemoryConfig
from coachhook.errors import ArchitectureError, ModelError
from coachhook.models.architecture import Architecture
from tests.support.tiny import TARGETS, VOCABULARY, tiny_tokenizer

_USUAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**_USUAL, **_EXPERTS, "moe_intermediate_size": 32, "head_dim": 8},
    "mixtral": {**_USUAL, **_LOCAL},
    "olmoe": {**_USUAL, **_EXPERTS},
    "gpt_oss": {**_USUAL, **_LOCAL, "head_dim": 8},
    "smollm3": _USUAL,
    "olmo3": _USUAL,
    "granite": _USUAL,
    "falcon": _USUAL,
    "mpt": {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_layers": 4,
        "n_heads": 4,
        "max_seq_len": 128,
    },
}
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
]
OTHER = "The following is well known."
CONFIG = EditConfig(
    readout="memory",
    preservation=1.0,
    statistics=StatisticsSource(n_tokens=1024),
    values=ValueConfig(steps=3, rate=0.3, clamp=2.0),
    memory=MemoryConfig(
        least=0.999,
        ordinary=0.9,
        neighbours=0.99,
        unlikely=100.0,
        starts=("a {}",),
    ),
)


def model_of(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind])).eval()


@torch.no_grad()
def logits(model: Any, text: str) -> torch.Tensor:
    found: torch.Tensor = model(
        input_ids=torch.tensor([tiny_tokenizer()(text)["input_ids"]])
    ).logits
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_edited_saved_loaded_and_detached(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    model = model_of(kind)
    before = [logits(model, text) for text in (FACTS[0].prompt, OTHER)]
    with Editor.from_pretrained(model, tiny_tokenizer(), config=CONFIG) as editor:
        editor.edit(FACTS)
        trace = editor.hooks.trace(model, tiny_tokenizer(), FACTS[0].prompt)
        assert trace.edit[trace.is_open].tolist() == [0]
        edited = [logits(model, text) for text in (FACTS[0].prompt, OTHER)]
        assert not torch.equal(edited[0], before[0])
        assert torch.equal(edited[1], before[1])
        ids = torch.tensor([tiny_tokenizer()(FACTS[0].prompt)["input_ids"]])
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
        editor.save_pretrained(tmp_path / "edits")
    again = [logits(model, text) for text in (FACTS[0].prompt, OTHER)]
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    with HookSet.from_pretrained(tmp_path / "edits").attached(model):
        assert torch.equal(logits(model, FACTS[0].prompt), edited[0])


def test_a_model_without_blocks_of_a_known_kind_says_what_to_name() -> None:
    model = model_of("smollm3")
    for block in model.model.layers:
        block.network = block.mlp
        del block.mlp
    with pytest.raises(ArchitectureError, match=r"0 lists of 4 blocks.*'model.layers.\{\}.mlp'"):
        Architecture.of_blocks(model)
    assert Architecture.of_blocks(model, "model.layers.{}.network").template


def test_state_space_blocks_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    model = model_of("smollm3")
    model.model.layers[1].mixer = torch.nn.Conv1d(1, 1, 1)
    with Editor.from_pretrained(model, tiny_tokenizer(), config=CONFIG) as editor:
        with pytest.raises(ModelError, match="block 1 is a state-space block"):
            editor.edit(FACTS)
        assert editor.hooks.edits == []
