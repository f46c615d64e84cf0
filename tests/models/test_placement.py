"""Models that accelerate has placed, block by block: edited and served as they are."""

from dataclasses import asdict, dataclass, replace
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
from coachhook.calibration.search import calibrate
from coachhook.errors import CoachhookError
from coachhook.evaluation.evaluate import Evaluation, evaluate
from coachhook.hooks.trace import Trace
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import input_device
from coachhook.plan import Sizes, edit_plan
from tests.support.tiny import LAYERS, TARGETS, tiny_lm, tiny_model, tiny_tokenizer

CONFIG = EditConfig(
    readout="delta",
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
# The same facts with all that an evaluation may ask.
ASKED = [
    replace(
        fact,
        paraphrases=("We heard about {}",),
        locality=(("They drove to Spain", TARGETS[2]),),
        truth=TARGETS[3],
    )
    for fact in FACTS
]
TEXT = "As I was told yesterday, the weather stayed dry in other news."
EMBEDDINGS = ("model.embed_tokens", "lm_head")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))


def placed(model: Any, device_map: dict[str, str], **options: Any) -> Any:
    return dispatch_model(model, device_map=device_map, force_hooks=True, **options)


def by_block(last: str) -> dict[str, str]:
    """Everything on the CPU, each block by itself, the last hooked one on `last`."""
    parts = (*EMBEDDINGS, "model.norm", "model.rotary_emb")
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


@dataclass
class Life:
    """What was seen of a model through all that is done with it."""

    verdicts: list[str]
    deltas: list[torch.Tensor]
    evaluation: Evaluation
    trace: Trace
    generated: list[int]
    # With all edits, after going back one batch, and without hooks.
    logits: list[torch.Tensor]


def life_of(model: Any, folder: Path) -> Life:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(FACTS[0].prompt, return_tensors="pt")
    logits = []

    def look() -> None:
        with torch.no_grad():
            logits.append(model(**ids).logits)

    first = Editor.from_pretrained(model, tokenizer, config=CONFIG)
    first.edit(ASKED[:1])
    first.save_pretrained(folder)
    first.close()
    with Editor.resume(folder, model, tokenizer) as editor:
        editor.edit(ASKED[1:])
        hooks = editor.hooks
        evaluation = evaluate(LanguageModel(model, tokenizer), hooks, ASKED, TEXT)
        trace = hooks.trace(model, tokenizer, FACTS[0].prompt)
        generated = model.generate(**ids, max_new_tokens=4, do_sample=False)[0].tolist()
        look()
        verdicts = [str(edit.verdict) for edit in hooks.edits]
        deltas = [hook.down.clone() for hook in hooks.modules(model).values()]
        editor.rollback(1)
        look()
    look()
    assert not any(isinstance(module, HookLinear) for module in model.modules())
    return Life(verdicts, deltas, evaluation, trace, generated, logits)


def assert_alike(found: Any, wanted: Any) -> None:
    """Two evaluations as dictionaries, and all they hold, are the same up to rounding."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        found, wanted = list(found.values()), list(wanted.values())
    if isinstance(wanted, list):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_alike(one, other)
    else:
        is_float = isinstance(wanted, float)
        assert found == (pytest.approx(wanted, rel=1e-4, abs=1e-5) if is_float else wanted)


@pytest.mark.parametrize(
    ("on_disk", "tied"),
    [
        pytest.param(EMBEDDINGS, True, id="tied embeddings"),
        pytest.param(EMBEDDINGS[:1], True, id="one of the tied embeddings"),
        pytest.param(EMBEDDINGS, False, id="untied embeddings"),
        pytest.param(("model.layers.3",), False, id="last block"),
        pytest.param(("model.layers.2",), False, id="hooked block"),
    ],
)
def test_a_model_partly_on_disk_is_like_one_in_memory(
    on_disk: tuple[str, ...], tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = life_of(tiny_model("llama", tied=tied), tmp_path / "edits")
    # Its own key statistics, not those that the first has just measured.
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    device_map = by_block("cpu") | dict.fromkeys(on_disk, "disk")
    model = placed(
        tiny_model("llama", tied=tied), device_map, offload_dir=str(tmp_path / "weights")
    )
    found = life_of(model, tmp_path / "edits on disk")
    assert any(weight.is_meta for weight in model.get_submodule(on_disk[0]).parameters())
    assert (found.verdicts, found.generated) == (wanted.verdicts, wanted.generated)
    assert_alike(asdict(found.evaluation), asdict(wanted.evaluation))
    assert_alike(found.trace.to_dict(), wanted.trace.to_dict())
    torch.testing.assert_close(found.deltas, wanted.deltas)
    torch.testing.assert_close(found.logits, wanted.logits)


def test_inputs_go_where_offloaded_embeddings_will_compute(tmp_path: Path) -> None:
    device_map = by_block("cpu") | dict.fromkeys(EMBEDDINGS, "disk")
    model = placed(tiny_model("llama"), device_map, offload_dir=str(tmp_path))
    assert input_device(model) == torch.device("cpu")
    model.model.embed_tokens._hf_hook.execution_device = "cuda:0"
    assert input_device(model) == torch.device("cuda:0")


@pytest.mark.parametrize("tied", [True, False])
def test_a_plan_counts_as_memory_what_is_in_memory(tied: bool, tmp_path: Path) -> None:
    model = tiny_model("llama", tied=tied)
    wanted = Sizes.of(model, Architecture.of(model))
    table = model.get_input_embeddings().weight
    device_map = by_block("cpu") | dict.fromkeys(EMBEDDINGS, "disk")
    model = placed(model, device_map, offload_dir=str(tmp_path))
    # A pass fetches tied weights and puts them away one by one.
    model(torch.tensor([[3]]))
    found = Sizes.of(model, Architecture.of(model))
    n_tables = 1 if tied else 2
    assert wanted.weights_bytes - found.weights_bytes == n_tables * 4 * table.numel()
    assert replace(found, weights_bytes=wanted.weights_bytes) == wanted
    plan = edit_plan(found, (1, 2), CONFIG, tiny_tokenizer(), FACTS, 2)
    assert plan.in_place == {"cpu": found.weights_bytes}


def test_a_model_partly_on_disk_is_calibrated(tmp_path: Path) -> None:
    source = StatisticsSource(n_tokens=512)
    wanted = calibrate(tiny_lm(tiny_model("gpt2")), layers=(1,), source=source, minutes=0)
    parts = ("transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head")
    device_map = dict.fromkeys(parts, "disk") | {"transformer.h": "cpu"}
    model = placed(tiny_model("gpt2"), device_map, offload_dir=str(tmp_path / "weights"))
    found = calibrate(tiny_lm(model), layers=(1,), source=source, minutes=0)
    assert found.profile.settings == wanted.profile.settings
    assert found.trials[0].scores == wanted.trials[0].scores


def test_weights_without_values_are_refused() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(CoachhookError, match="load the model with its weights"):
        Editor.from_pretrained(model, tiny_tokenizer(), config=CONFIG)
