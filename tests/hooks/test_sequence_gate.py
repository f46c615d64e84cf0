"""The sequence gate against the paper's formula in float64; padding, single tokens, a cache."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import linear

from coachhook.hooks.gates import SequenceGate, SequenceMask, Threshold, sequence
from coachhook_kernels import Delta

FEW = settings(max_examples=25)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Norms of a few sequences, and how much wider than the longest the rectangle is."""
    norms = st.floats(0, 100, width=32)
    rows = draw(st.lists(st.lists(norms, min_size=1, max_size=12), min_size=1, max_size=4))
    return rows, draw(st.integers(0, 5))


def read_sequences(
    rows: list[list[float]], width: int, *, left: bool, alpha: float, filler: float
) -> list[tuple[Tensor, Tensor]]:
    """z-scores and decisions of the real tokens of each row, padded to `width`."""
    norms = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    places = [slice(width - len(r), width) if left else slice(0, len(r)) for r in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        norms[i, place], mask[i, place] = torch.tensor(row), 1
    context = SequenceMask()
    context(nn.Identity(), (), {"attention_mask": mask})
    gate = SequenceGate(Threshold(alpha=alpha), context)
    reading = gate(norms[..., None], norms[..., None])
    return [(reading.z[i, p], reading.is_open[i, p]) for i, p in enumerate(places)]


def has_z(norms: Any) -> bool:
    """Whether their deviations are more than rounding, and their squares more than subnormal."""
    single = np.finfo(np.float32)
    spread = np.ptp(norms)
    return bool(spread >= 1e-3 * norms.max() and spread**2 >= single.tiny)


def z_error(norms: Any) -> Any:
    """How far z-scores may be from exact: of `n` norms, the mean is within `n ε` of the largest.

    That moves every deviation alike and hardly their squares, whose sum is within `n ε` of itself,
    and within as much again for what the smaller of them lose as subnormal numbers; the root halves
    both. The steps around it round as well.
    """
    n, epsilon = len(norms), np.finfo(np.float32).eps
    deviation = norms.std(ddof=1)
    z = np.abs(norms - norms.mean()) / deviation
    return epsilon * (n * norms.max() / deviation + (n + 4) * z)


class TestSequenceGate:
    @FEW
    @given(case=sequences(), left=st.booleans())
    def test_equals_the_papers_formula(
        self, case: tuple[list[list[float]], int], left: bool
    ) -> None:
        rows, slack = case
        width = max(map(len, rows)) + slack
        for row, (z, _) in zip(
            rows, read_sequences(rows, width, left=left, alpha=1.0, filler=7.0), strict=True
        ):
            exact = np.array(row, dtype=np.float64)
            if len(row) < 2 or not has_z(exact):
                continue
            want = (exact - exact.mean()) / exact.std(ddof=1)
            assert (np.abs(z.numpy() - want) <= z_error(exact)).all()

    @FEW
    @given(case=sequences(), left=st.booleans())
    def test_padding_changes_nothing(self, case: tuple[list[list[float]], int], left: bool) -> None:
        rows, slack = case
        width = max(map(len, rows)) + slack
        plain = read_sequences(rows, width, left=left, alpha=0.5, filler=0.0)
        for filler in (1e6, math.inf, math.nan):
            other = read_sequences(rows, width, left=left, alpha=0.5, filler=filler)
            for (z, is_open), (z_other, open_other) in zip(plain, other, strict=True):
                assert torch.equal(z.nan_to_num(), z_other.nan_to_num())
                assert torch.equal(is_open, open_other)

    @FEW
    @given(row=st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=40))
    def test_z_is_at_most_n_minus_1_over_root_n(self, row: list[float]) -> None:
        n = len(row)
        [(z, _)] = read_sequences([row], n, left=False, alpha=0.0, filler=0.0)
        exact = np.array(row, dtype=np.float64)
        if has_z(exact):
            assert z.max().item() <= (n - 1) / math.sqrt(n) + z_error(exact).max()

    @pytest.mark.parametrize("norm", [0.0, 1.0, 1e6])
    @pytest.mark.parametrize("alpha", [-math.inf, -1.0, 0.0, 2.2])
    def test_a_single_token_never_fires(self, alpha: float, norm: float) -> None:
        [(_, is_open)] = read_sequences([[norm]], 3, left=True, alpha=alpha, filler=0.0)
        assert not is_open.any()

    @pytest.mark.parametrize("shape", [(1, 1), (3, 1)])
    def test_sequences_of_a_single_token_do_not_read_the_delta(
        self, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sequence, "hook_linear_sequence", None)
        keys, weight, bias = torch.randn(*shape, 5), torch.randn(4, 5), torch.randn(4)
        context = SequenceMask()
        context(nn.Identity(), (), {"inputs_embeds": keys})
        gate = SequenceGate(Threshold(alpha=-math.inf), context)
        output = gate.fused(keys, weight, bias, Delta(torch.full((4, 5), torch.nan)))
        assert torch.equal(output, linear(keys, weight, bias))

    def test_keeps_rows_apart_where_the_batch_is_flattened(self) -> None:
        norms = torch.tensor([[9.0, 1.0, 2.0, 1.0], [100.0, 400.0, 100.0, 100.0]])
        context = SequenceMask()
        context(nn.Identity(), (), {"attention_mask": torch.ones(2, 4)})
        gate = SequenceGate(Threshold(alpha=1.0), context)
        square, flat = norms[..., None], norms.reshape(-1, 1)
        assert torch.equal(gate(flat, flat).z.reshape(2, 4), gate(square, square).z)

    def test_cached_pass_uses_the_last_columns_of_its_mask(self) -> None:
        norms = torch.tensor([[1.0, 5.0, 2.0], [4.0, 1.0, 1.0]])
        context = SequenceMask()
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
        context(nn.Identity(), (), {"attention_mask": mask})
        gate = SequenceGate(Threshold(alpha=1.0), context)
        reading = gate(norms[..., None], norms[..., None])
        want = (norms - norms.mean(1, keepdim=True)) / norms.std(1, keepdim=True)
        torch.testing.assert_close(reading.z, want)
