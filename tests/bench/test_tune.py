"""The search of configurations, compiled side by side, kept after every problem."""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.harness.script import WrongResultError
from bench.ops import compiling, tune
from bench.ops.cases import Case
from bench.ops.interpreted import TINY, interpreted
from coachhook_kernels.launch import runtime, tuning
from coachhook_kernels.launch.tuning import Config, lookup

CPU = torch.device("cpu")
CASE = Case("tiny", "hook_linear", 40, 24, 3, dtype=torch.float32)
PROBLEM = tune.Problem("a_kernel", (("d_in", 40), ("gate", "keyed")), {"BN": 32}, CASE)


@pytest.fixture(autouse=True)
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    caches = (tuning._entries, tuning._nearest)
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


def test_neighbours_differ_in_one_parameter() -> None:
    start = {"BN": 32, "num_warps": 4, "num_stages": 2, "tma": 0, "FEW": 1}
    found = [
        {name: value for name, value in config.items() if value != start[name]}
        for config in tune.neighbours(start)
    ]
    stages = [{"num_stages": n} for n in (1, 3, 4)]
    assert found == [
        {"BN": 16}, {"BN": 64}, {"num_warps": 2}, {"num_warps": 8}, *stages, {"tma": 1},
    ]  # fmt: skip


class TestSearch:
    def test_goes_on_as_long_as_a_change_gains(self) -> None:
        asked: list[Config] = []

        def measured(configs: Sequence[Config]) -> list[float]:
            asked.extend(configs[2:])
            return [abs(c["BN"] - 128) + 10 * c["num_stages"] for c in configs]

        best, ratio = tune.search({"BN": 32, "num_stages": 3}, measured)
        assert best == {"BN": 128, "num_stages": 1}
        assert ratio == pytest.approx(10 / 126)
        assert all(asked.count(config) == 1 for config in asked)

    def test_keeps_the_default_unless_it_is_beaten(self) -> None:
        for others in (1.0, 0.995, float("inf")):
            found = tune.search({"BN": 32}, lambda c, others=others: [1.0, 1.0, others, others])
            assert found == (None, 1.0)


def test_a_forced_configuration_is_what_a_lookup_finds() -> None:
    default = {"BN": 1}
    with compiling.forced("one", {"BN": 64}):
        assert lookup("one", CPU, default, d_in=8) == {"BN": 64}
        assert lookup("other", CPU, default, d_in=8) == default
    assert lookup("one", CPU, default, d_in=8) == default


def test_problems_are_what_a_case_looks_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def operation() -> None:
        for _ in range(2):
            lookup("a_kernel", CPU, {"BN": 32}, d_in=40, gate="keyed")
        lookup("another", CPU, {"BK": 8}, d_in=40)

    monkeypatch.setattr(tune, "contenders", lambda *_, **__: {"hook_linear": operation})
    found = tune.problems_of(CASE, CPU)
    assert found == [PROBLEM, tune.Problem("another", (("d_in", 40),), {"BK": 8}, CASE)]


def test_what_fails_or_errs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def contenders(case: Case, device: torch.device, check: bool) -> Any:
        def operation() -> None:
            config = lookup("a_kernel", CPU, {"BN": 32}, d_in=40)
            if config["BN"] == 64:
                runtime._broken.add("it")
            if config["BN"] == 128:
                raise WrongResultError("off")

        if check:
            operation()
        return {"hook_linear": operation}

    monkeypatch.setattr(tune, "contenders", contenders)
    times = tune.seconds(PROBLEM, [{"BN": n} for n in (32, 64, 128, 256)], CPU)
    assert [time < float("inf") for time in times] == [True, False, False, True]
    assert runtime.failures() == []


