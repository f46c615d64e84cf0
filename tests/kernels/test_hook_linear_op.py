"""`hook_linear` and `hook_correction_` as operations: registered, differentiated, compiled."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from coachhook_kernels import Delta, KernelInputError, hook_correction_, hook_linear
from coachhook_kernels.hook_linear import op, reference
from coachhook_kernels.launch import runtime
from tests.support.kernels import (
    BRAIN,
    DEVICE,
    FORMS,
    SINGLE,
    Case,
    Problem,
    assert_as_exact,
    base_output,
    dtypes,
    forms,
    make,
    random,
    run_correction,
    run_linear,
    scalar,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

DOUBLE = torch.float64
OPS = torch.ops.coachhook
CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def flat(problem: Problem) -> tuple[Tensor | None, ...]:
    return (problem.keys, problem.weight, problem.bias, *problem.delta, *problem.gate)


class TestRegistration:
    @forms
    @pytest.mark.parametrize(
        ("shape", "bias"),
        [((5,), True), ((1,), False), ((2, 3), True), ((), True)],
    )
    def test_hook_linear(self, bias: bool, shape: tuple[int, ...], form: str) -> None:
        problem = make(replace(FORMS[form], rows=6, bias=bias))
        keys = problem.keys[: max(1, torch.Size(shape).numel())].view(*shape, -1)
        for needs_grad in (False, True):
            given = problem._replace(keys=keys.clone().requires_grad_(needs_grad))
            torch.library.opcheck(OPS.hook_linear.default, flat(given), test_utils=CHECKS)

    @forms
    @pytest.mark.parametrize("shape", [(5,), (1,), (2, 3), ()], ids=str)
    def test_hook_correction(self, shape: tuple[int, ...], form: str) -> None:
        problem = make(replace(FORMS[form], rows=6))
        keys = problem.keys[: max(1, torch.Size(shape).numel())].view(*shape, -1)
        output = base_output(problem._replace(keys=keys))
        for given in (output, output.mT.contiguous().mT if output.ndim > 1 else output):
            arguments = (given, keys, *problem.delta, *problem.gate)
            torch.library.opcheck(OPS.hook_correction_.default, arguments, test_utils=CHECKS)

    def test_gradient_in_weight_and_bias(self) -> None:
        problem = make(Case(6, layout="conv1d"))
        assert problem.bias is not None
        given = problem._replace(
            weight=problem.weight.detach().requires_grad_(), bias=problem.bias.requires_grad_()
        )
        torch.library.opcheck(OPS.hook_linear.default, flat(given), test_utils=CHECKS)

    @forms
    @pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
    def test_an_empty_batch(self, shape: tuple[int, ...], form: str) -> None:
        problem = make(FORMS[form])
        keys = problem.keys.new_empty(*shape, problem.keys.shape[-1]).requires_grad_()
        output, score, index = run_linear(problem._replace(keys=keys))
        assert output.shape == (*shape, problem.weight.shape[0])
        assert score.shape == index.shape == shape
        output.sum().backward()
        assert keys.grad is not None
        assert keys.grad.shape == keys.shape
        given = problem._replace(keys=keys.detach())
        again, score, index = run_correction(given, output.detach())
        assert again.shape == output.shape
        assert score.shape == index.shape == shape
        assert score.dtype == SINGLE
        assert index.dtype == torch.int64


class TestGradient:
    """The gate of none of these changes within the steps that `gradcheck` takes."""

    @forms
    def test_of_the_reference(self, form: str) -> None:
        problem = make(FORMS[form]).double()
        self.check(lambda *given: reference.hook_linear(*given, *problem[3:])[0], problem)

    @forms
    def test_of_the_operation(self, form: str) -> None:
        problem = make(FORMS[form]).double()
        self.check(lambda *given: hook_linear(*given, *problem[3:])[0], problem)

    def check(self, function: Callable[..., Tensor], problem: Problem) -> None:
        inputs = [tensor.requires_grad_() for tensor in problem[:3] if tensor is not None]
        assert torch.autograd.gradcheck(function, inputs)

    @dtypes
    @forms
    @pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=str)
    @pytest.mark.parametrize("layout", ["linear", "conv1d"])
    def test_is_that_of_the_reference(
        self, layout: str, shape: tuple[int, ...], form: str, dtype: torch.dtype
    ) -> None:
        problem = make(replace(FORMS[form], rows=6, dtype=dtype, layout=layout))
        problem = problem._replace(keys=problem.keys.view(*shape, -1))
        towards = random(*shape, problem.weight.shape[0], seed=9, dtype=dtype)

        def gradients(run: Any, given: Problem) -> list[Tensor]:
            leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:3]]
            output, score, index = run(*leaves, *given[3:])
            assert not score.requires_grad
            assert not index.requires_grad
            return list(torch.autograd.grad(output, leaves, towards.to(output.dtype)))

        got = gradients(hook_linear, problem)
        plain = gradients(reference.hook_linear, problem)
        exact = gradients(reference.hook_linear, problem.double())
        for mine, eager, wanted in zip(got, plain, exact, strict=True):
            assert mine.dtype == dtype
            assert_as_exact(mine, eager, wanted)

    def test_of_the_keys_alone_keeps_no_keys(self) -> None:
        problem = make(Case())
        saved: list[int] = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        keys = problem.keys.clone().requires_grad_()
        with hooks(lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda kept: kept):
            run_linear(problem._replace(keys=keys))
        assert saved
        assert keys.data_ptr() not in saved

    def test_a_closed_gate_stops_what_is_not_finite(self) -> None:
        problem = make(Case(rank=5))
        assert problem.delta.up is not None
        keys = problem.keys.clone().requires_grad_()
        output, score, _ = run_linear(problem._replace(keys=keys))
        is_open = problem.gate.is_open(score)
        grad = torch.ones_like(output)
        grad[is_open] = torch.inf
        output.backward(grad)
        assert keys.grad is not None
        assert keys.grad[~is_open].isfinite().all()
        expected = problem.weight.sum(0).expand_as(keys)[~is_open]
        torch.testing.assert_close(keys.grad[~is_open], expected)

    @forms
    def test_a_correction_has_none(self, form: str) -> None:
        problem = make(FORMS[form])
        output = base_output(problem)
        keys = problem.keys.clone().requires_grad_()
        for given, into in ((keys, output), (problem.keys, output.clone().requires_grad_())):
            with pytest.raises(KernelInputError, match=r"no gradient.*torch\.no_grad.*hook_linear"):
                hook_correction_(into, given, problem.delta, problem.gate)
            with torch.no_grad():
                hook_correction_(into, given, problem.delta, problem.gate)


class TestCompile:
    def follow(self, compiled: Callable[..., Any], plain: Callable[..., Any], form: str) -> None:
        # No number of rows is another size as well: the compiler takes equal sizes for one.
        for n_rows in (6, 7, 3, 20, 6):
            problem = make(replace(FORMS[form], rows=n_rows))
            results = [run(problem.keys, base_output(problem)) for run in (compiled, plain)]
            for got, want in zip(*results, strict=True):
                # Compiled code may fuse the operations around, never the one in question.
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def functions(self, form: str) -> Iterator[Callable[..., Any]]:
        problem = make(FORMS[form])

        def linear(keys: Tensor, _: Tensor) -> Any:
            return run_linear(problem._replace(keys=keys * 1.0))

        def correction(keys: Tensor, output: Tensor) -> Any:
            output = output + 0.0
            return run_correction(problem._replace(keys=keys), output)

        def into(keys: Tensor, output: Tensor) -> Any:
            return run_correction(problem._replace(keys=keys), output)

        yield from (linear, correction, into)

    @forms
    def test_follows_the_rows_with_one_graph(self, form: str) -> None:
        for plain in self.functions(form):
            torch._dynamo.reset()
            counter = CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(plain, backend=counter, fullgraph=True, dynamic=True)
            with torch.no_grad():
                self.follow(compiled, plain, form)
            assert counter.frame_count == 1

    def test_gradient(self) -> None:
        torch._dynamo.reset()
        problem = make(Case(rank=5))

        def loss(keys: Tensor) -> Tensor:
            return run_linear(problem._replace(keys=keys))[0].square().sum()

        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
        for n_rows in (5, 8):
            keys = make(Case(n_rows, rank=5)).keys
            grads = []
            for run in (compiled, loss):
                leaf = keys.clone().requires_grad_()
                run(leaf).backward()
                grads.append(leaf.grad)
            torch.testing.assert_close(*grads)

    @pytest.mark.slow  # A C++ compiler builds what Inductor writes.
    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    def test_inductor(self) -> None:
        for plain in self.functions("keyed factored"):
            torch._dynamo.reset()
            compiled = torch.compile(plain, fullgraph=True, dynamic=True)
            with torch.no_grad():
                self.follow(compiled, plain, "keyed factored")


class TestOtherDtypes:
    @pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
    def test_parts_wider_than_half_precision_keys(self, dtype: torch.dtype) -> None:
        """A single Δ beside a half model: the plain path, with the model's output."""
        problem = make(Case(6, rank=5, dtype=BRAIN))
        wide = problem.to(dtype)
        mixed = problem._replace(delta=wide.delta, gate=wide.gate)
        expected, score, index = reference.hook_linear(*mixed)
        for run in (run_linear, lambda given: run_correction(given, base_output(given))):
            output, got_score, got_index = run(mixed)
            assert output.dtype == BRAIN
            torch.testing.assert_close(output, expected)
            torch.testing.assert_close(got_score, score)
            assert torch.equal(got_index, index)

    def test_an_output_of_another_dtype(self) -> None:
        problem = make(Case(6, rank=5, dtype=BRAIN))
        base = base_output(problem).float()
        output, score, _ = run_correction(problem, base.clone())
        assert output.dtype == SINGLE
        is_open = problem.gate.is_open(score)
        assert torch.equal(output[~is_open], base[~is_open])
        down, up = problem.delta
        assert up is not None
        correction = problem.delta.expand(problem.delta.project(problem.keys)).float()
        # The open rows may be multiplied by themselves, and a product may sum in another order in
        # another shape: each of n terms is within n ε of itself in float32; `A k` and then `U A k`
        # are stored in bfloat16 and may fall on the next one.
        terms = problem.keys.double().abs() @ down.double().abs().mT @ up.double().abs().mT
        n_terms = sum(down.shape) + 1
        bound = (n_terms * torch.finfo(SINGLE).eps + 2 * torch.finfo(BRAIN).eps) * terms
        bound += torch.finfo(SINGLE).eps * base.abs()
        assert ((output - base - correction)[is_open].abs() <= bound[is_open]).all()


