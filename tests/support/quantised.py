"""Linear layers quantised to int8: as a class of ours does it, and as torch does."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from tests.support.hook_layers import D_IN, D_OUT


class Int8Linear(nn.Module):
    """A weight-only quantised layer: int8 rows with a scale each, and a forward of its own."""

    def __init__(self, linear: nn.Linear, name: str = "weight") -> None:
        super().__init__()
        weight = linear.weight.detach()
        self.name = name
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        rounded = (weight / self.get_buffer("scale")).round().to(torch.int8)
        self.register_buffer(name, rounded)

    def forward(self, keys: Tensor) -> Tensor:
        scale = self.get_buffer("scale")
        weight = self.get_buffer(self.name).to(scale.dtype) * scale
        return nn.functional.linear(keys.to(scale.dtype), weight)


def quantised(name: str) -> nn.Module:
    linear = nn.Linear(D_IN, D_OUT)
    if name == "int8":
        return Int8Linear(linear)
    holder = nn.Sequential(linear)
    try:
        with warnings.catch_warnings(action="ignore"):
            torch.ao.quantization.quantize_dynamic(holder, {nn.Linear}, torch.qint8, inplace=True)
    except RuntimeError as error:
        pytest.skip(f"this build of torch has no quantised engine: {error}")
    return holder[0]