class TestKept:
    def run(self, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[Any]:
        """Problems put; every search finds twice the default's tile."""
        problems = [PROBLEM, tune.Problem("a_kernel", (("d_in", 80),), {"BN": 32}, CASE)]
        monkeypatch.setattr(tune, "problems_of", lambda *_: problems)
        monkeypatch.setattr(tune, "search", lambda default, _: ({"BN": 64}, 0.5))
        put: list[Any] = []
        tune.tune([CASE, CASE], CPU, time.monotonic() + 60, put.append, **given)
        return [line["when"] for line in put]

    def test_after_every_problem_and_not_searched_twice(
        self, monkeypatch: pytest.MonkeyPatch, configs: Path
    ) -> None:
        first, second = {"d_in": 40, "gate": "keyed"}, {"d_in": 80}
        assert self.run(monkeypatch, most=1) == [first]
        assert lookup("a_kernel", CPU, {"BN": 32}, d_in=40, gate="keyed") == {"BN": 64}
        assert self.run(monkeypatch) == [second]
        assert self.run(monkeypatch) == []
        assert self.run(monkeypatch, again=True) == [first, second]
        kept = json.loads((configs / "cpu" / "a_kernel.json").read_text())
        assert [entry["when"] for entry in kept] == [first, second]
        assert kept[0]["measured"] == tune.versions() | {"ratio": 0.5}

    def test_another_version_is_searched_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert len(self.run(monkeypatch)) == 2
        monkeypatch.setattr(torch, "__version__", "99")
        assert len(self.run(monkeypatch)) == 2
        assert len(self.run(monkeypatch)) == 0

    def test_a_search_without_time_to_compile_is_not_kept(self, configs: Path) -> None:
        class Late:
            def compile(self, variants: Sequence[Any], until: float) -> dict[int, str]:
                return {len(variants) - 1: compiling.NOT_IN_TIME}

        line = tune._searched(PROBLEM, CPU, time.monotonic(), Late())  # type: ignore[arg-type]
        assert line["fault"] == compiling.NOT_IN_TIME
        assert not list(configs.rglob("*.json"))

    def test_a_case_without_memory_costs_itself(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def problems_of(case: Case, device: torch.device) -> list[tune.Problem]:
            if case.rows == 1:
                raise torch.OutOfMemoryError("too large")
            return [PROBLEM]

        monkeypatch.setattr(tune, "problems_of", problems_of)
        monkeypatch.setattr(tune, "search", lambda default, _: (None, 1.0))
        put: list[Any] = []
        cases = [replace(CASE, rows=rows) for rows in (1, 2)]
        tune.tune(cases, CPU, time.monotonic() + 60, put.append)
        assert put[0]["fault"] == "too large"
        assert put[1]["when"] == dict(PROBLEM.described)

    def test_nothing_begins_when_the_time_is_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tune, "problems_of", lambda *_: [PROBLEM])
        put: list[Any] = []
        tune.tune([CASE], CPU, time.monotonic() - 1, put.append)
        assert put == []


class Crash(compiling.Variant):
    """Ends the process that unpickles it, as a crashing compiler would."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)


class Answered(compiling.Compilers):
    """Each process is the far end of a pipe, which has so many answers in it beforehand."""

    def __init__(self, *answers: int) -> None:
        super().__init__(1)
        self.far_ends: list[Any] = []
        self._answers = list(answers)

    def _start(self) -> Any:
        ours, theirs = multiprocessing.Pipe()
        for _ in range(self._answers.pop(0)):
            theirs.send(None)
        self.far_ends.append(theirs)
        self._of[ours] = SimpleNamespace(kill=lambda: None, join=lambda: None)
        return ours

    def _give(self, variant: compiling.Variant) -> Any:
        worker = super()._give(variant)
        if not worker.poll():
            # Unread, what was sent makes an error of the end of the pipe.
            self.far_ends[-1].close()
        return worker


def test_an_idle_process_that_died_is_replaced() -> None:
    variant = compiling.Variant(CASE)
    with Answered(1, 2) as compilers:
        assert compilers.compile([variant], time.monotonic() + 30) == {}
        compilers.far_ends[0].close()
        assert compilers.compile([variant, variant], time.monotonic() + 30) == {}
        assert len(compilers.far_ends) == 2


def test_a_process_that_dies_before_it_reads_costs_its_variant_alone() -> None:
    variant = compiling.Variant(CASE)
    with Answered(0, 1) as compilers:
        faults = compilers.compile([variant, variant], time.monotonic() + 30)
        assert faults == {0: compiling.DIED}


@pytest.mark.slow
def test_a_crash_and_a_fault_cost_their_own_variants_alone() -> None:
    sound, unknown = compiling.Variant(TINY[-1]), compiling.Variant(replace(CASE, d_in=-1))
    with compiling.Compilers(1) as compilers:
        faults = compilers.compile([sound, Crash(CASE), unknown, sound], time.monotonic() + 300)
        assert faults.keys() == {1, 2}
        assert faults[1] == compiling.DIED
        late = compilers.compile([sound], time.monotonic() - 1)
        assert late == {0: compiling.NOT_IN_TIME}


def shipped_faults(folder: Path, defaults: dict[str, set[str]]) -> list[str]:
    """What is wrong with the configurations in a folder. defaults: parameters by kernel."""
    faults = []
    for path in sorted(folder.rglob("*.json")):
        try:
            entries = tuning.read_entries(path)
        except ValueError as error:
            faults.append(f"{path.name}: {error}")
            continue
        expected = defaults.get(path.stem, set())
        faults += [
            f"{path.name}: {sorted(entry['config'])}, not {sorted(expected)}"
            for entry in entries
            if entry["config"] is not None and entry["config"].keys() != expected
        ]
    return faults


def test_shipped_configurations_are_those_of_todays_kernels(
    configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = Path(tuning.__file__).parents[1] / "configs"
    with torch.inference_mode(), interpreted():
        problems = [problem for case in TINY for problem in tune.problems_of(case, CPU)]
    defaults = {problem.kernel: set(problem.default) for problem in problems}
    assert shipped_faults(shipped, defaults) == []
    kernel, sound = problems[0].kernel, dict.fromkeys(problems[0].default, 1)
    written = [
        (kernel, sound, 0),
        (kernel, {"BN": 1}, 1),
        (kernel, {"BN": 1.5}, 1),
        ("no_such_kernel", sound, 1),
    ]
    for index, (name, config, faults) in enumerate(written):
        folder = configs / str(index)
        folder.mkdir()
        (folder / f"{name}.json").write_text(json.dumps([{"when": {"d": 8}, "config": config}]))
        assert len(shipped_faults(folder, defaults)) == faults