def test_the_plain_path_is_chosen_where_the_kernels_cannot_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a dtype that the kernels do not take, or of several; or with fingerprints too wide."""
    monkeypatch.setattr(runtime, "triton_runs", lambda *tensors: True)
    problem = make(Case(rank=5))
    assert op._kernels_take(problem.keys, problem.delta, problem.gate)
    double = problem.double()
    assert not op._kernels_take(problem.keys, double.delta, problem.gate)
    assert not op._kernels_take(problem.keys, problem.delta, double.gate)
    assert not op._kernels_take(problem.keys, problem.delta, problem.gate, double.weight)
    assert not op._kernels_take(problem.keys[:0], problem.delta, problem.gate)
    nothing = Delta(problem.delta.down[:0], problem.weight[:, :0])
    assert not op._kernels_take(problem.keys, nothing, problem.gate)
    for size, taken in ((op.WIDEST_SKETCH, True), (op.WIDEST_SKETCH + 1, False)):
        wide = make(Case(size=size, d_in=200))
        assert op._kernels_take(wide.keys, wide.delta, wide.gate) == taken


@forms
def test_autocast_casts_all_but_the_gate(form: str) -> None:
    """As it does for a linear layer; gradients come back in the dtype of the inputs."""
    problem = make(FORMS[form])
    keys, weight, bias, delta = problem.keys, problem.weight, problem.bias, problem.delta
    cast = problem._replace(
        keys=keys.to(BRAIN),
        weight=weight.to(BRAIN),
        bias=None if bias is None else bias.to(BRAIN),
        delta=delta.to(BRAIN),
    )
    expected = run_linear(cast)
    keys = keys.clone().requires_grad_()
    with torch.autocast(DEVICE, dtype=BRAIN):
        output, score, index = run_linear(problem._replace(keys=keys))
    assert output.dtype == BRAIN
    assert score.dtype == SINGLE
    torch.testing.assert_close((output, score, index), expected)
    output.sum().backward()
    assert keys.grad is not None
    assert keys.grad.dtype == SINGLE


@forms
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("path", ["plain", "kernels"])
@pytest.mark.parametrize("n_rows", [5, 20])
def test_autocast_casts_for_a_correction_what_it_does_for_a_layer(
    n_rows: int, path: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "kernels":
        pytest.importorskip("triton")
    monkeypatch.setattr(runtime, "triton_runs", lambda *tensors: path == "kernels")
    monkeypatch.setattr(runtime, "_broken", set())
    problem = make(replace(FORMS[form], rows=n_rows))
    base = base_output(problem)
    cast = problem._replace(keys=problem.keys.to(BRAIN), delta=problem.delta.to(BRAIN))
    expected = reference.hook_linear(*cast._replace(weight=cast.weight.to(BRAIN), bias=None))[1:]
    with torch.autocast(DEVICE, dtype=BRAIN):
        _, linear_score, linear_index = run_linear(problem)
        output, score, index = run_correction(problem, base.clone())
    torch.testing.assert_close((score, index), expected)
    # Of a norm the plain path rounds the vector, and the kernels do not.
    rounding = 1e-5 if problem.gate.keyed else torch.finfo(BRAIN).eps
    torch.testing.assert_close(score, linear_score, rtol=rounding, atol=0)
    assert torch.equal(index, linear_index)
    is_open = problem.gate.is_open(score)
    assert torch.equal(output[~is_open], base[~is_open])
    correction = cast.delta.expand(cast.delta.project(cast.keys))
    # In float32 the correction would differ from what a layer under autocast adds.
    torch.testing.assert_close((output - base)[is_open], correction[is_open].float())
    assert not runtime.failures()


@pytest.mark.parametrize("form", ["keyed dense", "keyed factored"])
def test_more_open_than_alpha_asks_is_never(form: str) -> None:
    """Neither an infinite nor an undefined threshold opens a gate; minus infinity opens all."""
    problem = make(FORMS[form])
    base = base_output(problem)
    for alpha, opened in ((torch.inf, False), (torch.nan, False), (-torch.inf, True)):
        gate = problem.gate._replace(alpha=scalar(alpha))
        output, score, _ = run_correction(problem._replace(gate=gate), base.clone())
        assert (gate.is_open(score) == opened).all()
        assert ((output != base).any(-1) == opened).all()
