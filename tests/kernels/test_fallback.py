"""Where the kernels cannot run: plain torch, and a word."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import replace
from subprocess import CalledProcessError
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook_kernels import Delta
from coachhook_kernels.hook_linear import op
from coachhook_kernels.hook_linear_sequence import op as sequence_op
from coachhook_kernels.key_covariance import op as covariance_op
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


def by_column(matrix: Tensor) -> Tensor:
    return matrix.mT.contiguous().mT


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caches = (runtime._device_refusal, runtime._log_once)
    monkeypatch.setattr(runtime, "_broken", set())
    monkeypatch.setattr(tuning, "refused", set())
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
            RuntimeError("PassManager::run failed"),
            CalledProcessError(1, ["cc", "launcher.c"]),
        ]

    @pytest.mark.parametrize("which", range(5))
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

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("CUDA error: an illegal memory access was encountered"),
            torch.OutOfMemoryError("tried to allocate more than there is"),
            torch.AcceleratorError("PassManager of the device: out of memory"),
            NotImplementedError("PassManager"),
            KeyboardInterrupt(),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_what_is_not_of_the_compiler_is_raised(
        self, error: BaseException, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("triton")
        discarded: list[bool] = []
        monkeypatch.setattr(runtime, "discard", lambda: discarded.append(True))

        def launch() -> str:
            raise error

        for _ in range(2):
            with pytest.raises(type(error)):
                runtime.with_fallback("some_op", launch, lambda: "plain")
        assert len(discarded) == 2
        assert runtime.failures() == []

    @forms
    def test_a_failure_disables_only_what_failed(self, form: str) -> None:
        problem = make(replace(FORMS[form], rows=5))
        keys, weight, delta, gate = problem.keys, problem.weight, problem.delta, problem.gate

        def name(rows: int, **others: Any) -> str:
            given = {"weight": weight, "delta": delta, "gate": gate} | others
            return op._scope(
                "hook_linear", given.pop("keys", keys[:1].repeat(rows, 1)), d_out=8, **given
            )

        assert name(5) == name(8)
        other_form = Delta(keys, None if delta.up is not None else keys)
        names = [
            name(5),
            name(4),
            name(64),
            name(5, delta=other_form),
            name(5, gate=gate._replace(projection=None if gate.keyed else keys)),
            name(5, keys=keys.half()),
            name(5, keys=keys[:, 1:]),
            name(5, keys=keys.to("meta")),
            name(5, weight=by_column(weight)),
            name(5, delta=Delta(by_column(delta.down), delta.up)),
        ]
        if delta.up is not None:
            names.append(name(5, delta=Delta(delta.down, by_column(delta.up))))
        if gate.projection is not None:
            names.append(name(5, gate=gate._replace(projection=by_column(gate.projection))))
        assert len(set(names)) == len(names)

    def test_a_failure_of_the_others_disables_no_other_device_and_no_other_layout(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names: list[str] = []

        def remember(name: str, launch: Any, eager: Any) -> Any:
            names.append(name)
            return eager()

        monkeypatch.setattr(runtime, "triton_runs", lambda *tensors: True)
        monkeypatch.setattr(sequence_op, "triton_runs", lambda *tensors: True)
        monkeypatch.setattr(runtime, "with_fallback", remember)
        monkeypatch.setattr(sequence_op, "with_fallback", remember)
        keys, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
        alpha = torch.tensor(1.0)
        for down, up in ((weight, None), (weight[:2], weight[:, :2].contiguous())):
            layers = [(weight, down, up), (by_column(weight), down, up)]
            layers.append((weight, by_column(down), up))
            if up is not None:
                layers.append((weight, down, by_column(up)))
            for layer in layers:
                sequence_op._run(keys, layer[0], None, layer[1], layer[2], None, alpha)
        for device in ("cpu", "meta"):
            moment, rows = torch.zeros(8, 8, device=device), torch.zeros(3, 8, device=device)
            covariance_op._key_covariance_._init_fn(moment, rows, None, False)
            covariance_op._mirror(moment)
        assert len(names) == len(set(names)) == 11

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


def test_a_graph_zeroes_the_counters_of_a_series_broken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The graph holds the launches made before, and runs them at every replay."""
    capturing = [True]
    sets = [torch.zeros(workspace.SET, dtype=torch.int32) for _ in range(3)]
    given = iter(sets)
    monkeypatch.setattr(workspace, "_take", lambda device: next(given))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(workspace, "_of_stream", {})
    gpu = torch.device("cuda", 0)

    def series(fails: bool) -> str:
        workspace.counters(gpu).add_(1)
        if fails:
            raise RuntimeError("an error of the device")
        return "done"

    def fails_at_once() -> str:
        raise RuntimeError("an error of the device")

    assert runtime.with_fallback("some_op", lambda: series(False), str) == "done"
    with pytest.raises(RuntimeError):
        runtime.with_fallback("some_op", lambda: series(True), str)
    assert [int(counts[0]) for counts in sets] == [1, 0, 0]
    capturing[0] = False
    with pytest.raises(RuntimeError):
        runtime.with_fallback("some_op", lambda: series(True), str)
    # Nothing is known of a stream's set but that the next series does not get it.
    assert workspace._of_stream == {}
    assert [int(counts[0]) for counts in sets] == [1, 0, 1]

    # A series that breaks off before it takes a set, in a later capture: the first graph is whole,
    # and whether it runs is its own affair.
    capturing[0] = True
    sets.append(torch.zeros(workspace.SET, dtype=torch.int32))
    given = iter(sets[3:])
    assert runtime.with_fallback("some_op", lambda: series(False), str) == "done"
    with pytest.raises(RuntimeError):
        runtime.with_fallback("some_op", fails_at_once, str)
    assert int(sets[3][0]) == 1


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
    monkeypatch.setattr(runtime, "discard", lambda: forgotten.append(True))
    problem = make(replace(FORMS["keyed dense"], opened="all"))
    with pytest.raises(KeyboardInterrupt):
        runtime.with_fallback(
            "some_op",
            lambda: tiles.launch(problem.keys, problem.delta, problem.gate, base_output(problem)),
            lambda: pytest.fail("an interrupt is no failure to compile"),
        )
    assert used.any()
    assert forgotten == [True]
