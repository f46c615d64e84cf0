"""A hooked layer copied, saved and loaded: the state dict of the unhooked model, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coachhook.hooks.layer import HookLinear, HookState
from coachhook_kernels import Delta
from tests.support.hook_layers import BASES, D_IN, D_OUT, GATES, make_base, make_gate, make_layer
from tests.support.quantised import quantised


@pytest.mark.parametrize("gate", GATES)
def test_deepcopy_is_independent(gate: str) -> None:
    layer = make_layer(gate)
    with torch.no_grad():
        want = layer.hook(layer.keys)
        twin = copy.deepcopy(layer.hook)
        layer.hook.state = HookState.OFF
        layer.hook.down.zero_()
        layer.base.weight.zero_()
        layer.hook.gate.alpha.fill_(torch.inf)
        assert torch.equal(twin(layer.keys), want)


def same(left: Any, right: Any) -> bool:
    """Equal entries of a state dict; a packed quantised weight is a pair of tensors."""
    if isinstance(left, tuple):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Tensor) and left.is_quantized:
        return torch.equal(left.dequantize(), right.dequantize())
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


class TestStateDict:
    @staticmethod
    def models(base: nn.Module) -> tuple[nn.Module, nn.Module]:
        """A plain model, and one that shares its modules but for a hook around `base`."""
        rest = nn.Linear(4, D_IN), nn.Linear(D_OUT, 3)
        delta = Delta(torch.randn(2, D_IN), torch.randn(D_OUT, 2))
        hook = HookLinear(base, delta, make_gate("keyed", torch.randn(2, D_IN)))
        return nn.Sequential(rest[0], base, rest[1]), nn.Sequential(rest[0], hook, rest[1])

    @pytest.mark.parametrize("base", [*BASES, "int8", "torch-int8"])
    def test_holds_what_the_unhooked_one_holds(self, base: str) -> None:
        plain, hooked = self.models(quantised(base) if "int8" in base else make_base(base))
        want, got = plain.state_dict(), hooked.state_dict()
        assert list(got) == list(want)
        for name, value in want.items():
            assert same(got[name], value), name

    @pytest.mark.parametrize("base", [*BASES, "int8"])
    def test_loads_into_a_hooked_model(self, base: str) -> None:
        source, _ = self.models(quantised(base) if "int8" in base else make_base(base))
        _, hooked = self.models(quantised(base) if "int8" in base else make_base(base))
        hooked.load_state_dict(source.state_dict())
        got = hooked.state_dict()
        for name, value in source.state_dict().items():
            assert same(got[name], value), name

    def test_round_trip_after_deepcopy(self) -> None:
        plain, hooked = self.models(make_base())
        twin = copy.deepcopy(hooked)
        assert list(twin.state_dict()) == list(plain.state_dict())
        changed = {name: value + 1 for name, value in plain.state_dict().items()}
        twin.load_state_dict(changed)
        assert torch.equal(twin.state_dict()["1.weight"], changed["1.weight"])
        assert not torch.equal(hooked.state_dict()["1.weight"], changed["1.weight"])
