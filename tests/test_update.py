"""The recursive update against its closed form in float64."""

import pytest
import torch
from torch import Tensor

from coachhook.errors import StatisticsError
from coachhook.update import RecursiveInverse, whitening_sketch

D_IN, D_OUT = 48, 20
PRESERVATION = 3.0


def moment(d: int = D_IN, n: int = 500, seed: int = 0) -> Tensor:
    """Second moment of correlated keys with a mean, as those of an FFN have."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=generator, dtype=torch.float64) / d**0.5
    keys = torch.randn(n, d, generator=generator, dtype=torch.float64) @ mix + 0.5
    return keys.T @ keys / n


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


class TestRecursiveInverse:
    def test_starts_from_lambda_times_the_moment(self) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        weighted = PRESERVATION * moment()
        # A ridge of 10⁻⁵ of the mean diagonal is all that may be added.
        started = solver.factor @ solver.factor.T
        assert relative_error(started, weighted) <= 1e-5
        assert relative_error(solver.inverse @ started, torch.eye(D_IN)) <= 1e-9

    @pytest.mark.parametrize("n", [1, 5, 60], ids=lambda n: f"{n}-keys")
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_twenty_batches_equal_the_closed_form(self, dtype: torch.dtype, n: int) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        accumulated = solver.factor @ solver.factor.T
        for number in range(20):
            keys = random(n, D_IN, seed=10 + number, dtype=dtype)
            residuals = random(n, D_OUT, seed=100 + number)
            accumulated = accumulated + keys.double().T @ keys.double()
            want = torch.linalg.solve(accumulated, keys.double().T @ residuals).T
            assert relative_error(residuals.T @ solver.solve(keys, fit=1.0), want) <= 1e-9
            solver.absorb(keys)
            assert torch.equal(solver.inverse, solver.inverse.T)
            assert relative_error(solver.inverse, torch.linalg.inv(accumulated)) <= 1e-9
            assert solver.inverse.shape == (D_IN, D_IN)

    def test_solving_changes_nothing(self) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        before = solver.inverse.clone()
        keys = random(4, D_IN, seed=1)
        kept = keys.clone()
        solver.solve(keys, fit=20.0)
        assert torch.equal(solver.inverse, before)
        assert torch.equal(keys, kept)

    def test_order_of_batches_does_not_matter(self) -> None:
        batches = [random(n, D_IN, seed=n) for n in (1, 7, 3)]
        forward, backward = (RecursiveInverse(moment(), PRESERVATION) for _ in range(2))
        for first, last in zip(batches, reversed(batches), strict=True):
            forward.absorb(first)
            backward.absorb(last)
        assert relative_error(forward.inverse, backward.inverse) <= 1e-10

    def test_absorbing_no_keys_changes_nothing(self) -> None:
        solver = RecursiveInverse(moment(), PRESERVATION)
        before = solver.inverse.clone()
        solver.absorb(torch.zeros(0, D_IN))
        assert relative_error(solver.inverse, before) <= 1e-15

    @pytest.mark.parametrize("fit", [1.0, 20.0, 1e9])
    def test_fit_leaves_the_share_of_the_residual_it_should(self, fit: float) -> None:
        """With `p = kᵀ Q k` the share left at a key alone in its batch is `1 / (1 + fit · p)`."""
        solver = RecursiveInverse(moment(), PRESERVATION)
        key = random(1, D_IN, seed=3)
        for _ in range(3):
            solver.absorb(key)
        p = (key @ solver.inverse @ key.T).item()
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

    def test_the_moment_given_is_left_alone(self) -> None:
        given = moment()
        RecursiveInverse(given, 1.0)
        assert torch.equal(given, moment())


class TestWhiteningSketch:
    def test_is_a_projection_of_the_whitened_key(self) -> None:
        """`‖F k‖²` is on average `kᵀ (λ C₀)⁻¹ k`, and the rows of `F L` are `S`, of unit scale."""
        factor = RecursiveInverse(moment(), PRESERVATION).factor
        sketch = whitening_sketch(factor, 20_000, seed=0)
        assert sketch.dtype == torch.float32
        inverse = torch.cholesky_inverse(factor)
        keys = random(5, D_IN, seed=9)
        got = (keys @ sketch.double().T).square().sum(-1)
        want = ((keys @ inverse) * keys).sum(-1)
        # Relative standard error of a mean of 20,000 squares: √(2/20000) = 1 %; six of them.
        torch.testing.assert_close(got, want, rtol=0.06, atol=0)

    def test_depends_on_the_seed_alone(self) -> None:
        factor = RecursiveInverse(moment(), PRESERVATION).factor
        assert torch.equal(whitening_sketch(factor, 8, 1), whitening_sketch(factor, 8, 1))
        assert not torch.equal(whitening_sketch(factor, 8, 1), whitening_sketch(factor, 8, 2))
