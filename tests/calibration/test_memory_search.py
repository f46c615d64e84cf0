"""Calibration of the memory readout: the gate that is chosen, what is tried behind it, profiles."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coachhook.calibration import profiles
from coachhook.calibration.gate_figures import GateFigures, _opening_own, chosen_gate, gate_figures
from coachhook.calibration.gate_probes import GateProbes, named_entries
from coachhook.calibration.memory_search import (
    MOST_TRIALS,
    gate_candidates,
    write_candidates,
)
from coachhook.calibration.probe_edits import ProbeScores, probe_requests
from coachhook.calibration.profiles import MemorySettings, Profile, Settings
from coachhook.calibration.search import calibrate
from coachhook.calibration.trials import Calibration, Trial
from coachhook.config import EditConfig, MemoryConfig
from coachhook.editing.forms import rivals_of
from coachhook.errors import ConfigError, ModelError, ProfileError
from coachhook.models.architecture import Architecture, memory_blocks
from coachhook.session import Options, opened
from coachhook.statistics.measure import key_statistics
from coachhook.statistics.source import StatisticsSource
from tests.support.tiny import tiny_lm, tiny_model

LITTLE = StatisticsSource(n_tokens=512)
SETTINGS = MemorySettings(1, (2, 3), 0.9)


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def found() -> Calibration[GateFigures]:
    return calibrate(tiny_lm(tiny_model("gpt2")), readout="memory", source=LITTLE, minutes=0)


def figures(block: int, recall: float, need: float = 0.9) -> GateFigures:
    return GateFigures(block, 0.8, recall, 1.0, 0.0, 0.5, 0.0, need, 0.7)


def profile_for(model: Any) -> Profile:
    identity = profiles.identity_of_blocks(model, Architecture.of_blocks(model))
    return Profile(identity, "tiny", SETTINGS, {})


class TestCandidates:
    @pytest.mark.parametrize("n_blocks", [1, 2, 3, 4, 12, 30, 32, 80, 126])
    def test_gates_are_in_the_model_few_and_among_them_the_default(self, n_blocks: int) -> None:
        gates = gate_candidates(n_blocks)
        assert list(gates) == sorted(set(gates))
        assert 0 <= gates[0] <= gates[-1] < n_blocks
        assert len(gates) <= 12
        assert memory_blocks(n_blocks)[0] in gates

    def test_gates_span_the_depth(self) -> None:
        assert gate_candidates(1) == (0,)
        assert gate_candidates(4) == (0, 1, 2)
        assert gate_candidates(80)[0] == 4
        assert gate_candidates(80)[-1] == 48
        assert gate_candidates(80, 1) == (memory_blocks(80)[0],)

    @pytest.mark.parametrize(("n_blocks", "gate"), [(1, 0), (2, 1), (3, 1), (30, 5), (30, 18)])
    def test_rows_are_added_at_or_after_the_gate_the_defaults_first(
        self, n_blocks: int, gate: int
    ) -> None:
        tried = all_choices(n_blocks, gate, {})
        default = max(gate, *memory_blocks(n_blocks)[1])
        assert tried[0] == (default,)
        assert len(set(tried)) == len(tried) <= MOST_TRIALS
        for blocks in tried:
            assert list(blocks) == sorted(set(blocks))
            assert gate <= blocks[0] <= blocks[-1] < n_blocks

    def test_the_search_goes_beside_the_best_and_stops_at_a_perfect_one(self) -> None:
        assert all_choices(30, 5, {(15,): 0.8}) == [(11,), (8,), (15,), (13,), (17,), (11, 13, 15)]
        assert all_choices(30, 5, {(15,): 0.8, (13,): 0.9})[-1] == (9, 11, 13)
        assert all_choices(30, 5, {(8,): 1.0}) == [(11,), (8,)]


def all_choices(
    n_blocks: int, gate: int, shares: dict[tuple[int, ...], float]
) -> list[tuple[int, ...]]:
    """What is tried where every trial has half of each share but those named."""
    trials: list[Trial] = []
    tried = []
    for blocks in write_candidates(n_blocks, gate, trials):
        share = shares.get(blocks, 0.5)
        scores = ProbeScores(share, share, share, (share, share, share))
        trials.append(Trial(MemorySettings(gate, blocks, 0.9), scores, 0.0))
        tried.append(blocks)
    return tried


class TestGate:
    def test_names_are_told_from_the_probes(self) -> None:
        names = [entry.subject for entry in named_entries()]
        probes = probe_requests()
        beside = [item.prompt for probe in probes for item in probe.locality]
        assert len(set(names)) == len(names) > 100
        assert not {probe.subject for probe in probes} & set(names)
        assert not [name for name in names if any(name in prompt for prompt in beside)]

    def test_recall_decides_then_the_margin_then_the_earlier(self) -> None:
        low, best = figures(1, 0.5, need=0.99), figures(3, 0.99)
        assert chosen_gate([low, best], 142, 0) is best
        # 0.98 of 142 is within a standard error of 0.99; of 10,000 it is not.
        wide = figures(5, 0.985, need=0.95)
        assert chosen_gate([best, wide], 142, 0) is wide
        assert chosen_gate([best, wide], 10_000, 0) is best
        assert chosen_gate([best, figures(4, 0.99)], 142, 0) is best

    def test_a_usual_block_that_is_as_good_is_taken(self) -> None:
        wide, usual = figures(2, 0.98, need=0.9), figures(5, 0.98)
        assert chosen_gate([wide, usual], 142, 5) is usual
        assert chosen_gate([wide, figures(5, 0.9)], 142, 5) is wide

    def test_the_least_threshold_is_half_way_to_what_paraphrases_need(self) -> None:
        assert figures(1, 0.9, need=0.86).least == pytest.approx(0.83)
        assert figures(1, 0.9, need=0.7).least == 0.8

    @pytest.mark.parametrize(("name", "stated"), [("ordinary", 0.005), ("neighbours", 0.2)])
    def test_each_stated_share_sets_the_threshold_where_the_others_do_not(
        self, name: str, stated: float
    ) -> None:
        lm = tiny_lm(tiny_model("llama"))
        architecture = Architecture.of_blocks(lm.model)
        statistics = key_statistics(lm, architecture, (0, 3), LITTLE, site="ffn")
        probes = GateProbes.of(lm, probe_requests())
        shares = dict.fromkeys(("ordinary", "neighbours"), 0.999) | {name: stated}
        config = EditConfig(memory=MemoryConfig(**shares))
        for at_block in gate_figures(lm, architecture, statistics, probes, config):
            assert stated / 3 < getattr(at_block, name) <= stated

    def test_rivals_keep_made_up_names_closed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = tiny_lm(tiny_model("llama"))
        architecture = Architecture.of_blocks(lm.model)
        statistics = key_statistics(lm, architecture, (1,), LITTLE, site="ffn")
        probes = GateProbes.of(lm, probe_requests())
        config = EditConfig(memory=MemoryConfig(ordinary=0.999, neighbours=0.999))
        (kept,) = gate_figures(lm, architecture, statistics, probes, config)
        monkeypatch.setattr(
            "coachhook.calibration.gate_figures.rivals_of", lambda *given: rivals_of(*given)[:1]
        )
        (opened,) = gate_figures(lm, architecture, statistics, probes, config)
        assert kept.alike < opened.alike

    def test_opening_anothers_entry_is_no_recall(self) -> None:
        scores = torch.tensor([[0.9, 0.2], [0.8, 0.85], [0.5, 0.1]])
        assert _opening_own(scores, torch.tensor([0, 0, 0]), 0.7) == pytest.approx(1 / 3)

    def test_a_prompt_is_no_neighbour_of_its_own_entry(self) -> None:
        lm = tiny_lm(tiny_model("llama"))
        architecture = Architecture.of_blocks(lm.model)
        statistics = key_statistics(lm, architecture, (1,), LITTLE, site="ffn")
        probes = GateProbes.of(lm, probe_requests())
        (own,) = gate_figures(lm, architecture, statistics, probes, EditConfig())
        nobodys = replace(probes, about=[-1] * len(probes.about))
        (told,) = gate_figures(lm, architecture, statistics, nobodys, EditConfig())
        assert told.reach > own.reach
        assert told.reach == pytest.approx(1.0, abs=1e-3)


class TestRandomModel:
    def test_calibrates_with_the_time_for_one_trial(self, found: Calibration[GateFigures]) -> None:
        assert (len(found.trials), found.cut_short, found.took) == (1, True, False)
        assert [at_block.block for at_block in found.layers] == [0, 1, 2]
        settings = found.profile.settings
        assert isinstance(settings, MemorySettings)
        assert settings == found.trials[0].settings
        chosen = next(f for f in found.layers if f.block == settings.gate_block)
        assert settings.least == pytest.approx(chosen.least, abs=1e-3)
        assert found.profile.figures["entries"] == 16 + len(named_entries())

    def test_blocks_can_be_fixed_and_the_model_is_left_as_it_was(self) -> None:
        model = tiny_model("llama")
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        lm = tiny_lm(model)
        fixed = calibrate(lm, readout="memory", layers=(1, 2, 3), source=LITTLE, minutes=9)
        assert [trial.settings for trial in fixed.trials] == [fixed.profile.settings]
        settings = fixed.profile.settings
        assert isinstance(settings, MemorySettings)
        assert (settings.gate_block, settings.write_blocks) == (1, (2, 3))
        gate = calibrate(lm, readout="memory", layers=(2,), source=LITTLE, minutes=0)
        assert isinstance(gate.profile.settings, MemorySettings)
        assert gate.profile.settings.gate_block == 2
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], before[name]) for name in before)

    def test_a_model_of_one_block(self) -> None:
        lm = tiny_lm(tiny_model("llama", num_hidden_layers=1))
        found = calibrate(lm, readout="memory", source=LITTLE, minutes=9)
        assert [trial.settings for trial in found.trials] == [found.profile.settings]
        assert isinstance(found.profile.settings, MemorySettings)
        assert found.profile.settings.write_blocks == (0,)

    def test_bad_wishes_are_refused_before_any_text_is_read(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr("coachhook.calibration.memory_search.key_statistics")
        lm = tiny_lm(tiny_model("llama"))
        with pytest.raises(ConfigError, match="minutes"):
            calibrate(lm, readout="memory", minutes=-1)
        with pytest.raises(ConfigError, match="blocks"):
            calibrate(lm, readout="memory", layers=(1, 9))
        with pytest.raises(ConfigError, match="choose one of delta, memory"):
            calibrate(lm, readout="other")
        lm.model.model.layers[1].mixer = torch.nn.Conv1d(1, 1, 1)
        with pytest.raises(ModelError, match="block 1 is a state-space block"):
            calibrate(lm, readout="memory")


class TestProfile:
    def test_it_is_found_by_its_readout_alone(self) -> None:
        model = tiny_model("llama")
        profile = profile_for(model)
        profiles.save(profile, profiles.default_path(profile.identity))
        assert profiles.find(profile.identity, "memory") == profile
        assert profiles.find(profile.identity) is None
        assert profiles.identity(model, Architecture.of(model)) != profile.identity

    def test_rounding_does_not_make_another_model(self) -> None:
        model = tiny_model("llama")
        identity = profile_for(model).identity
        assert profile_for(model.bfloat16()).identity == identity
        assert profile_for(tiny_model("llama", seed=1)).identity != identity

    def test_named_blocks_are_kept(self) -> None:
        named = EditConfig(readout="memory", memory=MemoryConfig(gate_block=0, write_blocks=(1,)))
        applied = SETTINGS.applied(named).memory
        assert (applied.gate_block, applied.write_blocks, applied.least) == (0, (1,), 0.9)
        applied = SETTINGS.applied(EditConfig(readout="memory")).memory
        assert (applied.gate_block, applied.write_blocks) == (1, (2, 3))

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"readout": "other"}, "'other' is not known"),
            ({"readout": "delta"}, "not a whole"),
            ({"settings": {"gate_block": 3, "write_blocks": [2], "least": 0.9}}, "runs before"),
            ({"settings": {"gate_block": 1, "write_blocks": [2], "least": 2.0}}, "a cosine"),
            ({"settings": {"gate_block": 1, "write_blocks": "2", "least": 0.9}}, "not a whole"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, change: Any, said: str, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        profiles.save(profile_for(tiny_model("llama")), path)
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        with pytest.raises(ProfileError, match=said):
            profiles.load(path)

    def test_a_profile_of_before_there_were_two_readouts(self, tmp_path: Path) -> None:
        path = tmp_path / "profile.json"
        settings = Settings((0, 1), 77.0, 0.5, 32, 0.7, 1e-3)
        profiles.save(Profile("of a model", "tiny", settings, {}), path)
        data = json.loads(path.read_text())
        del data["readout"]
        path.write_text(json.dumps(data))
        assert profiles.load(path).settings == settings

    def test_a_run_takes_its_readouts_profile_and_refuses_the_other(self, tmp_path: Path) -> None:
        model = tiny_model("llama", seed=3)
        fact = named_entries()[:1]
        memory, delta = tmp_path / "memory.json", tmp_path / "delta.json"
        profiles.save(profile_for(model), memory)
        profiles.save(
            Profile("other", "other", Settings((0, 1), 77.0, 0.5, 32, 0.7, 1e-3), {}), delta
        )
        with opened(tmp_path / "h", fact, 1, Options(readout="memory", profile=memory)) as session:
            settings = session.settings(model)
            assert settings.config.memory.write_blocks == (2, 3)
            assert settings.is_of_model
        with opened(tmp_path / "h", fact, 1, Options(readout="memory")) as session:
            assert session.settings(model).profile is None
            profiles.save(profile_for(model), profiles.default_path(profile_for(model).identity))
            assert session.settings(model).config.memory.least == 0.9
        for readout, file in (("memory", delta), ("delta", memory)):
            options = Options(readout=readout, profile=file)
            with (
                opened(tmp_path / "h", fact, 1, options) as session,
                pytest.raises(ConfigError, match="settings of the readout"),
            ):
                session.settings(model)
