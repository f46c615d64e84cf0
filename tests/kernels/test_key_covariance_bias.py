"""Long sums of `key_covariance_`: accumulators cut off on a GPU, and do not in the interpreter."""

import pytest
import torch
from torch import Tensor

from bench.ops.tensor_core import truncation
from coachhook_kernels.key_covariance import key_covariance_
from tests.kernels.test_key_covariance import DEVICE, accumulator, check, random
from tests.support.tensor_core import sum_of_squares

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
kernel = pytest.importorskip("coachhook_kernels.key_covariance.kernel", exc_type=ImportError)

SHAPE = (16, 64)
NEVER = 1 << 30
# The relative errors of cuBLAS that a GPU showed (csrc_notes/gpu.md); beyond, the last of them.
CUBLAS = {4096: 5e-6, 16384: 9e-6, 131072: 9e-6}


@triton.jit
def drain_kernel(p_acc, p_drained, p_whole, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One drain; whole: what the drained bits stand for."""
    o_tile = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    HALF: tl.constexpr = COLUMNS // 2
    o_half = tl.arange(0, ROWS)[:, None] * HALF + tl.arange(0, HALF)[None, :]
    b_drained = tl.load(p_drained + o_half).to(tl.uint32, bitcast=True)
    b_acc, b_drained = kernel._drain(tl.load(p_acc + o_tile), b_drained)
    tl.store(p_acc + o_tile, b_acc)
    tl.store(p_drained + o_half, b_drained.to(tl.int32, bitcast=True))
    b_left, b_right = kernel._undrained(tl.zeros((ROWS, COLUMNS), tl.float32), b_drained)
    tl.store(p_whole + o_tile, kernel._whole(b_left, b_right))


class Drain:
    """The kernel's own, for sums of SHAPE."""

    def __init__(self) -> None:
        self.bits = torch.zeros(SHAPE[0], SHAPE[1] // 2, dtype=torch.int32, device=DEVICE)

    def __call__(self, left: Tensor, drained: Tensor) -> tuple[Tensor, Tensor]:
        left, whole = left.to(DEVICE), torch.empty(SHAPE, device=DEVICE)
        drain_kernel[(1,)](left, self.bits, whole, *SHAPE)
        return left.cpu(), whole.cpu()


def relative_error(got: Tensor, keys: Tensor) -> float:
    exact = keys.double().square().sum(0)
    return ((got - exact).abs().max() / exact.max()).item()


def keys_of(n_rows: int) -> Tensor:
    return random(n_rows, *SHAPE, dtype=torch.bfloat16).cpu()


@pytest.mark.parametrize(("n_rows", "measured"), [(4096, 1.2e-5), (16384, 5.9e-5)])
def test_the_emulation_errs_by_what_a_gpu_did_with_one_accumulator(
    n_rows: int, measured: float
) -> None:
    keys = keys_of(n_rows)
    error = relative_error(sum_of_squares(keys, NEVER, Drain()), keys)
    assert error == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("n_rows", [4096, 16384, pytest.param(131072, marks=pytest.mark.slow)])
def test_a_drained_sum_errs_at_most_twice_as_much_as_cublas(n_rows: int) -> None:
    keys = keys_of(n_rows)
    assert relative_error(sum_of_squares(keys, kernel.SPAN, Drain()), keys) <= 2 * CUBLAS[n_rows]


@pytest.mark.parametrize("scale", [1.0, -3e4, 1e-30, 1e30])
def test_a_drain_loses_nothing_but_the_rounding_of_the_sum(scale: float) -> None:
    drain, drained = Drain(), torch.zeros(SHAPE)
    for seed in range(3):
        acc = scale * random(*SHAPE, seed=seed).cpu()
        before = acc + drained
        left, drained = drain(acc, drained)
        assert torch.equal(left.double() + drained.double(), before.double())
        assert (left.abs() <= before.abs() / 128).all()


@pytest.mark.parametrize("n_rows", [1024, 1500, 8200])
def test_the_bound_for_tensor_cores_notices_a_missing_product(n_rows: int) -> None:
    keys = random(n_rows, 16, dtype=torch.bfloat16)
    start = accumulator(16)
    got = (start.double() + keys.double().mT @ keys.double()).float()
    got = got.triu() + got.triu(1).mT
    check(got, start, keys, None, truncating=True)
    row = (keys[:, 3].abs() - 1).abs().argmin()
    got[3, 3] -= keys[row, 3].float() ** 2
    with pytest.raises(AssertionError):
        check(got, start, keys, None, truncating=True)


@pytest.mark.parametrize("n_rows", [1024, 4096, 16384])
def test_the_bound_for_tensor_cores_holds_what_they_do(n_rows: int) -> None:
    keys = keys_of(n_rows)
    error = relative_error(sum_of_squares(keys, kernel.SPAN, Drain()), keys)
    assert truncation(n_rows, kernel.SPAN) / 8 < error <= truncation(n_rows, kernel.SPAN)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n_rows", [1024, 4096, 16384, 131072])
def test_errs_at_most_twice_as_much_as_cublas(n_rows: int, masked: bool) -> None:
    d, some = 4096, 256
    keys = random(n_rows, d, dtype=torch.bfloat16)
    mask = torch.ones(n_rows, dtype=torch.bool, device=DEVICE) if masked else None
    exact = keys[:, :some].double().mT @ keys.double()
    zeros = torch.zeros(d, d, device=DEVICE)
    by_cublas = torch.addmm(zeros, keys.mT, keys, out_dtype=torch.float32)[:some]
    got = key_covariance_(zeros, keys, mask)[:some]
    assert (got - exact).abs().max() <= 2 * (by_cublas - exact).abs().max()
