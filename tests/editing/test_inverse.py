"""The recursive update against its closed form in float64."""

import pytest
import torch
from torch import Tensor

from coachhook.editing import inverse as update
from coachhook.editing.inverse import Earlier, RecursiveInverse, whitening_sketch
from coachhook.errors import StatisticsError
from tests.support.closed_form import (
    D_IN,
    D_OUT,
    PRESERVATION,
    Harsh,
    closed_form,
    moment,
    random,
    relative_error,
    weighted,
)


class TestRecursiveInverse:
    @pytest.mark.parametrize("fit", [1.0, 20.0])
    @pytest.mark.parametrize("n", [1, 5, 60], ids=lambda n: f"{n}-keys")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_twenty_batches_equal_the_closed_form(
        self, dtype: torch.dtype, n: int, fit: float
    ) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        accumulated = weighted(moment())
        for number in range(20):
            keys = random(n, D_IN, seed=10 + number, dtype=dtype)
            want = closed_form(accumulated, keys, fit)
            assert relative_error(solver.solve(keys, fit), want) <= 1e-9
            solver.absorb(keys)
            accumulated = accumulated + keys.double().T @ keys.double()

    @pytest.mark.parametrize("preservation", [150.0, 1.0], ids=["weighty-text", "weighty-keys"])
    def test_two_hundred_harsh_batches_stay_within_a_millionth(
        self, preservation: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At λ = 1 the condition number of `C_accu` reaches 10⁹. The last block is a small one."""
        monkeypatch.setattr(update, "_BLOCK", 100)
        harsh = Harsh(320, preservation)
        solver = RecursiveInverse(harsh.moment, preservation, harsh.earlier)
        assert harsh.run(solver, batches=200, n=20) <= 1e-6
        # To make it anew for every batch would be accurate, and no recursion.
        assert harsh.times_made <= 5

    def test_solving_changes_nothing(self) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        keys, others = random(4, D_IN, seed=1), random(3, D_IN, seed=2)
        kept = keys.clone()
        before = solver.solve(others, fit=1.0)
        solver.solve(keys, fit=20.0)
        assert torch.equal(solver.solve(others, fit=1.0), before)
        assert torch.equal(keys, kept)

    @pytest.mark.parametrize("last", ["same", "other", "fewer", "none"])
    def test_what_was_solved_last_does_not_matter_to_what_is_absorbed(self, last: str) -> None:
        keys = random(6, D_IN, seed=1)
        solver = RecursiveInverse(moment(), PRESERVATION)
        solved = {"same": keys, "other": random(6, D_IN, seed=2), "fewer": keys[:5]}
        if last in solved:
            solver.solve(solved[last].clone(), fit=20.0)
        solver.absorb(keys)
        # A second time: the products with the inverse before are of no use any more.
        solver.absorb(keys)
        want = closed_form(weighted(moment()) + 2 * keys.T @ keys, random(4, D_IN, seed=3))
        assert relative_error(solver.solve(random(4, D_IN, seed=3), 1.0), want) <= 1e-10

    def test_keys_changed_after_solving_are_absorbed_as_they_are_now(self) -> None:
        keys, probe = random(6, D_IN, seed=1), random(4, D_IN, seed=3)
        solver = RecursiveInverse(moment(), PRESERVATION)
        solver.solve(keys, fit=1.0)
        keys.mul_(2)
        solver.absorb(keys)
        want = closed_form(weighted(moment()) + keys.T @ keys, probe)
        assert relative_error(solver.solve(probe, 1.0), want) <= 1e-10

    def test_order_of_batches_does_not_matter(self) -> None:
        batches = [random(n, D_IN, seed=n) for n in (1, 7, 3)]
        forward, backward = (RecursiveInverse(moment(), PRESERVATION) for _ in range(2))
        for first, last in zip(batches, reversed(batches), strict=True):
            forward.absorb(first)
            backward.absorb(last)
        probe = random(5, D_IN, seed=9)
        assert relative_error(forward.solve(probe, 1.0), backward.solve(probe, 1.0)) <= 1e-10

    def test_no_keys_are_no_trouble(self) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        probe = random(3, D_IN, seed=9)
        before = solver.solve(probe, 1.0)
        assert solver.solve(torch.zeros(0, D_IN), 1.0).shape == (0, D_IN)
        solver.absorb(torch.zeros(0, D_IN))
        assert relative_error(solver.solve(probe, 1.0), before) <= 1e-15

    def test_more_keys_than_are_absorbed_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(update, "_CHUNK", 100)
        keys, probe = random(250, D_IN, seed=1, dtype=torch.float32), random(3, D_IN, seed=2)
        solver = RecursiveInverse(moment(), PRESERVATION)
        assert relative_error(solver.solve(keys, 1.0), closed_form(weighted(moment()), keys)) < 1e-9
        solver.absorb(keys)
        want = closed_form(weighted(moment()) + keys.double().T @ keys.double(), probe)
        assert relative_error(solver.solve(probe, 1.0), want) <= 1e-9

    @pytest.mark.parametrize("fit", [1.0, 20.0, 1e9])
    def test_fit_leaves_the_share_of_the_residual_it_should(self, fit: float) -> None:
        """With `p = kᵀ Q k` the share left at a key alone in its batch is `1 / (1 + fit · p)`."""
        solver = RecursiveInverse(moment(), PRESERVATION)
        key = random(1, D_IN, seed=3)
        for _ in range(3):
            solver.absorb(key)
        accumulated = weighted(moment()) + 3 * key.T @ key
        p = (key @ torch.linalg.solve(accumulated, key.T)).item()
        reached = (solver.solve(key, fit) @ key.T).item()
        assert 1 - reached == pytest.approx(1 / (1 + fit * p), rel=1e-9, abs=1e-12)

    def test_large_fit_wins_in_full_at_keys_absorbed_before(self) -> None:
        """A correction of a correction of a correction."""
        solver = RecursiveInverse(moment(), PRESERVATION)
        keys = random(5, D_IN, seed=4)
        for _ in range(3):
            solver.absorb(keys)
        residuals = random(5, D_OUT, seed=5)
        delta = residuals.T @ solver.solve(keys, fit=1e9)
        assert relative_error(keys @ delta.T, residuals) <= 1e-6
        weak = residuals.T @ solver.solve(keys, fit=1.0)
        assert relative_error(keys @ weak.T, residuals) > 0.5

    def test_a_key_twice_in_one_batch_is_no_trouble(self) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        key = random(1, D_IN, seed=6)
        keys, residuals = key.repeat(2, 1), random(1, D_OUT, seed=7).repeat(2, 1)
        delta = residuals.T @ solver.solve(keys, fit=1e6)
        assert relative_error(key @ delta.T, residuals[:1]) <= 1e-5

    def test_starting_from_earlier_keys_equals_absorbing_them(self) -> None:
        batches = [random(n, D_IN, seed=n, dtype=torch.float32) for n in (3, 0, 9, 4)]
        early = torch.cat(batches[:2]).double()
        solver = RecursiveInverse(
            moment(), PRESERVATION, lambda: Earlier(iter(batches[2:]), early.T @ early)
        )
        keys, probe = torch.cat(batches).double(), random(5, D_IN, seed=20)
        want = closed_form(weighted(moment()) + keys.T @ keys, probe)
        assert relative_error(solver.solve(probe, 1.0), want) <= 1e-10

    @pytest.mark.parametrize(
        "broken",
        [torch.zeros(4, 4), -torch.eye(4), torch.full((4, 4), torch.nan), torch.ones(4, 4) - 2],
        ids=["zero", "negative", "nan", "indefinite"],
    )
    def test_a_useless_moment_is_refused(self, broken: Tensor) -> None:
        with pytest.raises(StatisticsError, match="more text"):
            RecursiveInverse(broken, PRESERVATION)

    def test_a_moment_of_few_tokens_is_good_enough(self) -> None:
        RecursiveInverse(moment(n=D_IN // 4), PRESERVATION).solve(random(2, D_IN, seed=8), fit=1.0)

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_keys_that_are_not_finite_are_refused_and_leave_no_trace(self, value: float) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        keys, probe = random(4, D_IN, seed=1), random(3, D_IN, seed=2)
        before = solver.solve(probe, 1.0)
        keys[1, 7] = value
        for step in (lambda: solver.solve(keys, 1.0), lambda: solver.absorb(keys)):
            with pytest.raises(StatisticsError, match=r"1 of 4 keys .* bfloat16 or float32"):
                step()
        assert torch.equal(solver.solve(probe, 1.0), before)

    def test_the_moment_given_is_left_alone(self) -> None:
        given = moment()
        RecursiveInverse(given, 1.0)
        assert torch.equal(given, moment())


class TestWhiteningSketch:
    def test_is_a_projection_of_the_whitened_key(self) -> None:
        """`‖F k‖²` is on average `kᵀ (λ C₀)⁻¹ k`, and the rows of `F L` are `S`, of unit scale."""
        sketch = whitening_sketch(moment(), PRESERVATION, 20_000, seed=0)
        assert sketch.dtype == torch.float32
        keys = random(5, D_IN, seed=9)
        got = (keys @ sketch.double().T).square().sum(-1)
        want = (torch.linalg.solve(weighted(moment()), keys.T).T * keys).sum(-1)
        # Relative standard error of a mean of 20,000 squares: √(2/20000) = 1 %; six of them.
        torch.testing.assert_close(got, want, rtol=0.06, atol=0)

    def test_depends_on_the_seed_alone(self) -> None:
        first, again, other = (
            whitening_sketch(moment(), PRESERVATION, 8, seed) for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_a_useless_moment_is_refused(self) -> None:
        with pytest.raises(StatisticsError, match="more text"):
            whitening_sketch(-torch.eye(4), PRESERVATION, 8, seed=0)
