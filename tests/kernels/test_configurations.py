"""Configurations: what a look-up finds, what of it is passed over, and files that say otherwise."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from coachhook_kernels.launch import runtime, tuning
from tests.support.kernels import DEVICE

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

MEASURED = {"BM": 256, "num_stages": 4}
DEFAULT = {"BM": 128, "num_stages": 3}


def write_configs(folder: Path, kernel: str, content: Any) -> None:
    """The configurations of a kernel on the device of the tests."""
    place = folder / tuning.device_folder(torch.device(DEVICE))
    place.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (place / f"{kernel}.json").write_text(text)


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    caches = (tuning._entries, tuning._nearest, tuning._log_keys_once)
    monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
    monkeypatch.setattr(tuning, "refused", set())
    monkeypatch.setattr(runtime, "_broken", set())
    for cache in caches:
        cache.cache_clear()
    yield tmp_path
    for cache in caches:
        cache.cache_clear()


class TestWhatDoesNotFit:
    """A GPU with so much shared memory; kernels that want as much as `BM * num_stages`."""

    def run(self, limit: int, *kernels: str, early: bool = False) -> tuple[Any, int]:
        """What was launched, None in plain torch, and the number of attempts. early: everything is
        looked up before the first launch."""
        pytest.importorskip("triton")
        from triton.runtime.errors import OutOfResources

        tried: list[int] = []

        def find(kernel: str) -> tuple[str, tuple[int, int]]:
            found = tuning.lookup(kernel, torch.device(DEVICE), DEFAULT, rows=16)
            return kernel, (found["BM"], found["num_stages"])

        def launch() -> dict[str, tuple[int, int]]:
            tried.append(1)
            looked_up = [find(kernel) for kernel in kernels] if early else map(find, kernels)
            launched = {}
            for kernel, (block, stages) in looked_up:
                if block * stages > limit and kernel != "small":
                    raise OutOfResources(block * stages, limit, "shared memory")
                launched[kernel] = (block, stages)
            return launched

        return runtime.with_fallback("some_op", launch, lambda: None), len(tried)

    @pytest.mark.parametrize(
        ("limit", "found"),
        [(1024, (256, 4)), (1023, (128, 3)), (383, (128, 2)), (128, (128, 1)), (127, None)],
    )
    @pytest.mark.parametrize("early", [False, True])
    def test_less_is_tried_and_remembered(
        self, configs: Path, caplog: pytest.LogCaptureFixture, limit: int, found: Any, early: bool
    ) -> None:
        for kernel in ("large", "small"):
            entry = {"when": {"rows": 16}, "config": MEASURED}
            write_configs(configs, kernel, [entry])
        expected = None if found is None else {"large": found, "small": (256, 4)}
        launched, _ = self.run(limit, "large", "small", early=early)
        assert launched == expected
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        skipped = 4 - (0 if found is None else found[1]) if limit < 1024 else 0
        assert all("of large" in line for line in told if found is not None)
        assert len(told) == (1 if found is None else skipped)
        launched, attempts = self.run(limit, "large", "small", early=early)
        assert launched == expected
        assert attempts == (0 if found is None else 1)
        assert len(caplog.records) == len(told)

    def test_two_that_do_not_fit(self, configs: Path) -> None:
        for kernel in ("one", "other"):
            write_configs(configs, kernel, [{"when": {"rows": 16}, "config": MEASURED}])
        launched, _ = self.run(300, "one", "small", "other")
        assert launched == {"one": (128, 2), "small": (128, 3), "other": (128, 2)}

    def test_another_series_keeps_what_was_measured(self, configs: Path) -> None:
        write_configs(configs, "large", [{"when": {"rows": 16}, "config": MEASURED}])
        assert self.run(1023, "large")[0] == {"large": (128, 3)}
        name, launch = (
            "another",
            lambda: tuning.lookup("large", torch.device(DEVICE), DEFAULT, rows=16),
        )
        assert runtime.with_fallback(name, launch, dict) == MEASURED
        assert launch() == MEASURED


class TestTuning:
    DEFAULT: tuning.Config = {"BM": 1}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def entries(self, configs: Path) -> None:
        entries = [
            {"when": {"d_in": 4096, "rows": 16}, "config": {"BM": 16}},
            {"when": {"d_in": 4096, "rows": 1024}, "config": {"BM": 64}},
            {"when": {"d_in": 4096}, "config": {"BM": 99}, "measured": {"torch": "2.11"}},
            {"when": {"rows": 16, "gate": "keyed", "layout": "row"}, "config": {"BM": 2}},
            {"when": {"rows": 64, "gate": "keyed", "layout": "column"}, "config": {"BM": 4}},
            {"when": {"d_out": 8}, "config": None},
            {"when": {"n": 8}, "config": {"BM": 8, "OLD": 1}},
        ]
        write_configs(configs, "some_kernel", entries)

    def lookup(self, kernel: str = "some_kernel", **described: int | str) -> tuning.Config:
        return tuning.lookup(kernel, torch.device(DEVICE), self.DEFAULT, **described)

    @pytest.mark.parametrize(
        ("described", "found"),
        [
            ({"d_in": 4096, "rows": 16}, 16),
            ({"rows": 1024, "d_in": 4096}, 64),
            ({"d_in": 5120, "rows": 9}, 16),
            ({"d_in": 4096, "rows": 2000}, 64),
            ({"d_in": 4096, "rows": 128}, 1),
            ({"d_in": 1024, "rows": 8}, 1),
            ({"d_in": 4096}, 99),
            ({"d_in": 4096, "rows": 16, "d_out": 8}, 1),
            ({"rows": 0, "d_in": 0}, 1),
            ({"rows": 32, "gate": "keyed", "layout": "row"}, 2),
            ({"rows": 32, "gate": "keyed", "layout": "column"}, 4),
            ({"rows": 16, "gate": "calibrated", "layout": "row"}, 1),
            ({"rows": 16, "gate": 5, "layout": "row"}, 1),
            ({"d_out": 8}, 1),
        ],
        ids=str,
    )
    def test_the_nearest_within_reach(self, described: dict[str, int | str], found: int) -> None:
        for _ in range(2):
            assert self.lookup(**described) == {"BM": found}

    def test_a_missing_file_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger=tuning.__name__)
        for rows in (1, 2, 3):
            assert self.lookup("another_kernel", rows=rows) == self.DEFAULT
        [record] = caplog.records
        assert "another_kernel" in record.getMessage()
        assert "defaults" in record.getMessage()

    def test_parameters_of_another_version_are_not_launched(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        for n in (7, 8, 9):
            assert self.lookup(n=n) == self.DEFAULT
        [record] = caplog.records
        assert "BM, OLD" in record.getMessage()

    @pytest.mark.parametrize(
        "content",
        [
            "[",
            "{}",
            [3],
            [{"when": {"rows": 1}}],
            [{"when": {"rows": 1}, "config": {"BM": 2}, "where": 3}],
            [{"when": {"rows": -1}, "config": {"BM": 2}}],
            [{"when": {"rows": 1.5}, "config": {"BM": 2}}],
            [{"when": {}, "config": {"BM": 2}}],
            [{"when": {"rows": 1}, "config": {"BM": "2"}}],
            [{"when": {"rows": 1}, "config": {"BM": True}}],
            [{"when": {"rows": 1}, "config": [2]}],
            "\udcff",
        ],
        ids=str,
    )
    def test_a_file_that_says_something_else(
        self, configs: Path, caplog: pytest.LogCaptureFixture, content: Any
    ) -> None:
        write_configs(configs, "odd", content if content != "\udcff" else "")
        if content == "\udcff":
            next(configs.rglob("odd.json")).write_bytes(b"\xff\xfe\xff")
        for rows in (1, 2):
            assert self.lookup("odd", rows=rows) == self.DEFAULT
        [record] = caplog.records
        assert "odd.json" in record.getMessage()
