"""Δ as a running sum, against the float64 sum of all its batches."""

import pytest
import torch
from torch import Tensor

from coachhook.journal.delta import DROPPED, add, no_delta
from coachhook_kernels import Delta

D_IN, D_OUT = 48, 20


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(delta: Delta) -> Tensor:
    return delta.down.double() if delta.up is None else delta.up.double() @ delta.down.double()


def relative_error(delta: Delta, want: Tensor) -> float:
    return ((dense(delta) - want).norm() / want.norm()).item()


class TestOneBatch:
    @pytest.mark.parametrize("rank", [0, 1, 9, 13, 14, 15, 30, 90], ids=lambda r: f"rank-{r}")
    def test_equals_the_sum_of_outer_products(self, rank: int) -> None:
        residuals, solutions = random(rank, D_OUT, seed=rank), random(rank, D_IN, seed=rank + 1)
        delta = add(no_delta((D_IN, D_OUT)), residuals, solutions)
        want = residuals.double().T @ solutions.double()
        assert dense(delta).shape == (D_OUT, D_IN)
        torch.testing.assert_close(dense(delta), want, rtol=1e-5, atol=1e-4)
        # The smaller of the two forms: rank 14 is the last to be smaller than 20 x 48.
        assert (delta.up is None) == (rank > 14)
        assert delta.down.is_contiguous()
        assert delta.down.dtype == torch.float32

    def test_rows_that_were_not_written_take_no_room(self) -> None:
        residuals, solutions = random(9, D_OUT, seed=1), random(9, D_IN, seed=2)
        residuals[[0, 4, 8]] = 0
        delta = add(no_delta((D_IN, D_OUT)), residuals, solutions)
        assert delta.up is not None
        assert delta.down.shape == (6, D_IN)
        assert delta.up.shape == (D_OUT, 6)

    def test_dependent_rows_take_the_room_of_their_rank(self) -> None:
        residuals, solutions = random(4, D_OUT, seed=1).repeat(3, 1), random(12, D_IN, seed=2)
        delta = add(no_delta((D_IN, D_OUT)), residuals, solutions)
        assert delta.down.shape == (4, D_IN)
        assert relative_error(delta, residuals.double().T @ solutions.double()) <= 1e-6

    def test_what_was_given_is_left_alone(self) -> None:
        for rank in (5, 20):
            before = add(
                no_delta((D_IN, D_OUT)), random(rank, D_OUT, seed=1), random(rank, D_IN, seed=2)
            )
            kept = dense(before)
            add(before, random(3, D_OUT, seed=3), random(3, D_IN, seed=4))
            assert torch.equal(dense(before), kept)


class TestManyBatches:
    @pytest.mark.parametrize(
        ("shape", "n", "scale"),
        [
            pytest.param((48, 20), 3, 1.0, id="soon-dense"),
            pytest.param((400, 300), 1, 1.0, id="factors"),
            pytest.param((256, 128), 2, 1.0, id="dense-on-the-way"),
            pytest.param((400, 300), 1, 1.1, id="growing"),
            pytest.param((400, 300), 1, 0.9, id="fading"),
        ],
    )
    def test_150_batches_equal_the_float64_sum(
        self, shape: tuple[int, int], n: int, scale: float
    ) -> None:
        d_in, d_out = shape
        delta, want = no_delta(shape), torch.zeros(d_out, d_in, dtype=torch.float64)
        for number in range(150):
            residuals = scale**number * random(n, d_out, seed=2 * number)
            if number % 10 == 9:
                residuals[0] = 0
            solutions = random(n, d_in, seed=2 * number + 1)
            delta = add(delta, residuals, solutions)
            want += residuals.double().T @ solutions.double()
        assert relative_error(delta, want) <= 1e-6
        room = delta.down.numel() + (0 if delta.up is None else delta.up.numel())
        assert room <= d_in * d_out
        if delta.up is not None:
            eye = torch.eye(delta.up.shape[1], dtype=torch.float64)
            torch.testing.assert_close(
                delta.up.T.double() @ delta.up.double(), eye, rtol=0, atol=1e-6
            )
            # What the norm gates rely on.
            keys = random(6, d_in, seed=3)
            exact = (keys.double() @ want.T).norm(dim=-1)
            torch.testing.assert_close(
                delta.project(keys).norm(dim=-1).double(), exact, rtol=1e-5, atol=0
            )

    def test_edits_along_the_same_directions_stay_in_factors(self) -> None:
        """One fact corrected over and over costs what it costs once."""
        delta, want = no_delta((D_IN, D_OUT)), torch.zeros(D_OUT, D_IN, dtype=torch.float64)
        directions = random(5, D_OUT, seed=0)
        for number in range(120):
            residuals = random(3, 5, seed=2 * number + 1) @ directions
            solutions = random(3, D_IN, seed=2 * number + 2)
            delta = add(delta, residuals, solutions)
            want += residuals.double().T @ solutions.double()
        assert delta.up is not None
        # Five, and one for what float32 rounded off the first of them.
        assert delta.down.shape[0] <= 6
        assert relative_error(delta, want) <= 1e-6

    def test_a_batch_loses_no_more_than_is_stated(self) -> None:
        first = random(1, D_OUT, seed=1), random(1, D_IN, seed=2)
        start = add(no_delta((D_IN, D_OUT)), *first)
        for size, kept in ((DROPPED / 4, False), (8 * DROPPED, True)):
            residuals = random(1, D_OUT, seed=3)
            solutions = random(1, D_IN, seed=4)
            solutions *= size * dense(start).norm() / (residuals.norm() * solutions.norm())
            assert (len(add(start, residuals, solutions).down) == 2) == kept

    def test_in_place_gives_the_same_bits(self) -> None:
        deltas = [no_delta((D_IN, D_OUT)) for _ in range(2)]
        for number in range(30):
            share = random(2, D_OUT, seed=2 * number), random(2, D_IN, seed=2 * number + 1)
            deltas = [add(deltas[0], *share), add(deltas[1], *share, in_place=True)]
        assert deltas[0].up is None
        assert torch.equal(deltas[0].down, deltas[1].down)
