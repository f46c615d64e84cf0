"""A run of edits as the command line, the demo and the benchmark make it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from coachhook.calibration import profiles
from coachhook.config import EditConfig
from coachhook.editor import Editor
from coachhook.errors import (
    BaseModelMismatchError,
    ConfigError,
    ContextLengthError,
    ContradictionError,
)
from coachhook.facts.request import EditRequest
from coachhook.hookset import HookSet
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.session import Options, opened
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

FACTS = [
    EditRequest("They all moved to {}", subject, target)
    for subject, target in zip(("France", "Rome", "Troy", "Peru"), TARGETS, strict=True)
]
SMALL = Options(layers=(1, 2))


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def names(directory: Path) -> list[str]:
    return [edit.request.subject for edit in HookSet.from_pretrained(directory).edits]


def test_each_batch_is_saved_before_its_report(tmp_path: Path, tokenizer: Any) -> None:
    with opened(tmp_path, FACTS, 3, SMALL) as session:
        assert session.held is None
        assert [len(batch) for batch in session.batches] == [3, 1]
        with session.editor(LanguageModel(tiny_model("llama"), tokenizer)) as editor:
            reports = session.edit(editor)
            assert not (tmp_path / "hook_config.json").exists()
            assert next(reports).number == 1
            assert names(tmp_path) == ["France", "Rome", "Troy"]
    # What was cut short goes on.
    with opened(tmp_path, FACTS, 3) as session:
        assert session.requests == FACTS[3:]
        with session.editor(LanguageModel(tiny_model("llama"), tokenizer)) as editor:
            assert [report.number for report in session.edit(editor)] == [2]
    with opened(tmp_path, FACTS, 3) as session:
        assert session.batches == []


def test_nothing_is_edited_where_one_request_is_unusable(tmp_path: Path, tokenizer: Any) -> None:
    long = EditRequest("so " * 200 + "{}", "Rome", TARGETS[0])
    with (
        opened(tmp_path, [FACTS[0], long], 1, SMALL) as session,
        session.editor(LanguageModel(tiny_model("llama"), tokenizer)) as editor,
    ):
        with pytest.raises(ContextLengthError):
            session.edit(editor)
        assert not editor.hooks.edits


def test_what_is_wrong_is_told_when_the_folder_is_opened(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="'open'"):
        Options(gate="open")
    other = dataclasses.replace(FACTS[0], target=TARGETS[1])
    with pytest.raises(ContradictionError), opened(tmp_path, [FACTS[0], other], 2):
        pass
    with Editor.from_pretrained(tiny_model("llama"), tokenizer, config=SMALL.config()) as editor:
        editor.save_pretrained(tmp_path)
    other_layers = opened(tmp_path, FACTS, 2, Options(layers=(0, 2)))
    with pytest.raises(ConfigError, match=r"--layers 0,2 .* made with 1,2"), other_layers:
        pass
    with opened(tmp_path, FACTS, 2) as session:
        assert session.settings(tiny_model("llama")).config == SMALL.config()
        with pytest.raises(BaseModelMismatchError):
            session.settings(tiny_model("llama", seed=1))


def test_settings_come_from_a_profile(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = profiles.Settings((0, 1), 7.0, 0.5, 32, 0.6, 1e-3)
    identity = profiles.identity(model, Architecture.of(model))
    file = tmp_path / "profile.json"
    profiles.save(profiles.Profile("of another", "other", found, {}), file)
    with opened(tmp_path / "hooks", FACTS, 2, Options(profile=file)) as session:
        settings = session.settings(model)
        assert settings.config == found.applied(EditConfig(readout="delta"))
        assert (settings.path, settings.is_of_model) == (file, False)
    with opened(tmp_path / "hooks", FACTS, 2, Options(readout="delta")) as session:
        assert session.settings(model).profile is None
        profiles.save(
            profiles.Profile(identity, "tiny", found, {}), profiles.default_path(identity)
        )
        settings = session.settings(model)
        assert settings.is_of_model
        assert settings.config.layers == (0, 1)
        plan = session.plan(tiny_lm(model), settings.config)
        assert {part.name for part in plan.parts} >= {"moments", "target values"}


@pytest.mark.parametrize(
    ("options", "readout", "layers"),
    [
        (Options(), "memory", None),
        (Options(gate="calibrated"), "delta", None),
        (Options(layers=(1, 2)), "delta", (1, 2)),
        (Options(layers=(1, 2), readout="memory"), "memory", None),
    ],
)
def test_a_gate_or_layers_alone_are_those_of_delta(
    options: Options, readout: str, layers: tuple[int, ...] | None
) -> None:
    config = options.config()
    assert (config.readout, config.layers) == (readout, layers)
    if options.readout == "memory":
        assert (config.memory.gate_block, config.memory.write_blocks) == (1, (2,))


@pytest.mark.parametrize("settings", [{"gate": "calibrated"}, {"layers": (1, 2)}])
def test_settings_that_the_memory_readout_would_ignore_are_refused(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r'setting of the delta readout.*add readout="delta"'):
        EditConfig(**settings)
    assert EditConfig(readout="delta", **settings).readout == "delta"
