"""What a hook costs beside its base layer, in eager torch: `pytest bench --benchmark-only`.

Shapes are d_in→d_out of the embedded model's and of GPT2-XL's down-projection. The base layer
alone is the baseline, in the same run; correctness is checked before anything is timed.
"""

from typing import Any

import pytest
import torch
from torch import nn

from coachhook.gates import CalibratedGate, Gate, KeyedGate, Threshold
from coachhook.hooks import HookLinear
from coachhook_kernels import Delta

SHAPES = [(1536, 576), (6400, 1600)]
ROWS = [1, 16, 256]
RANK, EDITS, SKETCH = 100, 100, 64


def hook(d_in: int, d_out: int, gate: str) -> HookLinear:
    torch.manual_seed(0)
    up, _ = torch.linalg.qr(torch.randn(d_out, RANK))
    delta = Delta(torch.randn(RANK, d_in) / d_in**0.5, up)
    threshold = Threshold(alpha=1e6)
    made: Gate = CalibratedGate(threshold)
    if gate == "keyed":
        made = KeyedGate(
            threshold,
            torch.randn(SKETCH, d_in),
            torch.zeros(SKETCH),
            nn.functional.normalize(torch.randn(EDITS, SKETCH), dim=-1),
            torch.arange(EDITS),
            torch.ones(EDITS, dtype=torch.bool),
        )
    return HookLinear(nn.Linear(d_in, d_out, bias=False), delta, made)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("d_in", "d_out"), SHAPES)
@pytest.mark.parametrize("what", ["base", "keyed", "calibrated"])
def test_forward(benchmark: Any, what: str, d_in: int, d_out: int, rows: int) -> None:
    benchmark.group = f"{d_in}→{d_out}, {rows} rows"
    layer = hook(d_in, d_out, "keyed" if what == "base" else what)
    keys = torch.randn(rows, d_in)
    with torch.no_grad():
        # Every gate is closed: the hooked output is the base's, bit for bit.
        assert torch.equal(layer(keys), layer.base(keys))
        benchmark(layer.base if what == "base" else layer, keys)
