"""The keyed gate of many rows: blocks of rows against slabs of fingerprints; natively on a GPU,
else interpreted."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.support.kernels import (
    BRAIN,
    DEVICE,
    SINGLE,
    Case,
    Problem,
    base_output,
    check,
    check_case,
    kernels_only,
    make,
    run_tiles,
    scalar,
)

pytest.importorskip("triton")

from coachhook_kernels.hook_linear import tiles_match

# The interpreter computes with numpy, which warns of what is not finite.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

TILE = tiles_match.FINGERPRINT_TILE


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with kernels_only():
        yield


def slabs(case: Case) -> int:
    """How many the launch for a case has."""
    n_blocks = -(-case.rows // tiles_match.match_rows(case.dtype))
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    return -(-case.fingerprints // tiles_match.slab_length(case.fingerprints, n_blocks, device))


@pytest.mark.parametrize("disabled", ["none", "some"])
@pytest.mark.parametrize(("n_rows", "dtype"), [(5, BRAIN), (130, BRAIN), (20, SINGLE)], ids=str)
def test_several_slabs(n_rows: int, dtype: torch.dtype, disabled: str) -> None:
    case = Case(n_rows, fingerprints=11 * TILE + 3, size=16, dtype=dtype, disabled=disabled)
    assert slabs(case) > 1
    check_case(case, "tiles")


def test_more_slabs_than_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    count = tiles_match.SLAB_TILE + 3
    monkeypatch.setattr(tiles_match, "multiprocessors", lambda device: count)
    case = Case(9, fingerprints=count * TILE, size=16, dtype=BRAIN)
    assert slabs(case) == count
    check_case(case, "tiles")


def unit_problem(case: Case, prints: Tensor, enabled: Tensor, key: Tensor) -> Problem:
    """Every row has the same key; every cosine is a product of powers of two, hence exact."""
    size = key.shape[0]
    problem = make(case)
    gate = problem.gate._replace(
        projection=2 * torch.eye(size, device=DEVICE, dtype=case.dtype),
        offset=torch.zeros(size, device=DEVICE, dtype=case.dtype),
        fingerprints=prints.to(case.dtype), enabled=enabled, alpha=scalar(0.5),
    )  # fmt: skip
    keys = key.to(case.dtype).expand(case.rows, size).contiguous()
    return problem._replace(keys=keys, gate=gate)


@pytest.mark.parametrize("first", [0, 5, TILE - 1, TILE, 3 * TILE + 1, 7 * TILE])
def test_of_equal_fingerprints_in_several_slabs_the_first_enabled_one_counts(first: int) -> None:
    size, count = 16, 8 * TILE
    case = Case(70, d_in=size, size=size, fingerprints=count, dtype=BRAIN)
    assert slabs(case) > 1
    unit = torch.eye(size, device=DEVICE)
    enabled = torch.arange(count, device=DEVICE) >= first
    tied = unit_problem(case, unit[:1].expand(count, size), enabled, unit[0])
    _, score, index = run_tiles(tied, base_output(tied))
    assert (score == 1).all()
    assert (index == first).all()


def test_a_row_opposite_to_every_fingerprint_has_the_first_of_them() -> None:
    """The smallest cosine there is: no slab without an enabled fingerprint may stand for one."""
    size, count = 16, 8 * TILE
    case = Case(70, d_in=size, size=size, fingerprints=count, dtype=BRAIN)
    unit = torch.eye(size, device=DEVICE)
    enabled = torch.arange(count, device=DEVICE) == 5 * TILE + 2
    opposite = unit_problem(case, unit[:1].expand(count, size), enabled, -unit[0])
    _, score, index = run_tiles(opposite, base_output(opposite))
    assert (score == -1).all()
    assert (index == 5 * TILE + 2).all()


@pytest.mark.parametrize("count", [0, 8 * TILE])
def test_without_an_enabled_fingerprint(count: int) -> None:
    case = Case(70, fingerprints=count, disabled="all", opened="none", dtype=BRAIN)
    problem = make(case)
    problem.keys[1, 3] = torch.nan
    check(problem, "tiles")
    _, score, index = run_tiles(problem, base_output(problem))
    assert score[1].isnan()
    assert (index == -1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_matches_nothing(value: float) -> None:
    problem = make(Case(70, fingerprints=8 * TILE, size=16, dtype=BRAIN))
    problem.keys[66, 5] = value
    check(problem, "tiles", poisoned=False)
    _, score, index = run_tiles(problem, base_output(problem))
    assert score.isnan().nonzero().flatten().tolist() == [66]
    assert index[66] == -1


@pytest.mark.parametrize("n_fingerprints", [0, 1, TILE, TILE + 1, 10_000, 100_000])
@pytest.mark.parametrize("n_blocks", [1, 8, 64, 1000])
def test_slabs_are_whole_tiles_and_fill_a_gpu_where_they_can(
    n_blocks: int, n_fingerprints: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles_match, "multiprocessors", lambda device: 132)
    slab = tiles_match.slab_length(n_fingerprints, n_blocks, torch.device("cuda"))
    assert slab >= TILE
    assert slab % TILE == 0
    n_slabs = -(-n_fingerprints // slab)
    assert n_blocks * n_slabs <= max(2 * 132, n_blocks)
    # With half as long a slab there would be more programs than wanted.
    assert slab == TILE or n_blocks * -(-n_fingerprints // (slab // 2)) > 132
