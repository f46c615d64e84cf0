"""The kernels of `hook_linear` and `hook_correction_` against float64: natively on a GPU, else
interpreted. Each test goes through the public operation, which may run nothing but kernels here."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from coachhook_kernels import TokenGate, hook_correction_
from coachhook_kernels.hook_linear import op, reference
from coachhook_kernels.launch import runtime
from tests.support.hook_linear_cases import (
    table_of_fingerprints,
    table_of_gates,
    table_of_layouts,
    table_of_ranks,
    table_of_rows,
    table_of_shapes,
)
from tests.support.kernels import (
    BRAIN,
    DEVICE,
    FORMS,
    HALF,
    SINGLE,
    Case,
    Problem,
    Scores,
    base_output,
    check,
    check_case,
    entries_of,
    forms,
    kernels_only,
    make,
    run,
    run_correction,
    run_linear,
    scalar,
    spaced,
)

pytest.importorskip("triton")

from coachhook_kernels.hook_linear import tiles as tiles_module

# The interpreter computes with numpy, which warns of what is not finite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

EAGER = op.eager_correction_


@pytest.fixture(autouse=True)
def counters() -> Iterator[Callable[[], Tensor]]:
    with kernels_only() as of_the_next_launch:
        yield of_the_next_launch


def cases(table: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", table, ids=str)


@cases(table_of_rows())
def test_rows(case: Case) -> None:
    check_case(case)


@cases(table_of_shapes())
def test_shapes(case: Case) -> None:
    check_case(case)


@cases(table_of_ranks())
def test_ranks(case: Case) -> None:
    check_case(case)


@cases(table_of_fingerprints())
def test_fingerprints(case: Case) -> None:
    check_case(case)


@cases(table_of_gates())
def test_gates(case: Case) -> None:
    check_case(case)


@cases(table_of_layouts())
def test_layouts(case: Case) -> None:
    check_case(case)


def one_open(problem: Problem) -> Problem:
    """With a gate that no token clears but one."""
    second, first = problem.z().sort().values[-2:]
    return problem.with_alpha(((first + second) / 2).item())


def wide_keys(keys: Tensor) -> Tensor:
    """The same keys as a part of longer rows, whose other elements are NaN."""
    around = keys.new_full((*keys.shape[:-1], keys.shape[-1] + 3), torch.nan)
    around[..., : keys.shape[-1]] = keys
    return around[..., : keys.shape[-1]]


NOT_CONTIGUOUS: dict[str, Callable[[Tensor], Tensor]] = {
    "longer rows": wide_keys,
    "every second row": lambda keys: torch.stack([keys, keys * torch.nan], 1)[:, 0],
    "by column": lambda keys: keys.mT.contiguous().mT,
    "spaced": spaced,
}


@forms
@pytest.mark.parametrize("n_rows", [5, 18])
def test_keys_that_are_not_contiguous(n_rows: int, form: str) -> None:
    problem = make(replace(FORMS[form], rows=n_rows))
    for name, view in NOT_CONTIGUOUS.items():
        keys = view(problem.keys)
        assert torch.equal(keys, problem.keys)
        assert keys.stride() != problem.keys.stride(), name
        entries = entries_of(problem)
        if keys.stride(-1) != 1:
            entries = entries[:2]  # A launcher takes contiguous rows; the operations copy.
        check(problem._replace(keys=keys), *entries)


@pytest.mark.parametrize("n_rows", [6, 18])
def test_leading_shape(n_rows: int) -> None:
    """Of keys that no view can flatten: a transposed batch, and what padding left of one."""
    flat = make(Case(n_rows))
    expected = run_linear(flat)
    batch = flat.keys.view(2, n_rows // 2, -1)
    padded = torch.cat([batch * torch.nan, batch], 1)[:, n_rows // 2 :]
    for keys in (batch, batch.transpose(0, 1).contiguous().transpose(0, 1), padded):
        result = run_linear(flat._replace(keys=keys))
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got, want.view(got.shape))
            assert got.shape[:2] == (2, n_rows // 2)


@forms
@pytest.mark.parametrize("n_rows", [6, 18])
def test_an_output_that_is_not_contiguous_is_changed_in_place(n_rows: int, form: str) -> None:
    problem = make(replace(FORMS[form], rows=n_rows))
    base = base_output(problem)
    expected = run_correction(problem, base.clone())
    around = [base.new_full((n_rows, 2 * base.shape[-1]), 7.0) for _ in range(2)]
    views = [around[0][:, : base.shape[-1]], around[1][:, ::2], base.mT.contiguous().mT]
    for output in views:
        output.copy_(base)
        hook_correction_(output, problem.keys, problem.delta, problem.gate)
        assert torch.equal(output, expected[0])
    assert (around[0][:, base.shape[-1] :] == 7).all()
    assert (around[1][:, 1::2] == 7).all()
    batch = base.view(2, n_rows // 2, -1).transpose(0, 1).contiguous().transpose(0, 1)
    keys = problem.keys.view(2, n_rows // 2, -1)
    hook_correction_(batch, keys, problem.delta, problem.gate)
    assert torch.equal(batch.reshape(base.shape), expected[0])


@pytest.mark.parametrize("part", ["bias", "offset", "fingerprints", "enabled"])
@pytest.mark.parametrize("n_rows", [5, 18])
def test_parts_that_are_not_contiguous(n_rows: int, part: str) -> None:
    problem = make(Case(n_rows, fingerprints=12, disabled="some"))
    gate = problem.gate
    if part == "bias":
        assert problem.bias is not None
        strided = problem._replace(bias=spaced(problem.bias))
    else:
        strided = problem._replace(gate=gate._replace(**{part: spaced(getattr(gate, part))}))
    for got, want in zip(run_linear(strided), run_linear(problem), strict=True):
        assert torch.equal(got, want)
    check(strided, "linear")


@pytest.mark.parametrize("tile", [1, 70])
def test_of_equal_fingerprints_the_first_enabled_one_counts(tile: int) -> None:
    """tile: how far apart the equal ones are. Every product is a power of two, hence exact."""
    n_rows, size = 4, 16
    problem = make(Case(n_rows, d_in=size, size=size, fingerprints=5 * tile))
    assert problem.gate.fingerprints is not None
    unit = torch.eye(size, device=DEVICE)
    prints = unit[torch.arange(5 * tile, device=DEVICE) // 5 % 8 + 8]
    prints[tile::tile] = unit[0]
    enabled = torch.ones(5 * tile, dtype=torch.bool, device=DEVICE)
    enabled[tile] = False
    gate = problem.gate._replace(
        projection=2 * unit, offset=torch.zeros(size, device=DEVICE), fingerprints=prints,
        enabled=enabled, alpha=scalar(0.5),
    )  # fmt: skip
    tied = problem._replace(keys=unit[:1].expand(n_rows, size).contiguous(), gate=gate)
    for entry in entries_of(tied):
        _, score, index = run(entry, tied)
        assert (score == 1).all(), entry
        assert (index == 2 * tile).all(), entry


@pytest.mark.parametrize("disabled", ["none", "first", "last"])
def test_a_token_opposite_to_every_enabled_fingerprint(disabled: str) -> None:
    """The smallest cosine there is, which disabled fingerprints stand for as well."""
    size = 4
    unit = torch.eye(size, device=DEVICE)
    problem = make(Case(3, d_in=size, size=size, fingerprints=3))
    enabled = torch.ones(3, dtype=torch.bool, device=DEVICE)
    if disabled != "none":
        enabled[{"first": 0, "last": -1}[disabled]] = False
    gate = problem.gate._replace(
        projection=unit, offset=torch.zeros(size, device=DEVICE),
        fingerprints=unit[:1].expand(3, size).contiguous(), enabled=enabled, alpha=scalar(9.0),
    )  # fmt: skip
    opposite = problem._replace(keys=-unit[:1].expand(3, size).contiguous(), gate=gate)
    check(opposite)


def test_a_threshold_exactly_at_a_score_is_cleared() -> None:
    for form in FORMS.values():
        for n_rows in (4, 18):
            problem = make(replace(form, rows=n_rows))
            # Of the launch that is to clear it: another one may sum a score in another order.
            _, score, _ = run_correction(problem, base_output(problem))
            # Division must be torch's: of the gate's z, the last bit decides here.
            for z in ((score - problem.gate.mean) / problem.gate.std)[:4]:
                gate = problem.gate._replace(alpha=z.clone())
                base = base_output(problem)
                output, _, _ = run_correction(problem._replace(gate=gate), base.clone())
                assert torch.equal((output != base).any(-1), gate.is_open(score))


@forms
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("n_rows", [6, 18])
def test_a_key_that_is_not_finite_touches_its_own_token_alone(
    n_rows: int, value: float, form: str
) -> None:
    problem = make(replace(FORMS[form], rows=n_rows))
    clean = problem.z()
    keys = problem.keys.clone()
    keys[2, 5] = value
    broken = problem._replace(keys=keys)
    _, score, _ = reference.hook_linear(*broken.double())
    # A cosine with what is not finite is not a number; a norm may be infinite, which opens.
    assert not score[2].isfinite()
    if problem.gate.keyed or value != value:
        assert score[2].isnan()
        assert not problem.gate.is_open(score)[2]
    rest = torch.arange(n_rows, device=DEVICE) != 2
    assert torch.equal(broken.z()[rest], clean[rest])
    is_open = check(broken, poisoned=False)
    assert is_open[rest].any()
    assert not is_open[rest].all()


@pytest.mark.parametrize("fingerprints", [0, 3])
@pytest.mark.parametrize("n_rows", [4, 18])
def test_a_key_that_is_not_finite_without_an_enabled_fingerprint(
    n_rows: int, fingerprints: int
) -> None:
    case = Case(n_rows, fingerprints=fingerprints, disabled="all", opened="none")
    problem = make(case)
    problem.keys[1, 3] = torch.nan
    check(problem, "correction")


@pytest.mark.parametrize("form", ["keyed dense", "keyed factored", "calibrated factored"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("n_rows", [6, 18])
def test_a_correction_that_is_not_finite_reaches_open_tokens_alone(
    n_rows: int, value: float, form: str
) -> None:
    problem = one_open(make(replace(FORMS[form], rows=n_rows)))
    delta = problem.delta
    broken = (delta.down if delta.up is None else delta.up).clone()
    broken[3, 2] = value
    delta = delta._replace(**{"down" if delta.up is None else "up": broken})
    assert check(problem._replace(delta=delta), poisoned=False).sum() == 1


# In each dtype one number of rows for each form: what a launch leaves behind for the next is
# counters and lists of rows, which no dtype enters into.
@forms
@pytest.mark.parametrize(("n_rows", "dtype"), [(9, SINGLE), (9, HALF), (20, BRAIN)])
def test_a_second_launch_says_the_same(form: str, n_rows: int, dtype: torch.dtype) -> None:
    problem = make(replace(FORMS[form], rows=n_rows, dtype=dtype))
    for entry in entries_of(problem):
        for got, want in zip(run(entry, problem), run(entry, problem), strict=True):
            assert torch.equal(got, want), entry


@pytest.mark.parametrize("n_rows", [5, 70])
@pytest.mark.parametrize("lost", ["STORE", "ADD"])
def test_after_a_launch_that_fails_half_way_the_counters_are_zero(
    lost: str, n_rows: int, counters: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next launch of the stream would take what it finds for its own progress."""
    from triton.runtime.errors import OutOfResources

    whole = tiles_module.multiply_open

    def fails(left: Tensor, right: Tensor, output: Tensor, epilogue: object, *rest: object) -> None:
        if epilogue is getattr(tiles_module, lost):
            raise OutOfResources(1, 0, "shared memory")
        whole(left, right, output, epilogue, *rest)

    monkeypatch.setattr(tiles_module, "multiply_open", fails)
    monkeypatch.setattr(op, "eager_correction_", EAGER)
    problem = make(Case(n_rows, rank=3))
    check(problem, "correction")
    assert len(runtime._broken) == 1
    runtime._broken.clear()
    assert not counters().any()


def test_rank_zero_corrects_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to launch: the plain path scores and leaves the output."""
    monkeypatch.setattr(op, "eager_correction_", EAGER)
    problem = make(Case(6, rank=1))
    down, up = problem.delta
    assert up is not None
    nothing = problem.delta._replace(down=down[:0], up=up[:, :0])
    calibrated = TokenGate(*problem.gate[:3])
    for gate in (problem.gate, calibrated):
        empty = problem._replace(delta=nothing, gate=gate._replace(alpha=scalar(-9.0)))
        output, score, index = run_linear(empty)
        assert torch.equal(output, base_output(problem))
        Scores.of(empty).check(score, index)
