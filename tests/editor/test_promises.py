"""What an editor promises whatever its caller does around an edit."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coachhook import EditConfig, Editor, EditRequest, HookSet, StatisticsSource, ValueConfig
from coachhook.errors import ConfigError, ContextLengthError
from coachhook.models.architecture import Architecture
from coachhook.statistics.measure import KeyStatistics, key_statistics
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

LAYERS = (1, 2)
FALSE_ALARMS = 0.02
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
    EditRequest("The year was {}", "1984", TARGETS[2]),
]
LATER = EditRequest("We think of {}", "Brazil", TARGETS[3])


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


def config(gate: str) -> EditConfig:
    return EditConfig(
        readout="delta",
        layers=LAYERS,
        gate=gate,
        preservation=1.0,
        false_alarms=FALSE_ALARMS,
        calibrated_alpha=0.1,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=10, rate=0.3, clamp=8.0),
    )


@pytest.fixture
def statistics() -> KeyStatistics:
    model = tiny_model("llama")
    source = StatisticsSource(n_tokens=1024)
    return key_statistics(tiny_lm(model), Architecture.of(model), LAYERS, source)


def editor_of(gate: str) -> Editor:
    with torch.inference_mode(False):
        model = tiny_model("llama")
    return Editor.from_pretrained(model, tiny_tokenizer(), config=config(gate))


@pytest.mark.parametrize("gate", ["keyed", "calibrated"])
def test_edits_that_come_back_into_force_find_their_threshold(
    gate: str, statistics: KeyStatistics
) -> None:
    editor = editor_of(gate)
    editor.edit(FACTS)
    for edit in range(len(FACTS)):
        editor.hooks.disable(edit)
    editor.edit([LATER])
    for edit in range(len(FACTS)):
        editor.hooks.enable(edit)
    for layer, hook in editor.hooks.modules(editor.model).items():
        opened = hook.read(statistics[layer].background.float()).is_open
        assert opened.float().mean() <= FALSE_ALARMS / len(LAYERS)


@pytest.fixture(params=["autocast", "inference mode"])
def around(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield request.param
    else:
        with torch.inference_mode():
            yield request.param


def deltas(hooks: HookSet, model: torch.nn.Module) -> list[torch.Tensor]:
    return [hook.delta.down for hook in hooks.modules(model).values()]


def test_what_is_written_does_not_depend_on_what_is_around_it(
    around: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    inside = editor_of("keyed")
    inside.edit(FACTS)
    with torch.inference_mode(False), torch.autocast("cpu", enabled=False):
        outside = editor_of("keyed")
        outside.edit(FACTS)
        # An editor made inside goes on outside.
        inside.edit([LATER])
        outside.edit([LATER])
        for a, b in zip(
            deltas(inside.hooks, inside.model), deltas(outside.hooks, outside.model), strict=True
        ):
            assert torch.equal(a, b)


def test_an_interruption_while_keys_are_absorbed_leaves_no_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    editor, other = editor_of("keyed"), editor_of("keyed")

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(editor._writing._writers[LAYERS[-1]].solver, "absorb", stop)
        with pytest.raises(KeyboardInterrupt):
            editor.edit(FACTS)
    assert not editor.hooks.edits
    assert all(len(delta) == 0 for delta in deltas(editor.hooks, editor.model))
    editor.edit(FACTS)
    other.edit(FACTS)
    for a, b in zip(
        deltas(editor.hooks, editor.model), deltas(other.hooks, other.model), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_pass_that_memory_does_not_hold_is_read_in_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = editor_of("keyed")
    whole.edit(FACTS)
    model = tiny_model("llama")
    editor = Editor.from_pretrained(model, tiny_tokenizer(), config=config("keyed"))
    forward = type(model).forward
    passes = []

    def limited(self: object, *args: object, **kwargs: object) -> object:
        ids = kwargs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        passes.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", limited)
    values = torch.zeros(len(FACTS), model.config.hidden_size)
    editor.edit(FACTS, values)
    monkeypatch.setattr(type(model), "forward", forward)
    assert max(passes) > 2
    again = editor_of("keyed")
    again.edit(FACTS, values)
    for a, b in zip(
        deltas(editor.hooks, editor.model), deltas(again.hooks, again.model), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_copy_of_a_hook_set_takes_off_its_own_hooks_alone(statistics: KeyStatistics) -> None:
    editor = editor_of("keyed")
    hooks, twin = editor.hooks, copy.deepcopy(editor.hooks)
    hooks.detach(editor.model)
    twin.attach(editor.model)
    hooks.detach(editor.model)
    assert len(twin.modules(editor.model)) == len(LAYERS)
    twin.detach(editor.model)


@pytest.mark.parametrize("number", ["1", 1.5, None, True, -1, 9])
def test_numbers_of_batches_that_are_none(number: object, statistics: KeyStatistics) -> None:
    editor = editor_of("keyed")
    with pytest.raises(ConfigError):
        editor.rollback(number)  # type: ignore[arg-type]
    if number != 9:
        with pytest.raises(ConfigError):
            editor.hooks.compact(number)  # type: ignore[arg-type]


def test_a_text_longer_than_the_context_cannot_be_traced(statistics: KeyStatistics) -> None:
    editor = editor_of("keyed")
    with pytest.raises(ContextLengthError):
        editor.hooks.trace(editor.model, editor.tokenizer, "x " * 500)
