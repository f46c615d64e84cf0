"""What the kernels of few rows do between their programs: slices, tickets, and any order of starts.

The interpreter runs one program after another, so that a program which waited would hang.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.kernels import (
    BRAIN,
    DEVICE,
    FORMS,
    SINGLE,
    Case,
    base_output,
    check,
    check_case,
    kernels_only,
    make,
    run_correction,
    run_linear,
)

pytest.importorskip("triton")

from triton.runtime import interpreter

from coachhook_kernels.hook_linear import decode, decode_match

interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="a GPU starts programs as it likes")
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

SERIES = ("linear", "correction")
DECODED = ("keyed dense", "keyed factored", "calibrated factored")
decoded = pytest.mark.parametrize("form", DECODED)

ORDERS: dict[str, Callable[[int], list[int]]] = {
    "last first": lambda n: list(range(n))[::-1],
    "shuffled": lambda n: random.Random(n).sample(range(n), n),
}


@pytest.fixture(autouse=True)
def counters() -> Iterator[Callable[[], Tensor]]:
    with kernels_only() as of_the_next_launch:
        yield of_the_next_launch


def slice_up(monkeypatch: pytest.MonkeyPatch, slices: int) -> None:
    """Tiles so small that small layers have many, in so many slices."""

    def config(d_in: int, d_out: int, tile: int, *_: object) -> dict[str, int]:
        return {"BN": 16, "BK": 16, "SLICES": slices, "num_warps": 4, "num_stages": 2}

    monkeypatch.setattr(decode, "default_config", config)


def start_in(monkeypatch: pytest.MonkeyPatch, order: Callable[[int], list[int]]) -> None:
    builder = interpreter.interpreter_builder
    start = builder.set_grid_idx

    def start_another(x: int, y: int, z: int) -> None:
        start(order(builder.grid_dim[0])[x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", start_another)


@decoded
@pytest.mark.parametrize("slices", [1, 2, 4, 16])
@pytest.mark.parametrize(("n_rows", "dtype"), [(1, SINGLE), (6, BRAIN)])
def test_slices(
    n_rows: int, dtype: torch.dtype, slices: int, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 13 steps, of which 16 slices leave some without any; five tiles of weights, or three of
    the projection."""
    slice_up(monkeypatch, slices)
    case = replace(FORMS[form], rows=n_rows, d_in=201, d_out=70, size=40, dtype=dtype)
    case = replace(case, rank=case.rank and 40, opened="some" if n_rows > 1 else "all")
    check_case(case, *SERIES)


def test_a_projection_of_more_tiles_than_there_are_counters(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Is not split, and neither are its neighbours' counters touched."""
    slice_up(monkeypatch, 2)
    monkeypatch.setattr(decode, "TILE_COUNTERS", 2)
    for n_tiles, slices in ((2, 4), (3, 1)):
        assert decode.projection_slices(19, n_tiles, 16, True) == slices
    check_case(Case(6, d_in=300, d_out=20, size=40), *SERIES)


@interpreted
@decoded
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_rows", [1, 6])
def test_programs_may_start_in_any_order(
    n_rows: int, order: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit: slices are added in one order, whoever is last."""
    slice_up(monkeypatch, 4)
    case = replace(FORMS[form], rows=max(2, n_rows), d_in=201, d_out=40, size=20, fingerprints=1200)
    problem = make(replace(case, rank=case.rank and 20, dtype=BRAIN))
    problem = problem._replace(keys=problem.keys[:n_rows].contiguous())
    base = base_output(problem)
    expected = (*run_linear(problem), *run_correction(problem, base.clone()))
    start_in(monkeypatch, ORDERS[order])
    got = (*run_linear(problem), *run_correction(problem, base.clone()))
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    check(problem, *SERIES)


@interpreted
@pytest.mark.parametrize("n_rows", [1, 6, 33])
def test_tickets_go_to_whichever_programs_come(
    n_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each program gets one ticket, as if others had taken the next: of those that find the match
    open, the last decides."""
    slice_up(monkeypatch, 1)
    take = decode_match.take
    last_taker: list[tuple[int, ...]] = []
    takers: list[tuple[int, ...]] = []

    def take_one(scratch: object) -> object:
        program = tuple(interpreter.interpreter_builder.grid_idx)
        if last_taker == [program]:
            return 2**30
        last_taker[:] = [program]
        takers.append(program)
        return take(scratch)

    decide, decisions = decode_match.decide, []
    monkeypatch.setattr(decode_match, "take", take_one)
    monkeypatch.setattr(
        decode_match, "decide", lambda *given: (decisions.append(1), decide(*given))
    )
    case = Case(max(2, n_rows), d_in=60, d_out=200, size=16, fingerprints=1400, dtype=BRAIN)
    problem = make(case)
    problem = problem._replace(keys=problem.keys[:n_rows].contiguous())
    n_tickets = decode.tickets(problem.gate, decode.token_tile(n_rows), 4).number
    assert n_tickets > 4
    check(problem, "linear")
    assert len(takers) > n_tickets
    assert len(set(takers)) == len(takers)
    assert len(decisions) == 1


@pytest.mark.parametrize(
    ("count", "tickets"), [(0, 1), (1, 1), (1024, 1), (1025, 17), (10_000, 157), (100_000, 261)]
)
def test_tickets_by_fingerprints(count: int, tickets: int) -> None:
    """On 132 multiprocessors; of one block of 64 each, until there would be too many."""
    gate = make(Case(fingerprints=1, size=64, d_in=64, dtype=BRAIN)).gate
    assert gate.fingerprints is not None
    gate = gate._replace(fingerprints=gate.fingerprints.expand(count, 64))
    assert decode.tickets(gate, 16, 132) == (64, 64, tickets)


def test_however_many_fingerprints_decoding_takes_them() -> None:
    problem = make(Case(64, fingerprints=1, size=16, dtype=BRAIN))
    assert problem.gate.fingerprints is not None
    many = problem.gate._replace(fingerprints=problem.gate.fingerprints.expand(10**6, 16))
    assert decode.takes(problem.keys, problem.delta, many)
    longer = torch.cat([problem.keys, problem.keys[:1]])
    assert not decode.takes(longer, problem.delta, many)


@pytest.mark.parametrize("d_out", [576, 1600, 4096, 8192, 151_936])
@pytest.mark.parametrize("tile", decode.TOKEN_TILES)
@pytest.mark.parametrize("by_column", [False, True])
def test_a_product_in_slices_has_a_counter_for_each_tile(
    d_out: int, tile: int, by_column: bool
) -> None:
    for dtype in (SINGLE, BRAIN):
        for processors in (4, 132, 304):
            config = decode.default_config(14336, d_out, tile, dtype, by_column, processors)
            n_tiles = -(-d_out // config["BN"])
            assert config["SLICES"] == 1 or n_tiles <= decode.TILE_COUNTERS
            assert config["SLICES"] * n_tiles <= max(n_tiles, 2 * processors)
