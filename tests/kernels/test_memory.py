"""`memory_gate` and `memory_add_`: kernels and plain torch against the reference in float64;
natively on a GPU, else interpreted."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook_kernels import KernelInputError, MemoryGate, memory_add_, memory_gate
from coachhook_kernels.memory import op, reference
from tests.support.kernels import BRAIN, DEVICE, HALF, SINGLE, dtypes, kernels_only, random, scalar

# The interpreter computes with numpy, which warns of what is not finite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

kernel = pytest.importorskip("coachhook_kernels.memory.kernel")


class Problem(NamedTuple):
    keys: Tensor
    gate: MemoryGate
    output: Tensor
    rows: Tensor


def make(
    n: int = 5,
    d: int = 37,
    size: int = 9,
    fingerprints: int = 6,
    dtype: torch.dtype = SINGLE,
    disabled: bool = False,
) -> Problem:
    """Two thirds of the tokens resemble an entry, of which each has up to two fingerprints."""
    entries = (fingerprints + 1) // 2
    projection, offset = random(size, d, seed=1) / d**0.5, 0.1 * random(size, seed=2)
    keys = random(n, d, seed=3).to(dtype)
    sketches = keys.float() @ projection.T - offset
    marks = normalize(random(fingerprints, size, seed=4), dim=-1)
    for i in range(min(n, fingerprints)):
        if i % 3 != 1:
            marks[i] = normalize(sketches[i] + 0.1 * marks[i], dim=-1)
    enabled = torch.ones(fingerprints, dtype=torch.bool, device=DEVICE)
    if disabled:
        enabled[::2] = False
    owner = torch.arange(fingerprints, device=DEVICE) // 2
    parts = (projection.to(dtype), offset.to(dtype), marks.to(dtype), owner, enabled)
    gate = MemoryGate(*parts, scalar(0.7))
    return Problem(keys, gate, random(n, d, seed=5).to(dtype), random(entries, d, seed=6).to(dtype))


def exact(problem: Problem) -> tuple[Tensor, Tensor]:
    gate = problem.gate
    wide = [part.double() for part in gate[:3]]
    return reference.memory_gate(problem.keys.double(), MemoryGate(*wide, *gate[3:]))


WAYS = ("kernels", "plain")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with kernels_only() if request.param == "kernels" else nullcontext():
        yield request.param


TABLE = {
    "one token": {"n": 1},
    "a tile of few rows": {"n": 16},
    "a row more": {"n": 17},
    "two blocks of rows": {"n": 70},
    "slices of d": {"n": 3, "d": 1100, "size": 64},
    "one fingerprint": {"fingerprints": 1},
    "several slabs": {"n": 5, "fingerprints": 300, "size": 16},
    "a width that no tile divides": {"size": 20, "fingerprints": 70},
    "some disabled": {"fingerprints": 9, "disabled": True},
}


@dtypes
@pytest.mark.parametrize("shape", TABLE)
def test_score_and_entry_are_the_reference_s(shape: str, dtype: torch.dtype, way: str) -> None:
    problem = make(**TABLE[shape], dtype=dtype)
    score, entry = memory_gate(problem.keys, problem.gate)
    want, of = exact(problem)
    # Of a cosine of unit vectors whose parts are rounded to `dtype`, and summed in float32.
    bound = 4 * torch.finfo(dtype).eps + 64 * torch.finfo(SINGLE).eps
    assert (score.double() - want.double()).abs().max() <= bound
    # Entries may differ where two cosines are closer than that.
    sketch = problem.keys.double() @ problem.gate.projection.double().T
    unit = normalize(sketch - problem.gate.offset.double(), dim=-1)
    cosines = unit @ problem.gate.fingerprints.double().T
    cosines[:, ~problem.gate.enabled] = -2
    for i, found in enumerate(entry.tolist()):
        assert found >= 0
        own = cosines[i, problem.gate.owner == found].max()
        assert own >= want[i].double() - 2 * bound, (i, found, of[i])
    assert (want >= 0.7).any()


def test_of_equal_fingerprints_the_first_enabled_one_counts(way: str) -> None:
    problem = make(n=20, fingerprints=200, size=16)
    alike = problem.gate.fingerprints[7].expand(200, 16).contiguous()
    enabled = torch.arange(200, device=DEVICE) >= 130
    gate = problem.gate._replace(fingerprints=alike, enabled=enabled)
    assert (memory_gate(problem.keys, gate)[1] == 65).all()


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), -float("inf")])
def test_keys_that_are_not_finite_score_nan_and_spoil_no_other(spoilt: float, way: str) -> None:
    problem = make(n=20)
    before = memory_gate(problem.keys, problem.gate)
    keys = problem.keys.clone()
    keys[4, 3] = spoilt
    score, entry = memory_gate(keys, problem.gate)
    assert score[4].isnan()
    others = torch.arange(20, device=DEVICE) != 4
    assert torch.equal(score[others], before[0][others])
    assert torch.equal(entry[others], before[1][others])
    output = problem.output[:1].expand(20, -1).contiguous()
    added = memory_add_(output.clone(), score, entry, scalar(-2.0), problem.rows)
    assert torch.equal(added[4], output[4])


def test_none_enabled_and_no_entries_open_nothing(way: str) -> None:
    problem = make()
    none = problem.gate._replace(enabled=torch.zeros_like(problem.gate.enabled))
    empty = problem.gate._replace(
        fingerprints=problem.gate.fingerprints[:0],
        owner=problem.gate.owner[:0],
        enabled=problem.gate.enabled[:0],
    )
    for gate, rows in ((none, problem.rows), (empty, problem.rows[:0])):
        score, entry = memory_gate(problem.keys, gate)
        assert (score == -1).all()
        assert (entry == -1).all()
        output = memory_add_(problem.output.clone(), score, entry, scalar(-5.0), rows)
        assert torch.equal(output, problem.output)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@pytest.mark.parametrize("columns", [1, 37, 1024, 2500])
def test_open_tokens_receive_their_row_and_closed_ones_nothing(
    columns: int, dtype: torch.dtype, way: str
) -> None:
    output, rows = random(6, columns, seed=1).to(dtype), random(3, columns, seed=2)
    score = torch.tensor([0.9, 0.7, 0.69, float("nan"), 1.0, 0.8], device=DEVICE)
    entry = torch.tensor([2, 0, 1, 1, -1, 2], device=DEVICE)
    threshold = score[1].clone()
    got = memory_add_(output.clone(), score, entry, threshold, rows)
    for i, row in ((0, 2), (1, 0), (5, 2)):
        assert torch.equal(got[i], output[i] + rows[row].to(dtype))
    for i in (2, 3, 4):
        assert torch.equal(got[i], output[i])


def test_a_brain_float_sum_is_rounded_once(way: str) -> None:
    output, rows = random(4, 50, seed=1).to(BRAIN), random(2, 50, seed=2).to(BRAIN)
    score, entry = torch.ones(4, device=DEVICE), torch.tensor([0, 1, 1, 0], device=DEVICE)
    got = memory_add_(output.clone(), score, entry, scalar(0.5), rows)
    want = output.double() + rows[entry].double()
    # A spacing, not half of one: the interpreter cuts bfloat16 off.
    assert ((got.double() - want).abs() <= torch.finfo(BRAIN).eps * want.abs()).all()


def test_leading_dimensions_and_strides_are_the_caller_s(way: str) -> None:
    problem = make(n=12, d=24)
    keys = problem.keys.view(2, 6, 24)
    strided = keys.mT.contiguous().mT
    gate = problem.gate
    apart = gate._replace(
        projection=gate.projection.mT.contiguous().mT,
        fingerprints=gate.fingerprints.repeat_interleave(2, dim=0)[::2],
    )
    score, entry = memory_gate(strided, apart)
    assert score.shape == entry.shape == (2, 6)
    want = memory_gate(problem.keys, gate)
    torch.testing.assert_close(score.flatten(), want[0])
    assert torch.equal(entry.flatten(), want[1])
    output = problem.output.view(2, 6, 24)
    for made in (
        output.clone(),
        output.mT.contiguous().mT.clone(),
        output.repeat(1, 1, 2)[..., :24],
    ):
        got = memory_add_(made, score, entry, gate.threshold, problem.rows)
        assert got is made
        torch.testing.assert_close(
            got, reference.memory_add(output, score, entry, gate.threshold, problem.rows)
        )


def test_a_sketch_too_wide_for_the_kernels_goes_to_plain_torch() -> None:
    problem = make(n=3, d=200, size=130, fingerprints=4)
    with kernels_only():
        score, _ = memory_gate(problem.keys, problem.gate)
    torch.testing.assert_close(score, reference.memory_gate(problem.keys, problem.gate)[0])


def test_no_tokens(way: str) -> None:
    problem = make()
    score, entry = memory_gate(problem.keys[:0], problem.gate)
    assert score.shape == entry.shape == (0,)
    output = memory_add_(problem.output[:0], score, entry, scalar(0.0), problem.rows)
    assert output.shape == (0, 37)


def test_gradients_pass_the_addition_and_not_the_gate() -> None:
    problem = make()
    keys, output = problem.keys.requires_grad_(), problem.output.clone().requires_grad_()
    score, entry = memory_gate(keys, problem.gate)
    assert not score.requires_grad
    made = 1.0 * output
    got = memory_add_(made, score, entry, problem.gate.threshold, problem.rows)
    assert got is not made
    assert not torch.equal(got, made)
    got.sum().backward()
    assert torch.equal(output.grad, torch.ones_like(output))


def test_torch_accepts_both_operations() -> None:
    problem = make()
    torch.library.opcheck(op._memory_gate._overload, (problem.keys, *problem.gate[:5]))
    score, entry = memory_gate(problem.keys, problem.gate)
    given = (problem.output.clone(), score, entry, problem.gate.threshold, problem.rows)
    torch.library.opcheck(op._memory_add._overload, given)


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, device=options.pop("device", DEVICE), **options)


GIVEN = make()
BAD_GATES = {
    "keys without a dimension": (zeros(), {}, r"\(\.\.\., d\)"),
    "integer keys": (GIVEN.keys.long(), {}, "torch.int64"),
    "keys of another width": (zeros(5, 36), {}, r"projection.*\(9, 37\).*\(s, 36\)"),
    "fingerprints of another width": (None, {"fingerprints": zeros(6, 8)}, r"\(f, 9\)"),
    "an offset of another length": (None, {"offset": zeros(8)}, r"offset.*\(9,\)"),
    "owners of another number": (None, {"owner": zeros(5, dtype=torch.int64)}, r"owner.*\(6,\)"),
    "owners that are floats": (None, {"owner": zeros(6)}, "owner.*torch.int64"),
    "enabled as numbers": (None, {"enabled": zeros(6)}, "enabled.*torch.bool"),
    "a threshold for each": (None, {"threshold": zeros(6)}, "threshold.*0-d float32"),
    "another device": (None, {"offset": zeros(9, device="meta")}, "offset is on meta"),
}


@pytest.mark.parametrize("case", BAD_GATES)
def test_a_gate_that_does_not_fit_is_refused(case: str) -> None:
    keys, parts, message = BAD_GATES[case]
    with pytest.raises(KernelInputError, match=message):
        memory_gate(GIVEN.keys if keys is None else keys, GIVEN.gate._replace(**parts))


BAD_SUMS = {
    "output without a dimension": ({"output": zeros()}, r"output.*\(\.\.\., d\)"),
    "integer output": ({"output": zeros(5, 37, dtype=torch.int32)}, "torch.int32"),
    "scores of other tokens": ({"score": zeros(4)}, r"score.*\(5,\)"),
    "scores of another dtype": ({"score": zeros(5, dtype=HALF)}, "score.*torch.float32"),
    "entries of another dtype": ({"entry": zeros(5, dtype=torch.int32)}, "entry.*torch.int64"),
    "rows of another width": ({"rows": zeros(3, 36)}, r"rows.*\(e, 37\)"),
    "another device": ({"rows": zeros(3, 37, device="meta")}, "rows is on meta"),
    "an output that overlaps itself": ({"output": zeros(37).expand(5, 37)}, "more than once"),
}


@pytest.mark.parametrize("case", BAD_SUMS)
def test_an_addition_that_does_not_fit_is_refused(case: str) -> None:
    parts, message = BAD_SUMS[case]
    score, entry = memory_gate(GIVEN.keys, GIVEN.gate)
    given = {"output": GIVEN.output, "score": score, "entry": entry}
    given |= {"threshold": GIVEN.gate.threshold, "rows": GIVEN.rows}
    with pytest.raises(KernelInputError, match=message):
        memory_add_(**given | parts)
