"""What only a GPU can show of `hook_linear` and `hook_correction_`: graphs, streams, waiting."""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coachhook_kernels import hook_linear
from coachhook_kernels.hook_linear import op
from tests.support.kernels import (
    BRAIN,
    DEVICE,
    ENTRIES,
    FORMS,
    Problem,
    base_output,
    check,
    forms,
    kernels_only,
    make,
    random,
    run_correction,
    run_linear,
)

pytest.importorskip("triton")


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE != "cuda", reason="needs a CUDA device"),
]

EAGER = op.eager_correction_


@pytest.fixture(autouse=True)
def _kernels_only() -> Iterator[None]:
    with kernels_only():
        yield


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which has run before on the stream that captures."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@forms
@pytest.mark.parametrize("n_rows", [1, 16, 300])
class TestOnAGPU:
    def problem(self, form: str, n_rows: int, seed: int = 0) -> Problem:
        rank = FORMS[form].rank and 128
        case = replace(FORMS[form], rows=max(2, n_rows), d_in=1536, d_out=576, rank=rank)
        problem = make(replace(case, dtype=BRAIN, size=64, fingerprints=1000), seed)
        return problem._replace(keys=problem.keys[:n_rows].contiguous())

    def test_large_layers(self, form: str, n_rows: int) -> None:
        for entry in ENTRIES:
            check(self.problem(form, n_rows), entry)

    def test_a_graph_follows_its_inputs(self, form: str, n_rows: int) -> None:
        """Open in one replay, closed in the next, and open again."""
        problem = self.problem(form, n_rows)
        static = problem._replace(keys=problem.keys.clone())
        output = base_output(problem)
        results: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        def run() -> None:
            results["linear"] = run_linear(static)
            results["correction"] = run_correction(static, output)

        graph = capture(run)
        inputs = [problem.keys, problem.keys / 9, problem.keys.roll(1, 0), problem.keys]
        if problem.gate.keyed:
            inputs[1] = random(*problem.keys.shape, seed=99, dtype=BRAIN)
        was_open = []
        for keys in inputs:
            static.keys.copy_(keys)
            base = base_output(static)
            output.copy_(base)
            graph.replay()
            expected = {"linear": run_linear(static)}
            expected["correction"] = run_correction(static, base)
            for name, result in results.items():
                for got, want in zip(result, expected[name], strict=True):
                    assert torch.equal(got, want)
            is_open = check(static, "linear")
            was_open.append(is_open.any().item())
        assert was_open[:2] == [True, False]
        assert was_open[3]

    def test_reduce_overhead(self, form: str, n_rows: int) -> None:
        problem = self.problem(form, n_rows)

        @torch.compile(mode="reduce-overhead", fullgraph=True)
        def layer(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return hook_linear(keys, *problem[1:])

        for seed in range(5):
            keys = problem.keys.roll(seed, 0) * (1 + seed / 8)
            torch.compiler.cudagraph_mark_step_begin()
            result = [tensor.clone() for tensor in layer(keys)]
            expected = run_linear(problem._replace(keys=keys))
            for got, want in zip(result, expected, strict=True):
                assert torch.equal(got, want)

    @pytest.mark.parametrize("n_streams", [1, 2])
    def test_two_at_once(self, n_streams: int, form: str, n_rows: int) -> None:
        """Two threads, each with a stream of its own, or both with the same."""
        problems = [self.problem(form, n_rows, seed) for seed in (0, 50)]
        bases = [base_output(problem) for problem in problems]
        expected = [
            (run_linear(problem), run_correction(problem, base.clone()))
            for problem, base in zip(problems, bases, strict=True)
        ]
        streams = [torch.cuda.Stream() for _ in range(n_streams)]
        torch.cuda.synchronize()
        results: list[list[object]] = [[], []]
        start = threading.Barrier(2)

        def work(i: int) -> None:
            with torch.cuda.stream(streams[i % n_streams]), torch.no_grad():
                start.wait()
                for _ in range(50):
                    linear = run_linear(problems[i])
                    results[i].append((linear, run_correction(problems[i], bases[i].clone())))

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.cuda.synchronize()
        for i in range(2):
            assert len(results[i]) == 50
            for result in results[i]:
                torch.testing.assert_close(result, expected[i], rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [BRAIN, torch.float64], ids=str)
    def test_the_host_never_waits(
        self, dtype: torch.dtype, form: str, n_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor on the plain path, which float64 takes."""
        monkeypatch.setattr(op, "eager_correction_", EAGER)
        problem = self.problem(form, n_rows).to(dtype)
        base = base_output(problem)
        run_linear(problem)
        run_correction(problem, base)
        torch.cuda.set_sync_debug_mode("error")
        try:
            run_linear(problem)
            run_correction(problem, base)
        finally:
            torch.cuda.set_sync_debug_mode("default")
