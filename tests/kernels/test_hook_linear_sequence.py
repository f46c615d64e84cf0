"""`hook_linear_sequence` as an operation: eager, dispatched, differentiated, compiled, refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook_kernels import Delta, KernelInputError, hook_linear_sequence
from coachhook_kernels.hook_linear_sequence import op, reference
from tests.support.kernels import DEVICE

pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning")]
EIGHT_BITS = torch.float8_e4m3fn
forms = pytest.mark.parametrize("rank", [None, 0, 1, 4], ids=lambda rank: f"rank{rank}")
Arguments = tuple[Tensor, Tensor, Tensor | None, Delta, Tensor | None, Tensor]


def arguments(
    rank: int | None,
    shape: tuple[int, int] = (2, 9),
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    alpha: float = 0.4,
) -> Arguments:
    torch.manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64).to(device, dtype)

    d_in, d_out = 13, 7
    delta = Delta(normal(d_out, d_in))
    if rank is not None:
        up, _ = torch.linalg.qr(torch.randn(d_out, rank, dtype=torch.float64))
        delta = Delta(normal(rank, d_in), up.to(device, dtype))
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    mask[:, -1:] = False
    threshold = torch.tensor(alpha, device=device)
    return normal(*shape, d_in), normal(d_out, d_in), normal(d_out), delta, mask, threshold


@pytest.fixture(params=["eager", "kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Plain torch, or the Triton kernels in the interpreter; on a GPU the latter are the rule."""
    if request.param == "kernels" and not torch.cuda.is_available():
        pytest.importorskip("triton")
        monkeypatch.setattr(op, "triton_runs", lambda *_: True)
    name: str = request.param
    return name


def device_of(path: str) -> str:
    return "cuda" if path == "kernels" and torch.cuda.is_available() else "cpu"


class TestForward:
    @forms
    @pytest.mark.parametrize("masked", [True, False])
    def test_agrees_with_the_reference(self, masked: bool, rank: int | None, path: str) -> None:
        given = arguments(rank, dtype=torch.float32, device=device_of(path))
        keys, weight, bias, delta, mask, alpha = given
        mask = mask if masked else None
        got = hook_linear_sequence(keys, weight, bias, delta, mask, alpha)
        expected = reference.hook_linear_sequence(keys, weight, bias, delta, mask, alpha)
        is_open = expected[2] >= alpha
        assert is_open.any() == (rank != 0)
        assert not is_open.all()
        # Sums of 13 products of numbers of size 1: a few of the last of their 24 bits.
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == torch.float32
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, equal_nan=True)
        closed = torch.nn.functional.linear(keys, weight, bias)[~is_open]
        torch.testing.assert_close(got[0][~is_open], closed, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1), (3, 1)])
    @pytest.mark.parametrize("rank", [None, 4])
    def test_empty_and_lone(self, rank: int | None, shape: tuple[int, int], path: str) -> None:
        device = device_of(path)
        keys, weight, bias, delta, _, alpha = arguments(rank, shape, torch.float32, device, -1e6)
        output, score, z = hook_linear_sequence(keys, weight, bias, delta, None, alpha)
        assert output.shape == (*shape, 7)
        assert score.shape == z.shape == shape
        assert z.isnan().all()
        base = torch.nn.functional.linear(keys, weight, bias)
        torch.testing.assert_close(output, base, rtol=1e-5, atol=1e-5)

    def test_delta_of_another_dtype(self) -> None:
        keys, weight, bias, delta, mask, alpha = arguments(4, dtype=torch.bfloat16)
        wide = Delta(delta.down.float(), delta.up.float())  # type: ignore[union-attr]
        output, score, _ = hook_linear_sequence(keys, weight, bias, wide, mask, alpha)
        expected = reference.hook_linear_sequence(keys, weight, bias, wide, mask, alpha)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, expected[0])
        assert torch.equal(score, expected[1])

    def test_autocast(self) -> None:
        keys, weight, bias, delta, mask, alpha = arguments(4, dtype=torch.float32)
        keys.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = hook_linear_sequence(keys, weight, bias, delta, mask, alpha)
            expected = reference.hook_linear_sequence(keys, weight, bias, delta, mask, alpha)
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, equal_nan=True)
        got[0].sum().backward()
        assert keys.grad is not None
        assert keys.grad.dtype == torch.float32


class TestGradient:
    @pytest.mark.parametrize("rank", [None, 4])
    def test_reference_gradcheck(self, rank: int | None) -> None:
        keys, weight, bias, delta, mask, alpha = arguments(rank, (2, 5))

        def output(*given: Tensor) -> Tensor:
            return reference.hook_linear_sequence(*given, delta, mask, alpha)[0]

        given = [tensor.requires_grad_() for tensor in (keys, weight, bias) if tensor is not None]
        assert torch.autograd.gradcheck(output, given)

    @forms
    @pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
    def test_agrees_with_the_reference(self, which: tuple[int, ...], rank: int | None) -> None:
        *given, delta, mask, alpha = arguments(rank)

        def gradients(forward: Callable[..., Any]) -> tuple[Tensor, ...]:
            leaves = [tensor.detach().clone() for tensor in given]
            for i in which:
                leaves[i].requires_grad_()
            output, score, z = forward(*leaves, delta, mask, alpha)
            assert not score.requires_grad
            assert not z.requires_grad
            weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            loss = (output.flatten() * weights).sum()
            return torch.autograd.grad(loss, [leaves[i] for i in which])

        got, expected = gradients(hook_linear_sequence), gradients(reference.hook_linear_sequence)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other)

    def test_through_the_kernels(self, path: str) -> None:
        keys, *rest = arguments(4, dtype=torch.float32, device=device_of(path))
        found = []
        for forward in (hook_linear_sequence, reference.hook_linear_sequence):
            leaf = keys.clone().requires_grad_()
            forward(leaf, *rest)[0].square().sum().backward()
            found.append(leaf.grad)
        torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


