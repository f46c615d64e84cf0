"""A hook over bases that are more than `W k + b`: watched, quantised, sharing, transformed.

Each time the hooked layer must give what the base gives plus `Δ k` where the gate is open, and must
leave to the base what is the base's.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coachhook.hooks.gates import CalibratedGate, Threshold
from coachhook.hooks.layer import HookLinear
from coachhook_kernels import Delta

D_IN, D_OUT, RANK = 24, 16, 3


def hooked(base: nn.Module) -> tuple[HookLinear, Tensor]:
    """A hook whose gate is always open, and its Δ."""
    generator = torch.Generator().manual_seed(0)
    up, _ = torch.linalg.qr(torch.randn(D_OUT, RANK, generator=generator))
    down = torch.randn(RANK, D_IN, generator=generator)
    return HookLinear(base, Delta(down, up), CalibratedGate(Threshold(alpha=-1.0))), up @ down


@pytest.fixture
def keys() -> Tensor:
    return torch.randn(5, D_IN, generator=torch.Generator().manual_seed(1))


class Scaled(Tensor):
    """A weight in the manner of a quantised tensor: a class that says what its products are, and
    that refuses every operation but the linear one."""

    def __new__(cls, plain: Tensor) -> "Scaled":
        made: Scaled = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, plain.shape, dtype=plain.dtype
        )
        made.plain = plain
        return made

    plain: Tensor

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is nn.functional.linear:
            given, weight, bias = args
            return nn.functional.linear(given, weight.plain, bias)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].plain)
        raise NotImplementedError(f"{function} of a quantised weight")


def test_a_weight_of_a_class_of_its_own(keys: Tensor) -> None:
    base = nn.Linear(D_IN, D_OUT)
    plain = base.weight.detach().clone()
    base.weight = nn.Parameter(Scaled(plain), requires_grad=False)
    hook, delta = hooked(base)
    with torch.no_grad():
        got = hook(keys)
        expected = nn.functional.linear(keys, plain, base.bias) + keys @ delta.T
    torch.testing.assert_close(got, expected)


class Keeping(nn.Module):
    """Keeps what it put out, and may put out the same tensor again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D_IN, D_OUT)
        self.kept: Tensor | None = None

    def forward(self, keys: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.inner(keys)
        return self.kept


def test_an_output_that_the_base_keeps_stays_its_own(keys: Tensor) -> None:
    base = Keeping()
    hook, delta = hooked(base)
    with torch.no_grad():
        first, second = hook(keys), hook(keys)
        own = base.inner(keys)
    assert base.kept is not None
    assert torch.equal(base.kept, own)
    torch.testing.assert_close(first, own + keys @ delta.T)
    assert torch.equal(first, second)


class Spread(nn.Module):
    """One row for all tokens, expanded: its elements lie on top of each other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_OUT))

    def forward(self, keys: Tensor) -> Tensor:
        return self.weight.expand(*keys.shape[:-1], -1)


def test_an_expanded_output(keys: Tensor) -> None:
    base = Spread()
    hook, delta = hooked(base)
    with torch.no_grad():
        torch.testing.assert_close(hook(keys), base(keys) + keys @ delta.T)


@pytest.mark.parametrize("everywhere", [False, True], ids=["its own", "global"])
def test_a_forward_hook_sees_the_bases_output(keys: Tensor, everywhere: bool) -> None:
    base = nn.Linear(D_IN, D_OUT)
    hook, delta = hooked(base)
    seen: list[Tensor] = []

    def see(module: nn.Module, _: Any, output: Tensor) -> None:
        if module is base:
            seen.append(output)

    if everywhere:
        handle = nn.modules.module.register_module_forward_hook(see)
    else:
        handle = base.register_forward_hook(see)
    try:
        with torch.no_grad():
            got = hook(keys)
    finally:
        handle.remove()
    with torch.no_grad():
        own = base(keys)
    assert len(seen) == 1
    assert torch.equal(seen[0], own)
    torch.testing.assert_close(got, own + keys @ delta.T)


def test_a_forward_put_in_place_keeps_the_bases_output(keys: Tensor) -> None:
    base = nn.Linear(D_IN, D_OUT)
    own_forward, seen = base.forward, []

    def forward(given: Tensor) -> Tensor:
        seen.append(own_forward(given))
        return seen[-1]

    base.forward = forward  # type: ignore[method-assign]
    hook, delta = hooked(base)
    with torch.no_grad():
        got, own = hook(keys), own_forward(keys)
    assert len(seen) == 1
    assert torch.equal(seen[0], own)
    torch.testing.assert_close(got, own + keys @ delta.T)


def test_forward_mode_derivatives(keys: Tensor) -> None:
    """The fused operation has none; the hook must not answer with zeros."""
    base = nn.Linear(D_IN, D_OUT)
    hook, delta = hooked(base)
    direction = torch.ones_like(keys)
    expected = direction @ (base.weight + delta).T
    _, along = torch.func.jvp(hook, (keys,), (direction,))
    torch.testing.assert_close(along, expected)
    with torch.autograd.forward_ad.dual_level():
        output = hook(torch.autograd.forward_ad.make_dual(keys, direction))
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(tangent, expected)


def test_reverse_mode_through_a_transform(keys: Tensor) -> None:
    base = nn.Linear(D_IN, D_OUT)
    hook, delta = hooked(base)
    jacobian = torch.func.jacrev(hook)(keys[0])
    torch.testing.assert_close(jacobian, base.weight + delta)
