"""Where the kernels cannot run, or have not been tuned: plain torch, or defaults, and a word."""

import ast
import json
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coachhook_kernels.launch import counters as workspace
from coachhook_kernels.launch import runtime, tuning
from tests.support.kernels import (
    BRAIN,
    DEVICE,
    FORMS,
    SINGLE,
    base_output,
    forms,
    make,
    run_correction,
    run_linear,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


class Refused(SimpleNamespace):
    """What `triton_runs` looks at, on a GPU that need not be there."""

    dtype = SINGLE
    device = torch.device("cuda", 0)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (runtime._device_refusal, runtime._log_once)
    monkeypatch.setattr(runtime, "_broken", set())
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh")
class TestFallBack:
    def warnings(self, caplog: pytest.LogCaptureFixture) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    def test_without_triton(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "triton", None)
        for _ in range(3):
            assert not runtime.triton_runs(Refused())
        assert self.warnings(caplog) == [
            "coachhook_kernels uses plain torch: Triton cannot be imported "
            "(import of triton halted; None in sys.modules)"
        ]

    def test_on_an_old_gpu(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old One")
        for _ in range(3):
            assert not runtime.triton_runs(Refused())
        assert self.warnings(caplog) == [
            "coachhook_kernels uses plain torch: Old One is older than compute capability 8.0"
        ]

    def test_a_recent_gpu_is_no_reason(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert runtime.triton_runs(Refused(), None, Refused(dtype=BRAIN))
        assert not runtime.triton_runs(Refused(), Refused(dtype=torch.float64))
        assert not self.warnings(caplog)

    def test_a_cpu_is_silent(self, caplog: pytest.LogCaptureFixture) -> None:
        assert not runtime.triton_runs(torch.zeros(1))
        assert not caplog.records

    def failures(self) -> list[Exception]:
        pytest.importorskip("triton")
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        node = ast.parse("x").body[0]
        return [
            CompilationError(None, node, "no such thing"),
            OutOfResources(300_000, 232_448, "shared memory"),
            PTXASError("no such instruction"),
        ]

    @pytest.mark.parametrize("which", range(3))
    def test_a_kernel_that_does_not_compile(
        self, which: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        failure = self.failures()[which]
        tried = []

        def launch() -> str:
            tried.append(1)
            raise failure

        for _ in range(3):
            assert runtime.with_fallback("some_op", launch, lambda: "plain") == "plain"
        assert len(tried) == 1
        [message] = self.warnings(caplog)
        assert "plain torch for some_op" in message
        assert str(failure) in message
        assert runtime.with_fallback("another_op", lambda: "fast", lambda: "plain") == "fast"

    def test_an_error_of_a_kernel_that_ran_is_raised(self) -> None:
        pytest.importorskip("triton")

        def launch() -> str:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        for _ in range(2):
            with pytest.raises(RuntimeError, match="illegal memory access"):
                runtime.with_fallback("some_op", launch, lambda: "plain")

    @forms
    @pytest.mark.parametrize("n_rows", [4, 70])
    def test_the_operations_give_the_plain_result(
        self,
        n_rows: int,
        form: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        failure = self.failures()[1]
        from coachhook_kernels.dual_path import kernel
        from coachhook_kernels.hook_linear import decode, tiles

        tried = []

        def launch(*_: Any) -> Any:
            tried.append(1)
            raise failure

        problem = make(replace(FORMS[form], rows=n_rows))
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "triton_runs", lambda *tensors: False)
            expected = run_linear(problem)
        monkeypatch.setattr(runtime, "triton_runs", lambda *tensors: True)
        monkeypatch.setattr(decode, "launch", launch)
        monkeypatch.setattr(tiles, "launch", launch)
        monkeypatch.setattr(kernel, "dual_path_calibrated", launch)
        for run in (run_linear, lambda given: run_correction(given, base_output(given))):
            for got, want in zip(run(problem), expected, strict=True):
                assert torch.equal(got, want)
        # The whole layer failing, its correction alone may still compile.
        assert 1 <= len(tried) <= 2
        assert len(self.warnings(caplog)) == len(tried)
        run_linear(problem)
        run_correction(problem, base_output(problem))
        assert 1 <= len(tried) <= 2


class TestTuning:
    DEFAULT: tuning.Config = {"BM": 1}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def configs(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
        caches = (tuning._entries, tuning._nearest)
        monkeypatch.setattr(tuning, "CONFIGS", tmp_path)
        for cache in caches:
            cache.cache_clear()
        folder = tmp_path / tuning.device_folder(torch.device(DEVICE))
        folder.mkdir()
        entries = [
            {"when": {"d_in": 4096, "rows": 16}, "config": {"BM": 16}},
            {"when": {"d_in": 4096, "rows": 1024}, "config": {"BM": 64}},
            {"when": {"d_in": 4096}, "config": {"BM": 99}},
        ]
        (folder / "some_kernel.json").write_text(json.dumps(entries))
        yield
        for cache in caches:
            cache.cache_clear()

    def lookup(self, kernel: str = "some_kernel", **sizes: int) -> tuning.Config:
        return tuning.lookup(kernel, torch.device(DEVICE), self.DEFAULT, **sizes)

    @pytest.mark.parametrize(
        ("sizes", "found"),
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
        ],
        ids=str,
    )
    def test_the_nearest_within_reach(self, sizes: dict[str, int], found: int) -> None:
        for _ in range(2):
            assert self.lookup(**sizes) == {"BM": found}

    def test_a_missing_file_is_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.INFO, logger=tuning.__name__)
        for rows in (1, 2, 3):
            assert self.lookup("another_kernel", rows=rows) == self.DEFAULT
        [record] = caplog.records
        assert "another_kernel" in record.getMessage()
        assert "defaults" in record.getMessage()


def test_a_series_broken_off_leaves_no_counters_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of open rows has a length by then; the next series would append to it."""
    pytest.importorskip("triton")
    from coachhook_kernels.hook_linear import tiles

    used = torch.zeros(workspace.SET, dtype=torch.int32, device=DEVICE)
    forgotten: list[bool] = []

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiles, "counters", lambda device: used)
    monkeypatch.setattr(tiles, "multiply_open", interrupt)
    monkeypatch.setattr(tiles, "discard", lambda: forgotten.append(True))
    problem = make(replace(FORMS["keyed dense"], opened="all"))
    with pytest.raises(KeyboardInterrupt):
        tiles.launch(problem.keys, problem.delta, problem.gate, base_output(problem))
    assert used.any()
    assert forgotten == [True]
