"""Layers for the dual path, and its results held against float64."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels import Delta, hook_correction
from coachhook_kernels.hook_linear_sequence import reference
from tests.support.kernels import DEVICE


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def laid_out(matrix: Tensor, layout: str) -> Tensor:
    """The same matrix, as `nn.Linear` or as a transposed view of a `Conv1D` holds it."""
    return matrix if layout == "linear" else matrix.T.contiguous().T


class Layer:
    """A layer with its Δ: rank None for a dense one."""

    def __init__(
        self,
        d_in: int,
        d_out: int,
        dtype: torch.dtype,
        rank: int | None = None,
        layout: str = "linear",
        bias: bool = True,
    ) -> None:
        self.weight = laid_out(random(d_out, d_in, seed=1, dtype=dtype), layout)
        self.bias = random(d_out, seed=2, dtype=dtype) if bias else None
        if rank is None:
            self.delta = Delta(laid_out(random(d_out, d_in, seed=3, dtype=dtype), layout))
        else:
            up, _ = torch.linalg.qr(random(d_out, rank, seed=4, dtype=torch.float64))
            self.delta = Delta(random(rank, d_in, seed=3, dtype=dtype), up.to(dtype))

    def double(self) -> "Layer":
        other = object.__new__(Layer)
        other.weight = self.weight.double()
        other.bias = None if self.bias is None else self.bias.double()
        down, up = self.delta
        other.delta = Delta(down.double(), None if up is None else up.double())
        return other

    def forward(self, keys: Tensor, is_open: Tensor) -> Tensor:
        corrected = self.delta.expand(self.delta.project(keys))
        return hook_correction(linear(keys, self.weight, self.bias), corrected, is_open)

    def largest(self, keys: Tensor) -> float:
        """The greatest output of the base path plus the greatest of `Δ k`."""
        exact, keys = self.double(), keys.double()
        corrected = exact.delta.expand(exact.delta.project(keys))
        base = linear(keys, exact.weight, exact.bias)
        return (base.abs().max() + corrected.abs().max()).item()

    def terms(self, keys: Tensor) -> float:
        """The largest sum of magnitudes behind one output."""
        exact, keys = self.double(), keys.double().abs()
        down, up = exact.delta
        corrected = keys @ down.abs().T
        if up is not None:
            corrected = corrected @ up.abs().T
        return (keys @ exact.weight.abs().T + corrected).max().item()


def between(z: Tensor, share: float) -> Tensor:
    """A threshold that about `share` of z clear and that none of them is near."""
    ordered = z[~z.isnan()].double().sort().values
    low = ordered[:-1] + (ordered[1:] - ordered[:-1]) / 2
    gaps = ordered[1:] - ordered[:-1]
    if gaps.numel() == 0 or share in (0.0, 1.0):
        return torch.tensor(1e6 if share == 0.0 else -1e6, device=DEVICE)
    wanted = int((1 - share) * (gaps.numel() - 1))
    around = slice(max(0, wanted - 2), wanted + 3)
    assert gaps[around].max() > 1e-3
    return low[around][gaps[around].argmax()].float()


def check_output(got: Tensor, layer: Layer, keys: Tensor, is_open: Tensor) -> None:
    """At most twice the error of torch in the same dtype, under the same gate."""
    exact = layer.double().forward(keys.double(), is_open)
    plain = layer.forward(keys, is_open)
    # Torch may be exact by luck. The slack is the rounding of both paths and of their sum, and the
    # last bit of a float32 sum of these terms. (Triton's interpreter cuts bfloat16 off, unrounded:
    # it needs the factor 2.)
    slack = torch.finfo(got.dtype).eps / 2 * (layer.largest(keys) + exact.abs().max().item())
    slack += torch.finfo(torch.float32).eps * layer.terms(keys)
    assert got.shape == exact.shape
    assert (got - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack


def score_bound(layer: Layer, keys: Tensor) -> Tensor:
    """Error of a norm whose squares are summed from float32 accumulators, never rounded ones."""
    terms = layer.double().delta.down.abs() @ keys.double().abs().unsqueeze(-1)
    return 4 * torch.finfo(torch.float32).eps * terms.squeeze(-1).norm(dim=-1)


def check_score(score: Tensor, layer: Layer, keys: Tensor) -> None:
    exact = layer.double().delta.project(keys.double()).norm(dim=-1)
    assert score.dtype == torch.float32
    assert ((score - exact).abs() <= score_bound(layer, keys)).all()


def check_z(z: Tensor, expected: Tensor, layer: Layer, keys: Tensor, mask: Tensor | None) -> None:
    norms = layer.double().delta.project(keys.double()).norm(dim=-1)
    real = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask
    for row, z_row in enumerate(z):
        at = real[row]
        assert z_row[~at].isnan().all()
        if at.sum() < 2:
            assert z_row.isnan().all()
            continue
        # An error of every norm moves norm and mean by as much, and the deviation by no more.
        error = score_bound(layer, keys[row][at]).max() / norms[row][at].std()
        bound = (2 + expected[row][at].abs()) * error + 1e-6
        assert ((z_row[at] - expected[row][at]).abs() <= bound).all()


def check_sequence(
    layer: Layer, keys: Tensor, mask: Tensor | None, share: float, rounded: bool = False
) -> Tensor:
    """Compare `linear_sequence` with float64; returns which gates were open."""
    exact = layer.double()
    _, _, expected = reference.hook_linear_sequence(
        keys.double(), exact.weight, exact.bias, exact.delta, mask, torch.tensor(0.0)
    )
    alpha = between(expected, share)
    # Here, because other users of this module have no Triton.
    from coachhook_kernels.dual_path import kernel

    output, score, z = kernel.linear_sequence(
        keys, layer.weight, layer.bias, layer.delta, mask, alpha
    )
    is_open = expected >= alpha
    assert torch.equal(z >= alpha, is_open)
    assert torch.equal(z.isnan(), expected.isnan())
    if not rounded:
        check_score(score, layer, keys)
        check_z(z, expected, layer, keys, mask)
    check_output(output, layer, keys, is_open)
    return is_open