class TestCompile:
    @pytest.mark.parametrize("rank", [None, 4])
    def test_opcheck(self, rank: int | None) -> None:
        keys, weight, bias, delta, _, alpha = arguments(rank, dtype=torch.float32)
        keys.requires_grad_()
        # It compares outputs without equating NaNs, so nothing is padding here.
        mask = torch.ones(keys.shape[:-1], dtype=torch.bool)
        torch.library.opcheck(
            torch.ops.coachhook.hook_linear_sequence.default,
            (keys, weight, bias, *delta, mask, alpha),
        )

    @pytest.mark.parametrize("rank", [None, 4])
    def test_full_graph_with_any_number_of_rows(self, rank: int | None) -> None:
        torch._dynamo.reset()
        frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        forward = torch.compile(hook_linear_sequence, backend=frames, fullgraph=True, dynamic=True)
        for shape in ((2, 9), (3, 5), (4, 21)):
            keys, *rest = arguments(rank, shape, torch.float32)
            keys.requires_grad_()
            output, score, z = forward(keys, *rest)
            output.sum().backward()
            expected = hook_linear_sequence(keys, *rest)
            for one, other in zip((output, score, z), expected, strict=True):
                torch.testing.assert_close(one, other, equal_nan=True)
        assert frames.frame_count == 1


class TestRefusals:
    @pytest.mark.parametrize(
        ("position", "wrong", "message"),
        [
            (0, torch.zeros(9, 13), "keys"),
            (0, torch.zeros(2, 9, 13, dtype=torch.int64), "keys"),
            (1, torch.zeros(13, 7), "weight"),
            (1, torch.zeros(7, 13, dtype=torch.float16), "weight is torch.float16"),
            (2, torch.zeros(8), "bias"),
            (2, torch.zeros(7, dtype=torch.float64), "bias is torch.float64"),
            (3, Delta(torch.zeros(7, 12)), "delta.down"),
            (0, torch.zeros(2, 9, 13, dtype=EIGHT_BITS), "keys are torch.float8_e4m3fn of shape"),
            (1, torch.zeros(7), r"weight has shape \(7,\); \(d_out, 13\)"),
            (1, torch.zeros(7, 13, device="meta"), "weight is on meta"),
            (2, torch.zeros(7, device="meta"), "bias is on meta"),
            (2, torch.zeros(7, 1), r"bias has shape \(7, 1\)"),
            (3, Delta(torch.zeros(6, 13)), "delta makes 6 outputs, the layer has 7"),
            (3, Delta(torch.zeros(4, 13), torch.zeros(8, 4)), "delta makes 8 outputs"),
            (3, Delta(torch.zeros(())), "delta.down"),
            (3, Delta(torch.zeros(7, 13, device="meta")), "down is on meta"),
            (3, Delta(torch.zeros(7, 13, dtype=torch.int64)), "delta.down is torch.int64"),
            (3, Delta(torch.zeros(7, 13, dtype=EIGHT_BITS)), "delta.down is torch.float8_e4m3fn"),
            (3, Delta(torch.zeros(4, 13), torch.zeros(7, 4).long()), "delta.up is torch.int64"),
            (5, torch.tensor(0.0, device="meta"), "alpha is on meta"),
            (3, Delta(torch.zeros(4, 13), torch.zeros(4, 7)), "delta.up"),
            (4, torch.ones(2, 9), "mask is torch.float32"),
            (4, torch.ones(9, 2, dtype=torch.bool), "mask"),
            (5, torch.zeros(1), "alpha"),
            (5, torch.tensor(0.0, dtype=torch.float64), "alpha is torch.float64"),
            (4, torch.ones(2, 9, dtype=torch.bool, device="meta"), "mask is on meta"),
        ],
    )
    def test_says_what_is_wrong(self, position: int, wrong: Any, message: str) -> None:
        given: list[Any] = list(arguments(None, dtype=torch.float32))
        given[position] = wrong
        with pytest.raises(KernelInputError, match=message):
            hook_linear_sequence(*given)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_bias_that_is_not_contiguous(form: str) -> None:
    """The launcher itself reads a bias of any stride."""
    pytest.importorskip("triton")
    from coachhook_kernels.dual_path.kernel import linear_sequence

    with torch.device(DEVICE):
        torch.manual_seed(0)
        keys, weight = torch.randn(2, 5, 12), torch.randn(9, 12)
        up, _ = torch.linalg.qr(torch.randn(9, 3))
        delta = Delta(torch.randn(3, 12), up) if form == "factored" else Delta(torch.randn(9, 12))
        bias = torch.stack([torch.randn(9), torch.full((9,), torch.nan)], -1)[:, 0]
        alpha = torch.tensor(1.0)
        output, _, _ = linear_sequence(keys, weight, bias, delta, None, alpha)
        expected, _, _ = linear_sequence(keys, weight, bias.contiguous(), delta, None, alpha)
        assert torch.equal(output, expected)
