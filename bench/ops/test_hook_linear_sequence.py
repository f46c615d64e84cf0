"""The paper's gate, over whole sequences: `pytest bench --benchmark-only`.

Baselines in the same run: `F.linear` alone (the unedited layer), and the published hook's sequence
of operations written plainly (two projections, norm, mean and deviation, boolean-mask swap), on a
GPU compiled as well. Correctness is checked before anything is timed. One sequence of `rows`
tokens; float32 on a CPU, bfloat16 on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.harness.machine import device_name
from bench.harness.rounds import CALLS, DEVICE, DTYPE, GPU, time_rounds
from bench.ops.cases import ALPHA, LARGE, RANK, SMALL
from bench.ops.published import published
from coachhook_kernels import Delta, hook_linear_sequence
from coachhook_kernels.hook_linear_sequence import reference

SHAPES = SMALL + LARGE if GPU else SMALL
ROWS = [1, 16, 128]
KINDS = ["F.linear", "published", "op, dense", "op, rank 128"]
if GPU:
    ROWS += [512, 1024, 4096]
    KINDS += ["published, compiled"]

Given = tuple[Tensor, Tensor, Delta, Delta, Tensor]


def given(d_in: int, d_out: int, rows: int) -> Given:
    torch.manual_seed(0)
    keys = torch.randn(1, rows, d_in, device=DEVICE, dtype=DTYPE)
    # A few tokens whose norms stand out, as those of edited subjects do.
    keys[:, ::100] *= 4
    weight = torch.randn(d_out, d_in, device=DEVICE, dtype=DTYPE) / d_in**0.5
    dense = Delta(torch.randn(d_out, d_in, device=DEVICE, dtype=DTYPE) / d_in**0.5)
    up, _ = torch.linalg.qr(torch.randn(d_out, RANK, device=DEVICE))
    down = torch.randn(RANK, d_in, device=DEVICE, dtype=DTYPE) / d_in**0.5
    factored = Delta(down, up.to(DTYPE))
    return keys, weight, dense, factored, torch.tensor(ALPHA, device=DEVICE)


def check(keys: Tensor, weight: Tensor, delta: Delta, alpha: Tensor) -> None:
    output, _, z = hook_linear_sequence(keys, weight, None, delta, None, alpha)
    down, up = delta
    wide = Delta(down.double(), None if up is None else up.double())
    exact, _, expected = reference.hook_linear_sequence(
        keys.double(), weight.double(), None, wide, None, alpha
    )
    is_open = z >= alpha
    assert torch.equal(is_open, expected >= alpha)
    corrected = delta.expand(delta.project(keys))
    plain = torch.where(
        is_open.unsqueeze(-1), linear(keys, weight) + corrected, linear(keys, weight)
    )
    # Plain torch may happen to be exact: one rounding of the largest output is allowed on top.
    slack = torch.finfo(DTYPE).eps * exact.abs().max()
    assert (output - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack


def prepare(kind: str, inputs: Given) -> Callable[[], Any]:
    keys, weight, dense, factored, alpha = inputs
    if kind == "F.linear":
        return lambda: linear(keys, weight)
    if kind.startswith("published"):
        hooked = weight + dense.down
        call = torch.compile(published, dynamic=False) if "compiled" in kind else published
        return lambda: call(keys, weight, hooked, None, ALPHA)
    delta = dense if "dense" in kind else factored
    check(keys, weight, delta, alpha)
    return lambda: hook_linear_sequence(keys, weight, None, delta, None, alpha)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_forward(benchmark: Any, kind: str, d_in: int, d_out: int, rows: int) -> None:
    call = prepare(kind, given(d_in, d_out, rows))
    time_rounds(benchmark, f"{d_in}→{d_out}, {rows} rows", call)
    if benchmark.stats is None:
        return
    outputs = {"F.linear": d_out, "op, rank 128": d_out + RANK}.get(kind, 2 * d_out)
    seconds = benchmark.stats.stats.median / CALLS
    # Bytes that must move: the weights of every path once, the keys, and one output.
    moved = (outputs * d_in + rows * (d_in + d_out)) * DTYPE.itemsize
    benchmark.extra_info |= {
        "dtype": str(DTYPE),
        "device": device_name(),
        "GB/s": moved / seconds / 1e9,
        "TFLOP/s": 2 * rows * d_in * outputs / seconds / 1e12,
    }
