"""Hooked layers for tests, always the same: every gate and form of Δ over every kind of base."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coachhook.hooks.gates import (
    CalibratedGate,
    Gate,
    KeyedGate,
    SequenceGate,
    SequenceMask,
    Threshold,
)
from coachhook.hooks.layer import HookLinear
from coachhook_kernels import Delta

D_IN, D_OUT, RANK, SKETCH = 23, 17, 5, 8
BATCH, LENGTH = 2, 9
HOT = ((0, 2), (1, 5))
"""Row and column of the tokens that resemble an edited one."""

GATES = ("keyed", "calibrated", "sequence")
PER_TOKEN = ("keyed", "calibrated")
FORMS = ("factored", "dense")
BASES = ("linear", "linear-no-bias", "conv1d")
DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="fp16"),
]


@dataclass
class Layer:
    """A hook, the dense float64 Δ behind it, and keys `(2, 9, d_in)` that open it at `hot`."""

    hook: HookLinear
    dense: Tensor
    keys: Tensor
    hot: Tensor

    @property
    def base(self) -> nn.Module:
        return self.hook.base

    def expected(self, is_open: Tensor) -> Tensor:
        """The output in float64, from the weights and keys as they are in their own dtype."""
        weight = self.base.weight.detach().double()
        weight = weight.T if isinstance(self.base, Conv1D) else weight
        output = self.keys.double() @ weight.T
        if getattr(self.base, "bias", None) is not None:
            output = output + self.base.bias.detach().double()
        delta = self.keys.double() @ self.dense.T
        return torch.where(is_open[..., None], output + delta, output)


def make_base(name: str = "linear") -> nn.Module:
    if name == "conv1d":
        base: nn.Module = Conv1D(D_OUT, D_IN)
        nn.init.normal_(base.bias)
        return base
    return nn.Linear(D_IN, D_OUT, bias=name == "linear")


def make_layer(
    gate: str = "keyed",
    form: str = "factored",
    base: str = "linear",
    dtype: torch.dtype = torch.float32,
) -> Layer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make_base(base)
        up, _ = torch.linalg.qr(torch.randn(D_OUT, RANK, dtype=torch.float64))
        down = torch.randn(RANK, D_IN, dtype=torch.float64)
        keys = 0.1 * torch.randn(BATCH, LENGTH, D_IN)
        hot = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
        edited = torch.randn(len(HOT), D_IN)
        for at, key in zip(HOT, edited, strict=True):
            keys[at], hot[at] = key, True
        made = make_gate(gate, edited)
    dense = up @ down
    delta = Delta(down.float(), up.float()) if form == "factored" else Delta(dense.float())
    hook = HookLinear(module, delta, made).to(dtype)
    # What Δ is after rounding to the module's dtype.
    kept = hook.down.double() if hook.up is None else hook.up.double() @ hook.down.double()
    return Layer(hook, kept, keys.to(dtype), hot)


def make_gate(name: str, edited: Tensor) -> Gate:
    if name == "calibrated":
        return CalibratedGate(Threshold(mean=0.5, std=0.25, alpha=8.0))
    if name == "sequence":
        return SequenceGate(Threshold(alpha=2.0), SequenceMask())
    projection = torch.randn(SKETCH, edited.shape[1]) / SKETCH**0.5
    offset = 0.01 * torch.randn(SKETCH)
    fingerprints = nn.functional.normalize(edited @ projection.T - offset, dim=-1)
    return KeyedGate(
        Threshold(mean=0.1, std=0.2, alpha=4.3),
        projection,
        offset,
        fingerprints,
        owner=torch.arange(len(edited)) + 10,
        enabled=torch.ones(len(edited), dtype=torch.bool),
    )


def assert_as_good_as_torch(got: Tensor, naive: Tensor, exact: Tensor) -> None:
    """The house rule: no more than twice the error of plain torch at the same dtype."""
    epsilon = torch.finfo(got.dtype).eps * exact.abs().max().item()
    error, allowed = ((t.double() - exact).abs().max().item() for t in (got, naive))
    assert error <= 2 * allowed + epsilon
