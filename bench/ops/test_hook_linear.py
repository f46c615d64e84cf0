"""What a hook costs beside its base layer, by operation: `pytest bench --benchmark-only`.

Shapes are d_in→d_out of the down-projections of SmolLM2-135M and GPT2-XL and, on a GPU, of GPT-J,
Llama-3-8B and a 70B model as well. `F.linear` alone is the baseline of each group. On a GPU small
layers stay in the last cache (bench.harness.rounds): bench.ops.table replays CUDA graphs over
rotating inputs instead.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from bench.harness.rounds import DEVICE, DTYPE, GPU, time_rounds
from bench.ops.cases import ALPHA, EDITS, LARGE, RANK, SMALL
from bench.ops.layers import (
    Layer,
    check_layer,
    random_gate,
    random_layer,
    require_close,
    require_open,
)
from bench.ops.published import published
from coachhook.hooks.layer import HookLinear
from coachhook_kernels import hook_correction_, hook_linear

SHAPES = SMALL + LARGE if GPU else SMALL
ROWS = [(1, 0), (16, 0), (4096, 0), (4096, 41)] if GPU else [(1, 0), (16, 0), (256, 0), (256, 3)]
KINDS = {
    "keyed, dense": ("keyed", None),
    "keyed, rank 128": ("keyed", RANK),
    "calibrated, dense": ("calibrated", None),
    "calibrated, rank 128": ("calibrated", RANK),
}
PLAIN = ["published", "published, compiled"] if GPU else ["published"]
SIZES = pytest.mark.parametrize(("rows", "n_open"), ROWS)
SHAPE = pytest.mark.parametrize(("d_in", "d_out"), SHAPES, ids=lambda size: str(size))


def layer_of(kind: str, d_in: int, d_out: int, rows: int, n_open: int) -> Layer:
    torch.manual_seed(0)
    gate, rank = KINDS[kind]
    return random_layer(
        d_in,
        d_out,
        rows,
        gate=gate,
        rank=rank,
        edits=EDITS,
        n_open=n_open,
        dtype=DTYPE,
        device=DEVICE,
    )


def measure(benchmark: Any, step: Callable[[], object], layer: Layer) -> None:
    rows, d_in = layer.keys.shape
    group = f"{d_in}→{layer.weight.shape[0]}, {rows} rows, {layer.n_open} open"
    time_rounds(benchmark, group, step)


@SHAPE
@SIZES
def test_base(benchmark: Any, d_in: int, d_out: int, rows: int, n_open: int) -> None:
    layer = layer_of("keyed, dense", d_in, d_out, rows, n_open)
    output = linear(layer.keys, layer.weight)
    exact = linear(layer.keys.double(), layer.weight.double())
    require_close("F.linear", output, output, exact)
    measure(benchmark, lambda: linear(layer.keys, layer.weight), layer)


@SHAPE
@SIZES
@pytest.mark.parametrize("kind", KINDS)
def test_hook_linear(
    benchmark: Any, kind: str, d_in: int, d_out: int, rows: int, n_open: int
) -> None:
    layer = layer_of(kind, d_in, d_out, rows, n_open)
    check_layer(layer)
    keys, weight, delta, gate, _ = layer
    measure(benchmark, lambda: hook_linear(keys, weight, None, delta, gate), layer)


@SHAPE
@SIZES
def test_hook_correction(benchmark: Any, d_in: int, d_out: int, rows: int, n_open: int) -> None:
    layer = layer_of("keyed, dense", d_in, d_out, rows, n_open)
    keys, weight, delta, gate, _ = layer
    output = linear(keys, weight)
    before = output.clone()
    score, _ = hook_correction_(output, keys, delta, gate)
    require_open("hook_correction_", layer, score)
    changed = (output != before).any(-1)
    assert torch.equal(changed, gate.is_open(score))
    measure(benchmark, lambda: hook_correction_(output, keys, delta, gate), layer)


@SHAPE
@SIZES
def test_module(benchmark: Any, d_in: int, d_out: int, rows: int, n_open: int) -> None:
    """`HookLinear` with a gate that never opens."""
    layer = layer_of("keyed, dense", d_in, d_out, rows, n_open)
    base = nn.Linear(d_in, d_out, bias=False, device=DEVICE, dtype=DTYPE)
    hook = HookLinear(base, layer.delta, random_gate("keyed", d_in, EDITS, layer.keys))
    with torch.no_grad():
        base.weight.copy_(layer.weight)
        output = base(layer.keys)
        exact = linear(layer.keys.double(), layer.weight.double())
        require_close("HookLinear", hook(layer.keys), output, exact)
    measure(benchmark, lambda: hook(layer.keys), layer)


@SHAPE
@SIZES
@pytest.mark.parametrize("kind", PLAIN)
def test_published(
    benchmark: Any, kind: str, d_in: int, d_out: int, rows: int, n_open: int
) -> None:
    layer = layer_of("calibrated, dense", d_in, d_out, rows, n_open)
    keys, weight = layer.keys[None], layer.weight
    hook_weight = weight + layer.delta.down
    forward = torch.compile(published, dynamic=False) if "compiled" in kind else published
    output = forward(keys, weight, hook_weight, None, ALPHA)
    # Each row is one of the two products, up to rounding.
    either = [linear(keys, matrix) for matrix in (weight, hook_weight)]
    slack = 4 * torch.finfo(DTYPE).eps * float(either[1].abs().max())
    distance = torch.stack([(output - one).abs().amax(-1) for one in either])
    assert float(distance.amin(0).max()) <= slack
    measure(benchmark, lambda: forward(keys, weight, hook_weight, None, ALPHA), layer)
