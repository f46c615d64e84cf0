import json
import logging
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from coachhook.calibration import profiles
from coachhook.calibration.probe_edits import ProbeScores, probe_requests
from coachhook.calibration.profiles import Profile, Settings
from coachhook.calibration.search import (
    _FINE,
    _FREEDOM,
    _Choice,
    _search,
    calibrate,
    candidate_layers,
)
from coachhook.calibration.separability import Cosines, separation
from coachhook.calibration.trials import Calibration, Trial
from coachhook.cli.app import app
from coachhook.config import EditConfig, MemoryConfig, ValueConfig
from coachhook.errors import ConfigError, ContextLengthError, ProfileError
from coachhook.facts.loaders import load_requests
from coachhook.hookset import HookSet
from coachhook.models.architecture import Architecture
from coachhook.statistics.source import StatisticsSource
from tests.support.tiny import tiny_lm, tiny_model, tiny_tokenizer

SETTINGS = Settings((0, 1), 77.0, 0.5, 32, 0.7, 1e-3)
LITTLE = StatisticsSource(n_tokens=512)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny` and `facts.jsonl`."""
    place = tmp_path_factory.mktemp("calibrate")
    tiny_model("llama").save_pretrained(place / "tiny")
    tiny_tokenizer().save_pretrained(place / "tiny")
    fact = {"prompt": "The capital of France is", "subject": "France", "target": "Lyon"}
    (place / "facts.jsonl").write_text(json.dumps(fact))
    return place


@pytest.fixture(autouse=True)
def _own_cache(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    for profile in (place / "cache").glob("profiles/*"):
        profile.unlink()


@pytest.fixture(scope="module")
def found() -> Calibration:
    return calibrate(tiny_lm(tiny_model("gpt2")), readout="delta", source=LITTLE, minutes=0)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def edited(hooks: Path, *options: str) -> tuple[HookSet, str]:
    """What `edit` of the facts into the tiny model wrote, and what it said on standard error."""
    result = invoke("edit", "tiny", "facts.jsonl", "--hooks", str(hooks), *options)
    assert result.exit_code == 0, result.stderr or result.exception
    return HookSet.from_pretrained(hooks), " ".join(result.stderr.split())


def own_profile() -> Profile:
    model = tiny_model("llama")
    identity = profiles.identity(model, Architecture.of(model))
    return Profile(identity, "tiny", SETTINGS, {"trials": 1})


class TestProbes:
    def test_none_is_in_the_demo(self) -> None:
        demo = load_requests(str(files("coachhook.facts") / "demo.jsonl")).requests
        known = {request.subject for request in demo}
        known |= {word for request in demo for item in request.locality for word in [item.prompt]}
        for probe in probe_requests():
            assert probe.subject not in known
            assert not {item.prompt for item in probe.locality} & known

    def test_each_can_be_scored(self) -> None:
        probes = probe_requests()
        assert len({probe.subject for probe in probes}) == len(probes) == 16
        for probe in probes:
            assert len(probe.paraphrases) == len(probe.locality) == 2
            assert all(probe.subject in text for text in probe.paraphrases)
            assert all(probe.subject not in item.prompt for item in probe.locality)
            assert probe.target not in {item.answer for item in probe.locality}

    def test_scores_rank_greedy_first(self) -> None:
        even = ProbeScores(0.8, 0.8, 0.8, (0.8, 0.8, 0.8))
        lopsided = ProbeScores(1.0, 0.4, 1.0, (1.0, 1.0, 1.0))
        finer = replace(even, teacher_forced=(0.9, 0.8, 0.8))
        nothing = ProbeScores(0.0, 0.0, 1.0, (0.0, 0.0, 1.0))
        assert finer.rank > even.rank > lopsided.rank > nothing.rank
        assert ProbeScores(1.0, 1.0, 1.0, (1.0, 1.0, 1.0)).perfect
        assert not finer.perfect


class TestSeparation:
    def cosines(self, reworded: list[float], others: list[float], ordinary: float) -> Cosines:
        background = torch.full((1000,), ordinary)
        background[0] = 0.99  # ordinary text that names a subject itself
        return Cosines(torch.tensor(reworded), torch.tensor(others)[:, None], background)

    def test_the_floor_lies_between_subjects_and_others(self) -> None:
        found = separation([self.cosines([0.8, 0.9], [0.2, 0.5], 0.3)], 1e-3)
        assert (found.recall, found.firing, found.value) == (1, 0, 1)
        assert found.floor == pytest.approx(0.655, abs=0.01)

    def test_what_is_gained_is_weighed_against_what_is_lost(self) -> None:
        found = separation([self.cosines([0.6, 0.7, 0.9], [0.1, 0.2, 0.3, 0.65], 0.3)], 1e-3)
        assert (found.recall, found.firing) == (1, 0.25)
        found = separation([self.cosines([0.6, 0.7, 0.9, 0.9], [0.1, 0.65], 0.3)], 1e-3)
        assert (found.recall, found.firing) == (0.75, 0)

    def test_the_floor_is_above_ordinary_text_at_every_layer(self) -> None:
        quiet = self.cosines([0.5, 0.9], [0.2], 0.3)
        loud = self.cosines([0.5, 0.9], [0.2], 0.6)
        assert separation([quiet], 1e-3).recall == 1
        found = separation([quiet, loud], 1e-3)
        assert found.ceiling == pytest.approx(0.6)
        assert found.floor > 0.6
        assert found.recall == 0.5
        assert separation([quiet], 1e-4).ceiling == pytest.approx(0.99)


class Landscape:
    """Stands in for the model: scores fall off with the distance from a best choice."""

    def __init__(self, best: _Choice, usable: range) -> None:
        self.best, self.usable = best, usable
        self.seen: list[_Choice] = []

    def last_layers(self) -> list[int]:
        return [*reversed(self.usable)][::2][:3]

    def acceptable(self, last: int) -> bool:
        return last in self.usable

    def keep(self, layers: range) -> None:
        self.kept = layers

    def trial(self, choice: _Choice) -> Trial:
        assert set(choice.layers) <= set(self.kept)
        self.seen.append(choice)
        off = abs(choice.layers[-1] - self.best.layers[-1])
        off += abs(len(choice.layers) - len(self.best.layers))
        off += choice.freedom != self.best.freedom
        off += choice.clamp != self.best.clamp
        share = 1 - off / 20
        return Trial(SETTINGS, ProbeScores(share, share, share, (share, share, share)), 0.0)


@pytest.mark.parametrize(
    ("layers", "freedom", "clamp", "least"),
    [
        ((9, 10, 11), _FREEDOM, 1.0, 1),
        ((6, 7, 8), _FREEDOM, 1.0, 3),
        ((4, 5, 6, 7, 8), _FREEDOM / _FINE, 2.0, 8),
    ],
)
def test_the_search_comes_to_the_best_choice_and_stops(
    layers: tuple[int, ...], freedom: float, clamp: float, least: int
) -> None:
    bench = Landscape(_Choice(layers, freedom, clamp), range(3, 12))
    trials: list[Trial] = []
    for choice in _search(bench, None, trials):  # type: ignore[arg-type]
        trials.append(bench.trial(choice))
    assert bench.seen[-1] == bench.best
    assert trials[-1].scores.perfect
    assert least <= len(trials) <= 13
    assert len(set(bench.seen)) == len(bench.seen)


def test_candidates_span_the_lower_half() -> None:
    assert candidate_layers(30) == tuple(range(3, 19))
    assert candidate_layers(80, 8) == (13, 19, 25, 31, 37, 43)
    assert candidate_layers(4) == (0, 1, 2)
    assert candidate_layers(1) == (0,)
    assert candidate_layers(32, 0) == candidate_layers(32, 1)


class TestRandomModel:
    def test_calibrates_with_the_time_for_one_trial(self, found: Calibration) -> None:
        assert len(found.trials) == 1
        assert found.cut_short
        assert not found.took
        assert [figures.layer for figures in found.layers] == [0, 1, 2]
        assert found.profile.settings == found.trials[0].settings
        assert found.profile.figures["probes"] == 16

    def test_settings_are_in_range(self, found: Calibration) -> None:
        settings = found.profile.settings
        config = settings.applied(EditConfig(readout="delta", values=ValueConfig(steps=5)))
        assert config.layers == settings.layers
        assert (config.values.clamp, config.values.steps) == (settings.clamp, 5)
        assert 0 < config.preservation < found.layers[0].leverage
        assert 0.3 <= config.resemblance <= 0.95

    def test_layers_can_be_fixed_and_the_model_is_left_as_it_was(self) -> None:
        model = tiny_model("llama")
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        found = calibrate(tiny_lm(model), readout="delta", layers=(1, 3), source=LITTLE, minutes=0)
        assert found.profile.settings.layers == (1, 3)
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_bad_wishes_are_refused(self) -> None:
        lm = tiny_lm(tiny_model("llama"))
        with pytest.raises(ConfigError, match="minutes"):
            calibrate(lm, readout="delta", minutes=float("nan"))
        with pytest.raises(ConfigError, match="blocks"):
            calibrate(lm, readout="delta", layers=(9,))
        lm.model.config.max_position_embeddings = 8
        with pytest.raises(ContextLengthError, match="context of 8 tokens"):
            calibrate(lm, readout="delta", layers=(1,), source=LITTLE)


class TestProfileFile:
    def test_what_is_saved_is_found(self) -> None:
        profile = own_profile()
        profiles.save(profile, profiles.default_path(profile.identity))
        assert profiles.find(profile.identity) == profile
        assert profiles.find("0" * 64) is None
        folder = profiles.default_path(profile.identity).parent
        assert [file.suffix for file in folder.iterdir()] == [".json"]

    def test_rounding_does_not_make_another_model(self) -> None:
        model = tiny_model("llama")
        architecture = Architecture.of(model)
        identity = profiles.identity(model, architecture)
        assert profiles.identity(model.bfloat16(), architecture) == identity
        assert profiles.identity(tiny_model("llama", seed=1), architecture) != identity

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda data: data | {"version": 2}, "install a newer coachhook"),
            (lambda data: {k: v for k, v in data.items() if k != "identity"}, "not a whole"),
            (lambda data: data | {"settings": {"layers": [1]}}, "not a whole"),
            (lambda data: data | {"settings": data["settings"] | {"layers": "12"}}, "not a whole"),
            (lambda data: data | {"settings": data["settings"] | {"clamp": -1}}, "clamp must be"),
            (lambda data: [data], "not a whole"),
        ],
    )
    def test_what_cannot_be_used_is_refused_or_left_alone(
        self, change: Any, said: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        profile = own_profile()
        path = profiles.default_path(profile.identity)
        profiles.save(profile, path)
        path.write_text(json.dumps(change(json.loads(path.read_text()))))
        with pytest.raises(ProfileError, match=said):
            profiles.load(path)
        with caplog.at_level(logging.WARNING):
            assert profiles.find(profile.identity) is None
        assert said in caplog.text
        assert "default settings" in caplog.text
        path.write_text("{")
        with pytest.raises(ProfileError, match="not a whole"):
            profiles.load(path)

    def test_it_is_written_whole_or_not_at_all(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        profiles.save(own_profile(), path)
        before = path.read_bytes()
        with pytest.raises(ValueError, match="JSON"):
            profiles.save(replace(own_profile(), figures={"a": float("nan")}), path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["profile.json"]
        with pytest.raises(ProfileError, match="cannot write"):
            profiles.save(own_profile(), path / "below.json")


class TestCommands:
    def test_calibrate_then_edit(self, tmp_path: Path) -> None:
        result = invoke("calibrate", "tiny", "--layers", "1,2", "--budget", "0", "--json")
        assert result.exit_code == 0, result.exception
        document = json.loads(result.stdout)
        assert document["plan"]["needed_bytes"]["cpu"] > 0
        assert document["settings"]["layers"] == [1, 2]
        assert "warning: under no settings" in result.stderr
        hooks, said = edited(tmp_path / "hooks", "--readout", "delta")
        assert f"settings from {document['profile']}" in said
        settings = hooks.config.to_dict()
        assert settings["preservation"] == document["settings"]["preservation"]
        assert settings["resemblance"] == document["settings"]["resemblance"]
        assert hooks.layers == (1, 2)

    def test_without_a_profile_the_defaults_hold(self, tmp_path: Path) -> None:
        hooks, said = edited(tmp_path / "hooks")
        assert "'coachhook calibrate MODEL'" in said
        blocks = MemoryConfig(gate_block=1, write_blocks=(2,))
        assert hooks.config == EditConfig(memory=blocks)
        delta, _ = edited(tmp_path / "delta", "--readout", "delta")
        assert delta.config == EditConfig(readout="delta")

    def test_an_explicit_option_wins(self, tmp_path: Path) -> None:
        profile = own_profile()
        profiles.save(profile, profiles.default_path(profile.identity))
        hooks, _ = edited(tmp_path / "hooks", "--layers", "2")
        assert (hooks.layers, hooks.config.preservation) == ((2,), 77.0)

    def test_a_folder_keeps_its_settings(self, tmp_path: Path) -> None:
        file = tmp_path / "profile.json"
        profiles.save(own_profile(), file)
        hooks, said = edited(tmp_path / "hooks", "--profile", str(file))
        assert f"settings from {file}" in said
        assert (hooks.layers, hooks.config.values.clamp) == ((0, 1), 0.5)
        profile = replace(own_profile(), settings=replace(SETTINGS, preservation=8.0))
        profiles.save(profile, profiles.default_path(profile.identity))
        assert edited(tmp_path / "hooks")[0].config == hooks.config
        edited(tmp_path / "hooks", "--profile", str(file))
        profiles.save(profile, file)
        result = invoke(
            *("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "hooks")),
            *("--profile", str(file)),
        )
        assert result.exit_code == 2
        assert "leave --profile out" in result.stderr

    def test_a_profile_of_another_model_is_used_with_a_warning(self, tmp_path: Path) -> None:
        file = tmp_path / "profile.json"
        profiles.save(replace(own_profile(), identity="0" * 64, model="big"), file)
        assert "made for another model (big)" in edited(tmp_path / "h", "--profile", str(file))[1]
