"""Values and layouts that nobody expects of a layer, a gate or a moment: every path says what the
reference says."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coachhook_kernels import Delta, hook_linear_sequence, key_covariance_
from coachhook_kernels.hook_linear import reference
from coachhook_kernels.hook_linear_sequence import op as sequence_op
from coachhook_kernels.hook_linear_sequence import reference as sequence_reference
from coachhook_kernels.key_covariance import reference as covariance_reference
from coachhook_kernels.launch import runtime
from tests.support.kernels import (
    DEVICE,
    FORMS,
    Problem,
    base_output,
    forms,
    make,
    random,
    run_correction,
    run_linear,
    scalar,
)

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

NAN, INF = torch.nan, torch.inf
# Sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4, "equal_nan": True}
rows = pytest.mark.parametrize("n_rows", [1, 18])


@pytest.fixture(params=["plain", "kernels"], autouse=True)
def _path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "kernels":
        pytest.importorskip("triton")
    for place in (runtime, sequence_op):
        monkeypatch.setattr(place, "triton_runs", lambda *_: request.param == "kernels")
    monkeypatch.setattr(runtime, "_broken", set())
    yield
    assert not runtime.failures()


def problem_of(form: str, n_rows: int) -> Problem:
    problem = make(replace(FORMS[form], rows=max(n_rows, 2)))
    return problem._replace(keys=problem.keys[:n_rows])


def check(name: str, problem: Problem) -> Tensor:
    """Returns which gates are open."""
    expected = reference.hook_linear(*problem)
    for run in (run_linear, lambda given: run_correction(given, base_output(given).clone())):
        for got, want in zip(run(problem), expected, strict=True):
            torch.testing.assert_close(got, want, **CLOSE, msg=lambda found: f"{name}: {found}")
    return problem.gate.is_open(expected[1])


@forms
@rows
def test_scalars_of_a_gate(n_rows: int, form: str) -> None:
    problem = problem_of(form, n_rows)
    for alpha, opened in ((INF, False), (NAN, False), (-INF, True)):
        given = problem._replace(gate=problem.gate._replace(alpha=scalar(alpha)))
        assert (check(f"alpha {alpha}", given) == opened).all()
    for mean in (NAN, INF, -INF):
        given = problem._replace(gate=problem.gate._replace(mean=scalar(mean)))
        assert (check(f"mean {mean}", given) == (mean == -INF)).all()
    for std in (0.0, -0.0, NAN, INF, -1.0):
        for alpha in (0.0, INF):
            gate = problem.gate._replace(std=scalar(std), alpha=scalar(alpha))
            is_open = check(f"std {std}, alpha {alpha}", problem._replace(gate=gate))
            assert not (std != std and is_open.any())


@forms
@rows
def test_keys_of_every_kind(n_rows: int, form: str) -> None:
    problem = problem_of(form, n_rows)
    keys = problem.keys
    width = keys.shape[1]
    for value in (NAN, INF, -INF, 0.0):
        first = keys.clone()
        first[0] = value
        check(f"first {value}", problem._replace(keys=first))
        check(f"all {value}", problem._replace(keys=torch.full_like(keys, value)))
    views = {
        "one row": keys[:1].expand(n_rows, width),
        "one column": keys[:, :1].expand(n_rows, width),
        "one number": keys[:1, :1].expand(n_rows, width),
        "overlapping": random(n_rows + width, seed=3).as_strided((n_rows, width), (1, 1)),
    }
    for name, view in views.items():
        check(name, problem._replace(keys=view))


@forms
@rows
def test_parts_that_hold_elements_more_than_once(n_rows: int, form: str) -> None:
    problem = problem_of(form, n_rows)
    (down, up), gate = problem.delta, problem.gate
    assert problem.bias is not None
    parts = {
        "weight": problem._replace(weight=problem.weight[:1].expand_as(problem.weight)),
        "bias": problem._replace(bias=problem.bias[:1].expand_as(problem.bias)),
        "down": problem._replace(delta=Delta(down[:, :1].expand_as(down), up)),
    }
    if gate.keyed:
        for name in ("projection", "fingerprints", "enabled"):
            part = getattr(gate, name)
            gate_of_one = gate._replace(**{name: part[:1].expand_as(part)})
            parts[name] = problem._replace(gate=gate_of_one)
    for name, given in parts.items():
        check(name, given)


@forms
@rows
def test_what_is_empty(n_rows: int, form: str) -> None:
    problem = problem_of(form, n_rows)
    (down, up), gate = problem.delta, problem.gate
    check("no rows", problem._replace(keys=problem.keys[:0]))
    narrow = gate if gate.projection is None else gate._replace(projection=gate.projection[:, :0])
    nothing_in = problem._replace(
        keys=problem.keys[:, :0], weight=problem.weight[:, :0], delta=Delta(down[:, :0], up)
    )
    check("no inputs", nothing_in._replace(gate=narrow))
    assert problem.bias is not None
    nothing_out = Delta(down[:0]) if up is None else Delta(down, up[:0])
    check(
        "no outputs",
        problem._replace(weight=problem.weight[:0], bias=problem.bias[:0], delta=nothing_out),
    )
    if gate.fingerprints is None or gate.enabled is None:
        return
    for alpha in (0.0, -INF):
        closed = gate._replace(alpha=scalar(alpha))
        disabled = closed._replace(enabled=torch.zeros_like(gate.enabled))
        none = closed._replace(fingerprints=gate.fingerprints[:0], enabled=gate.enabled[:0])
        for name, given in (("all disabled", disabled), ("none", none)):
            is_open = check(f"{name}, alpha {alpha}", problem._replace(gate=given))
            assert (is_open == (alpha == -INF)).all()


def check_sequence(name: str, *given: object) -> None:
    expected = sequence_reference.hook_linear_sequence(*given)  # type: ignore[arg-type]
    found = hook_linear_sequence(*given)  # type: ignore[arg-type]
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, **CLOSE, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("form", ["calibrated dense", "calibrated factored"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (3, 20)], ids=str)
def test_sequences(shape: tuple[int, int], form: str) -> None:
    n_sequences, length = shape
    keys, weight, bias, delta, _ = make(replace(FORMS[form], rows=60))
    keys = keys[: n_sequences * length].view(*shape, -1)
    mask = torch.ones(shape, dtype=torch.bool, device=DEVICE)
    mask[:, length // 2 :] = False
    alpha = scalar(0.4)
    for value in (INF, -INF, NAN):
        for masked in (mask, None):
            check_sequence(f"alpha {value}", keys, weight, bias, delta, masked, scalar(value))
        for place in ((0, 0), (slice(None), -1), slice(None)):
            broken = keys.clone()
            broken[place] = value
            check_sequence(f"{value} at {place}", broken, weight, bias, delta, mask, alpha)
    check_sequence("zeros", keys * 0, weight, bias, delta, mask, alpha)
    check_sequence("all padding", keys, weight, bias, delta, mask & False, alpha)
    one = mask[:, :1].expand(shape)
    check_sequence("a mask of one column", keys, weight, bias, delta, one, alpha)
    check_sequence("a mask by column", keys, weight, bias, delta, mask.mT.contiguous().mT, alpha)
    column = keys[..., :1].expand_as(keys)
    check_sequence("keys of one column", column, weight, bias, delta, mask, alpha)
    rows_alike = weight[:1].expand_as(weight)
    check_sequence("a weight of one row", keys, rows_alike, bias, delta, mask, alpha)
    none_in = delta._replace(down=delta.down[:, :0])
    check_sequence("no inputs", keys[..., :0], weight[:, :0], bias, none_in, mask, alpha)


DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments(dtype: torch.dtype) -> None:
    """Keys of any float dtype, those for storage alone among them."""
    wide = random(30, 24, seed=1)
    half = random(24, 24, seed=2)
    start = half + half.mT
    mask = random(30, seed=3) > 0
    # By way of float32: torch writes into no 8-bit floats.
    broken = wide.index_fill(0, torch.tensor([4, 7], device=DEVICE), NAN)
    kept = mask.index_fill(0, torch.tensor([4, 7], device=DEVICE), False)
    for given, chosen in (
        (wide, mask),
        (wide, None),
        (wide, mask & False),
        (wide[:1].expand(30, 24), mask[:1].expand(30)),
        (wide[:0], mask[:0]),
        (broken, kept),
    ):
        keys = given.to(dtype)
        selected = keys.double() if chosen is None else keys.double()[chosen]
        want = start.double() + selected.mT @ selected
        got = key_covariance_(start.clone(), keys, chosen)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
        plain = covariance_reference.key_covariance_(start.clone(), keys, chosen)
        torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-4)
