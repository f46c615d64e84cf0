"""The reference operations against float64 numpy formulas, on odd shapes."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coachhook_kernels import (
    Delta,
    difference_norm,
    fingerprint_similarity,
    hook_correction,
    key_covariance_,
    sequence_zscore,
)

LEADING = [(), (1,), (13,), (3, 7), (2, 1, 5), (0,), (2, 0)]
shapes = pytest.mark.parametrize(
    "leading", LEADING, ids=lambda shape: "x".join(map(str, shape)) or "vector"
)
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(tensor: Tensor) -> Any:
    return tensor.detach().double().numpy()


def epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


class TestDelta:
    @dtypes
    @shapes
    @pytest.mark.parametrize("rank", [1, 5, 17])
    def test_factors_give_u_a_k(
        self, rank: int, leading: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        keys = random(*leading, 23, seed=1, dtype=dtype)
        down, up = random(rank, 23, seed=2, dtype=dtype), random(17, rank, seed=3, dtype=dtype)
        delta = Delta(down, up)
        projected = delta.project(keys)
        got = delta.expand(projected)
        assert projected.shape == (*leading, rank)
        assert got.shape == (*leading, 17)
        # |error| of a product of d terms is at most d ε Σ|terms|, and the rounding of a result ε/2.
        terms = np.abs(exact(keys)) @ np.abs(exact(down)).T
        bound = (23 * epsilon(torch.float32) + epsilon(dtype)) * terms
        assert (np.abs(exact(projected) - exact(keys) @ exact(down).T) <= bound).all()
        bound = (40 * epsilon(torch.float32) + 2 * epsilon(dtype)) * (terms @ np.abs(exact(up)).T)
        assert (np.abs(exact(got) - exact(keys) @ exact(down).T @ exact(up).T) <= bound).all()

    def test_keys_of_another_dtype_are_converted(self) -> None:
        delta = Delta(random(3, 5))
        assert delta.project(random(2, 5, dtype=torch.bfloat16)).dtype == torch.float32
        up = random(17, 3, dtype=torch.bfloat16)
        assert Delta(random(3, 5), up).expand(random(2, 3)).dtype == torch.float32

    def test_dense_projects_to_the_difference_itself(self) -> None:
        delta, keys = Delta(random(17, 23)), random(4, 23, seed=1)
        projected = delta.project(keys)
        assert delta.expand(projected) is projected
        np.testing.assert_allclose(
            exact(projected), exact(keys) @ exact(delta.down).T, rtol=1e-5, atol=1e-5
        )


class TestHookCorrection:
    @dtypes
    @shapes
    def test_adds_where_open_and_copies_elsewhere(
        self, leading: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        output, delta = random(*leading, 17, dtype=dtype), random(*leading, 17, seed=1)
        is_open = random(*leading, seed=2) > 0
        got = hook_correction(output, delta, is_open)
        assert got.dtype == dtype
        assert got.shape == output.shape
        assert torch.equal(got[~is_open], output[~is_open])
        want = exact(output[is_open]) + exact(delta[is_open])
        size = np.abs(exact(output[is_open])) + np.abs(exact(delta[is_open]))
        assert (np.abs(exact(got[is_open]) - want) <= epsilon(dtype) * size).all()

    def test_a_closed_token_is_safe_from_what_is_not_finite(self) -> None:
        output = random(3, 5).requires_grad_()
        delta = torch.full((3, 5), torch.nan)
        delta[1] = 1.0
        got = hook_correction(output, delta, torch.tensor([False, True, False]))
        assert torch.isfinite(got).all()
        got.sum().backward()
        assert torch.equal(output.grad, torch.ones(3, 5))


class TestDifferenceNorm:
    @dtypes
    @shapes
    def test_is_the_euclidean_norm_in_float32(
        self, leading: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        projected = random(*leading, 23, dtype=dtype)
        got = difference_norm(projected)
        assert got.shape == leading
        assert got.dtype == torch.float32
        np.testing.assert_allclose(exact(got), np.linalg.norm(exact(projected), axis=-1), rtol=1e-6)

    def test_squares_beyond_half_precision_do_not_overflow(self) -> None:
        projected = torch.full((2, 9), 6e4, dtype=torch.float16)
        np.testing.assert_allclose(exact(difference_norm(projected)), 3 * 6e4, rtol=1e-3)

    def test_of_factors_equals_that_of_the_difference(self) -> None:
        up, _ = torch.linalg.qr(random(17, 5))
        delta, keys = Delta(random(5, 23, seed=1), up), random(9, 23, seed=2)
        projected = delta.project(keys)
        torch.testing.assert_close(
            difference_norm(projected), difference_norm(delta.expand(projected))
        )


class TestFingerprintSimilarity:
    size, width = 11, 23

    def inputs(self, leading: tuple[int, ...], count: int) -> tuple[Tensor, ...]:
        rows = random(count, self.size, seed=3)
        return (
            random(*leading, self.width, seed=0),
            random(self.size, self.width, seed=1),
            random(self.size, seed=2),
            torch.nn.functional.normalize(rows, dim=-1),
        )

    @shapes
    @pytest.mark.parametrize("count", [1, 2, 37])
    def test_is_the_largest_cosine_and_its_index(
        self, count: int, leading: tuple[int, ...]
    ) -> None:
        keys, projection, offset, fingerprints = self.inputs(leading, count)
        enabled = torch.ones(count, dtype=torch.bool)
        enabled[1::3] = False
        best, index = fingerprint_similarity(keys, projection, offset, fingerprints, enabled)
        assert best.dtype == torch.float32
        assert index.dtype == torch.int64
        assert best.shape == index.shape == leading
        sketch = exact(keys) @ exact(projection).T - exact(offset)
        sketch /= np.linalg.norm(sketch, axis=-1, keepdims=True)
        cosines = sketch @ exact(fingerprints).T
        cosines[..., ~enabled.numpy()] = -np.inf
        np.testing.assert_allclose(exact(best), cosines.max(-1), rtol=0, atol=1e-6)
        assert (index.numpy() == cosines.argmax(-1)).all()

    @shapes
    @pytest.mark.parametrize("count", [0, 3])
    def test_without_an_enabled_fingerprint(self, count: int, leading: tuple[int, ...]) -> None:
        inputs = self.inputs(leading, count)
        best, index = fingerprint_similarity(*inputs, torch.zeros(count, dtype=torch.bool))
        assert best.dtype == torch.float32
        assert index.dtype == torch.int64
        assert best.shape == index.shape == leading
        assert (best == -1).all()
        assert (index == -1).all()

    def test_a_disabled_fingerprint_is_as_if_absent(self) -> None:
        keys, projection, offset, fingerprints = self.inputs((5, 3), 9)
        enabled = torch.arange(9) % 2 == 0
        best, index = fingerprint_similarity(keys, projection, offset, fingerprints, enabled)
        alone, position = fingerprint_similarity(
            keys, projection, offset, fingerprints[enabled], torch.ones(5, dtype=torch.bool)
        )
        torch.testing.assert_close(best, alone)
        assert torch.equal(index, enabled.nonzero().squeeze(-1)[position])

    def test_a_key_at_the_offset_resembles_nothing(self) -> None:
        _, projection, _, fingerprints = self.inputs((), 3)
        enabled = torch.ones(3, dtype=torch.bool)
        keys = torch.zeros(4, self.width)
        best, _ = fingerprint_similarity(
            keys, projection, torch.zeros(self.size), fingerprints, enabled
        )
        assert torch.equal(best, torch.zeros(4))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_loses_no_more_than_its_rounding(self, dtype: torch.dtype) -> None:
        inputs = [tensor.to(dtype) for tensor in self.inputs((29,), 7)]
        best, _ = fingerprint_similarity(*inputs, torch.ones(7, dtype=torch.bool))
        assert best.dtype == torch.float32
        keys, projection, offset, fingerprints = map(exact, inputs)
        product = keys @ projection.T
        sketch = product - offset
        norm = np.linalg.norm(sketch, axis=-1, keepdims=True)
        want = (sketch / norm @ fingerprints.T).max(-1)
        # The product is rounded once; a unit vector turns by that error over its length.
        bound = epsilon(dtype) * np.linalg.norm(product, axis=-1) / norm[:, 0] + 1e-5
        assert (np.abs(exact(best) - want) <= bound).all()


class TestSequenceZscore:
    @pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 33)], ids=lambda s: f"{s[0]}x{s[1]}")
    def test_is_the_z_score_of_the_real_tokens(self, shape: tuple[int, int]) -> None:
        norms = random(*shape).abs()
        mask = random(*shape, seed=1) > -0.5
        mask[:, :2] = True
        got = sequence_zscore(norms, mask)
        assert got.dtype == torch.float32
        for row, real, z in zip(exact(norms), mask.numpy(), got.numpy(), strict=True):
            want = (row[real] - row[real].mean()) / row[real].std(ddof=1)
            np.testing.assert_allclose(z[real], want, rtol=1e-4, atol=1e-5)
            assert np.isnan(z[~real]).all()

    @pytest.mark.parametrize("real", [0, 1])
    def test_is_nan_where_there_is_no_deviation(self, real: int) -> None:
        mask = torch.arange(4)[None] < real
        assert sequence_zscore(torch.rand(1, 4), mask).isnan().all()

    def test_equal_norms_never_clear_a_threshold(self) -> None:
        z = sequence_zscore(torch.full((1, 7), 0.3), torch.ones(1, 7, dtype=torch.bool))
        assert not (z >= 1.0).any()


class TestKeyCovariance:
    @pytest.mark.parametrize("accumulator", [torch.float32, torch.float64], ids=str)
    @dtypes
    @pytest.mark.parametrize("n", [0, 1, 37])
    def test_equals_kt_diag_mask_k(
        self, n: int, dtype: torch.dtype, accumulator: torch.dtype
    ) -> None:
        keys = random(n, 23, dtype=dtype)
        mask = random(n, seed=1) > 0
        moment = torch.zeros(23, 23, dtype=accumulator)
        assert key_covariance_(moment, keys, mask) is moment
        kept = exact(keys)[mask.numpy()]
        bound = (n + 1) * epsilon(accumulator) * (np.abs(kept).T @ np.abs(kept))
        assert (np.abs(exact(moment) - kept.T @ kept) <= bound).all()

    def test_accumulates(self) -> None:
        keys = random(41, 23)
        whole, parts = (torch.zeros(23, 23, dtype=torch.float64) for _ in range(2))
        key_covariance_(whole, keys)
        for part in keys.split(7):
            key_covariance_(parts, part)
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)

    def test_a_masked_key_does_not_count_whatever_it_holds(self) -> None:
        keys = random(5, 23)
        moment = key_covariance_(torch.zeros(23, 23), keys[:4])
        keys[4] = torch.nan
        masked = key_covariance_(torch.zeros(23, 23), keys, torch.arange(5) < 4)
        torch.testing.assert_close(masked, moment)
