"""What holds of the gate for any layer, key and threshold: on the plain path and in the kernels."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from tests.support.kernels import (
    BRAIN,
    DEVICE,
    HALF,
    SINGLE,
    Case,
    Problem,
    Result,
    bits,
    kernels_only,
    make,
    random,
    run_correction,
    run_linear,
    run_tiles,
    score_rounding,
)

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)

DOUBLE = torch.float64
MOST = 16
"""Rows of a problem with all that is put beside them: one tile of tokens in every kernel."""

ENTRIES: dict[str, Callable[[Problem, Tensor], Result]] = {
    "linear": lambda problem, _: run_linear(problem),
    "correction": run_correction,
    "tiles": run_tiles,
}
PLAIN = ("plain", "linear"), ("plain", "correction")
KERNELS = tuple(("kernels", entry) for entry in ENTRIES)


def cases(*dtypes: torch.dtype) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        rows=st.integers(2, 9),
        d_in=st.sampled_from([1, 5, 37, 70]),
        d_out=st.sampled_from([6, 23, 40]),
        dtype=st.sampled_from(dtypes),
        keyed=st.booleans(),
        rank=st.sampled_from([None, 1, 6]),
        size=st.sampled_from([3, 16]),
        fingerprints=st.sampled_from([0, 1, 4, 40]),
        disabled=st.sampled_from(["none", "some", "all"]),
        opened=st.just("all"),
        bias=st.booleans(),
        layout=st.sampled_from(["linear", "conv1d", "strided"]),
    )


def halfway(problem: Problem, seed: int) -> Problem:
    """With a threshold in one of the gaps between the scores, which no rounding bridges."""
    z = problem.z().sort().values
    gaps = (z.diff() > 1e-2).nonzero().flatten()
    assume(len(gaps))
    i = gaps[seed % len(gaps)]
    return problem.with_alpha(((z[i] + z[i + 1]) / 2).item())


def examples(paths: tuple[tuple[str, str], ...]) -> Callable[[Any], Any]:
    """Of the plain path many examples in the dtypes in which no rounding moves a gate; of the
    kernels, which an interpreter runs, few."""
    plain = paths is PLAIN
    dtypes = (SINGLE, DOUBLE) if plain else (SINGLE, HALF, BRAIN)

    def decorate(test: Any) -> Any:
        test = given(case=cases(*dtypes), seed=st.integers(0, 10_000))(test)
        test = settings(
            max_examples=40 if plain else 5,
            # Each step towards a smaller example takes an interpreter seconds.
            phases=set(Phase) if plain else {Phase.generate},
            derandomize=True,
            suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
        )(test)
        return pytest.mark.parametrize(("path", "entry"), paths)(test)

    return decorate


def output_for(problem: Problem) -> Tensor:
    """What some engine may have made of the keys: of each key by itself, whatever is beside it."""
    return problem.keys[:, :1].nan_to_num(1, 2, 3).clamp(-3, 3) + problem.weight[:, 0]


def run(problem: Problem, path: str, entry: str) -> Result:
    with kernels_only() if path == "kernels" else nullcontext():
        return ENTRIES[entry](problem, output_for(problem))


class Rounding(NamedTuple):
    """What lies at most between two evaluations of a problem that sum in different orders."""

    output: Tensor
    score: Tensor
    cosines: Tensor | None

    @classmethod
    def of(cls, problem: Problem, entry: str) -> "Rounding":
        """Every product of `n` terms, summed in any order, is within `n ε/2` of the sum of their
        magnitudes of what is exact, so that two of them are within `n ε` of each other; a value
        that is stored in the dtype may fall on the next one."""
        keys, weight, bias, (down, up), gate = problem.double()
        epsilon = torch.finfo(problem.keys.dtype).eps
        # Products of half precision are summed in float32, and every score ends in it.
        single = torch.finfo(SINGLE).eps
        summed = min(epsilon, single)
        size, d_in = keys.abs(), keys.shape[-1]

        terms, n_terms = size @ down.abs().mT, d_in
        if up is not None:
            terms, n_terms = terms @ up.abs().mT, d_in + up.shape[1]
        if entry == "linear":
            terms = terms + size @ weight.abs().mT + (0 if bias is None else bias.abs())
        else:
            terms = terms + output_for(problem).double().abs()
        # Besides the terms, the bias and the sum of both paths are added; `A k`, or each path, and
        # then their sum are stored.
        output = ((n_terms + 2) * summed + 2 * epsilon) * terms

        if gate.fingerprints is None:
            return cls(output, score_rounding(problem), None)
        assert gate.enabled is not None
        assert gate.offset is not None
        assert gate.projection is not None
        vector = keys @ gate.projection.mT - gate.offset
        cosines = normalize(vector, dim=-1) @ gate.fingerprints.mT
        cosines = cosines.masked_fill(~gate.enabled, -torch.inf)
        return cls(output, score_rounding(problem), cosines)

    def rows(self, which: slice) -> "Rounding":
        cosines = None if self.cosines is None else self.cosines[which]
        return Rounding(self.output[which], self.score[which], cosines)

    def admits(self, got: Result, want: Result) -> bool:
        near = [
            ((mine.double() - other.double()).abs() <= bound).all()
            for mine, other, bound in zip(got[:2], want[:2], (self.output, self.score), strict=True)
        ]
        return all(near) and self.as_near(got[2], want[2])

    def as_near(self, got: Tensor, want: Tensor) -> bool:
        """Whether the fingerprints are the same, or as like the key, up to rounding."""
        if self.cosines is None or not self.cosines.shape[-1]:
            return torch.equal(got, want)
        mine, other = (
            self.cosines.gather(-1, index[:, None].clamp_min(0))[:, 0] for index in (got, want)
        )
        tied = ((got < 0) == (want < 0)) & ((mine - other).abs() <= self.score)
        return bool(((got == want) | tied).all())


def sums_differ(problem: Problem, path: str, entry: str) -> bool:
    """Whether the number of rows may decide in which order one of them is summed.

    A BLAS sums a row in an order that depends on how many there are and on where it lies among
    them, and the interpreter multiplies a kernel's tiles by one; the dual path of a dense Δ has
    tiles for different numbers of rows.
    """
    dual_path = entry == "linear" and not problem.gate.keyed and problem.delta.up is None
    return path == "plain" or DEVICE == "cpu" or dual_path


def assert_same(got: Result, want: Result, rounding: Rounding | None) -> None:
    """Bit for bit without `rounding`: the place of a token in a kernel's tile changes none of its
    sums on a GPU."""
    if rounding is not None:
        assert rounding.admits(got, want)
        return
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


def is_monotone(case: Case, seed: int, path: str, entry: str) -> None:
    problem = make(case, seed)
    z = problem.z().sort().values.tolist()
    base = output_for(problem)
    was_open, scores = torch.ones(case.rows, dtype=torch.bool, device=DEVICE), set()
    for alpha in (z[0] - 1, z[0], sum(z) / len(z), z[-1], z[-1] + 1):
        given = problem.with_alpha(alpha)
        output, score, index = run(given, path, entry)
        is_open = given.gate.is_open(score)
        # `linear` makes a base of its own.
        if entry != "linear":
            assert torch.equal((bits(output) != bits(base)).any(-1), is_open)
        assert not (is_open & ~was_open).any()
        was_open = is_open
        scores.add((tuple(score.tolist()), tuple(index.tolist())))
    assert not was_open.any()
    assert len(scores) == 1, "a score does not depend on the threshold"


def is_indifferent(case: Case, seed: int, path: str, entry: str) -> None:
    """To padding, to the order of the batch and to who else is in it."""
    problem = halfway(make(case, seed), seed)
    keys, n_rows = problem.keys, case.rows
    rounding = Rounding.of(problem, entry) if sums_differ(problem, path, entry) else None
    expected = run(problem, path, entry)

    def compare(others: Tensor, place: Tensor) -> None:
        result = run(problem._replace(keys=others), path, entry)
        got = tuple(tensor[place] for tensor in result)
        assert_same((got[0], got[1], got[2]), expected, rounding)

    n_more = MOST - n_rows
    padding = random(n_more, keys.shape[-1], seed=seed, dtype=keys.dtype)
    padding[::3] = 0
    padding[1::3] = torch.tensor([torch.nan, torch.inf, -torch.inf])[seed % 3]
    rows = torch.arange(n_rows, device=DEVICE)
    compare(torch.cat([keys, padding]), rows)
    compare(torch.cat([padding, keys]), rows + n_more)

    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    compare(keys[order], order.argsort())

    alone = seed % n_rows
    mates = -2 * keys.roll(1, 0)
    mates[alone] = keys[alone]
    result = run(problem._replace(keys=mates), path, entry)
    place = slice(alone, alone + 1)
    ours = [tensor[place] for tensor in (*result, *expected)]
    rounding = None if rounding is None else rounding.rows(place)
    assert_same((ours[0], ours[1], ours[2]), (ours[3], ours[4], ours[5]), rounding)


@examples(PLAIN)
def test_fewer_open_as_alpha_grows(case: Case, seed: int, path: str, entry: str) -> None:
    is_monotone(case, seed, path, entry)


@examples(PLAIN)
def test_the_rest_of_the_batch_changes_nothing(
    case: Case, seed: int, path: str, entry: str
) -> None:
    is_indifferent(case, seed, path, entry)


@examples(KERNELS)
def test_fewer_open_as_alpha_grows_in_kernels(case: Case, seed: int, path: str, entry: str) -> None:
    pytest.importorskip("triton")
    is_monotone(case, seed, path, entry)


@examples(KERNELS)
def test_the_rest_of_the_batch_changes_nothing_in_kernels(
    case: Case, seed: int, path: str, entry: str
) -> None:
    pytest.importorskip("triton")
    is_indifferent(case, seed, path, entry)
