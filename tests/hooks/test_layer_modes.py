"""A hooked layer differentiated, under autocast, compiled and under fake tensors, by every gate."""

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from coachhook.hooks.gates import KeyedGate
from coachhook.hooks.layer import HookLinear, HookState
from tests.support.hook_layers import (
    BATCH,
    D_OUT,
    FORMS,
    GATES,
    LENGTH,
    Layer,
    assert_as_good_as_torch,
    make_layer,
)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "mode",
    [nullcontext, torch.no_grad, torch.inference_mode],
    ids=["grad", "no_grad", "inference"],
)
@pytest.mark.parametrize("gate", GATES)
def test_modes_agree_bit_for_bit(gate: str, mode: Any) -> None:
    layer = make_layer(gate)
    want = layer.hook(layer.keys).detach()
    with mode():
        assert torch.equal(layer.hook(layer.keys), want)


class TestAutograd:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("gate", GATES)
    def test_gradient_is_the_reference_with_a_constant_gate(self, gate: str, form: str) -> None:
        layer = make_layer(gate, form, dtype=torch.float64)
        weights = torch.randn(BATCH, LENGTH, D_OUT, dtype=torch.float64)
        gradients = []
        for forward in (layer.hook, self.reference(layer)):
            keys = layer.keys.clone().requires_grad_()
            forward(keys).backward(weights)
            gradients.append(keys.grad)
        torch.testing.assert_close(gradients[0], gradients[1])

    @staticmethod
    def reference(layer: Layer) -> Any:
        def forward(keys: Tensor) -> Tensor:
            output = layer.base(keys)
            return output + torch.where(layer.hot[..., None], keys @ layer.dense.T, 0)

        return forward

    @pytest.mark.parametrize("gate", GATES)
    def test_gradcheck(self, gate: str) -> None:
        layer = make_layer(gate, dtype=torch.float64)
        assert torch.autograd.gradcheck(layer.hook, layer.keys.requires_grad_())

    @pytest.mark.parametrize("gate", GATES)
    def test_gradient_of_the_base_weight_is_its_own(self, gate: str) -> None:
        layer = make_layer(gate)
        gradients = []
        for module in (layer.hook, layer.base):
            module(layer.keys).sum().backward()
            gradients.append(layer.base.weight.grad.clone())
            layer.base.weight.grad = None
        assert torch.equal(gradients[0], gradients[1])

    @pytest.mark.parametrize("gate", GATES)
    def test_readings_carry_no_gradient(self, gate: str) -> None:
        layer = make_layer(gate)
        reading = layer.hook.read(layer.keys.requires_grad_())
        assert not any(field.requires_grad for field in reading)


class TestAutocast:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("gate", GATES)
    def test_output_is_the_base_plus_delta(self, gate: str, form: str) -> None:
        layer = make_layer(gate, form)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got, plain = layer.hook(layer.keys), layer.base(layer.keys)
            naive = plain + nn.functional.linear(layer.keys, layer.dense.float())
        assert got.dtype == plain.dtype == torch.bfloat16
        assert torch.equal(got[~layer.hot], plain[~layer.hot])
        exact = layer.expected(layer.hot)
        assert_as_good_as_torch(got[layer.hot], naive[layer.hot], exact[layer.hot])

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("gate", GATES)
    def test_of_its_own_dtype_changes_nothing(
        self, gate: str, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Then Δ need not be read for closed tokens, as it is where all products are recast."""
        layer = make_layer(gate, form)
        hook, keys = layer.hook.to(torch.bfloat16), layer.keys.bfloat16()
        with torch.no_grad():
            expected = hook(keys)
            monkeypatch.setattr(HookLinear, "_open", None)
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(hook(keys), expected)
        assert not torch.equal(expected, hook.base(keys))

    @pytest.mark.parametrize("gate", GATES)
    def test_scores_stay_float32(self, gate: str) -> None:
        """A threshold means what it was measured to mean only if scores keep their precision."""
        layer = make_layer(gate)
        with torch.autocast("cpu", torch.bfloat16):
            reading = layer.hook.read(layer.keys)
        assert reading.score.dtype == torch.float32
        assert reading.z.dtype == torch.float32
        assert torch.equal(reading.is_open, layer.hot)


@pytest.mark.usefixtures("fresh_compiler")
class TestCompile:
    @pytest.mark.parametrize("backend", ["eager", "aot_eager"])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("gate", GATES)
    def test_one_graph_for_every_shape(self, gate: str, form: str, backend: str) -> None:
        layer = make_layer(gate, form)
        graphs = 0

        def count(graph: Any, inputs: Any) -> Any:
            nonlocal graphs
            graphs += 1
            return torch._dynamo.lookup_backend(backend)(graph, inputs)

        compiled = torch.compile(layer.hook, fullgraph=True, dynamic=True, backend=count)
        for rows, columns in ((2, 9), (2, 7), (3, 8)):
            keys = layer.keys.repeat(2, 1, 1)[:rows, :columns].clone()
            with torch.no_grad():
                torch.testing.assert_close(compiled(keys), layer.hook(keys))
        assert graphs == 1

    @pytest.mark.parametrize("gate", GATES)
    def test_gradient(self, gate: str) -> None:
        layer = make_layer(gate)
        compiled = torch.compile(layer.hook, fullgraph=True, backend="aot_eager")
        gradients = []
        for forward in (layer.hook, compiled):
            keys = layer.keys.clone().requires_grad_()
            forward(keys).square().sum().backward()
            gradients.append(keys.grad)
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_sees_a_change_of_state_and_of_edits(self) -> None:
        layer = make_layer("keyed")
        compiled = torch.compile(layer.hook, fullgraph=True, backend="eager")
        gate = layer.hook.gate
        assert isinstance(gate, KeyedGate)
        with torch.no_grad():
            edited = compiled(layer.keys)
            gate.enabled.fill_(False)
            assert torch.equal(compiled(layer.keys), layer.base(layer.keys))
            gate.enabled.fill_(True)
            assert torch.equal(compiled(layer.keys), edited)
            layer.hook.state = HookState.OFF
            assert torch.equal(compiled(layer.keys), layer.base(layer.keys))

    @pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
    def test_inductor(self) -> None:
        layer = make_layer("keyed")
        compiled = torch.compile(layer.hook, fullgraph=True)
        with torch.no_grad():
            torch.testing.assert_close(compiled(layer.keys), layer.hook(layer.keys))


@pytest.mark.parametrize("state", list(HookState))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_forward_needs_no_host_synchronisation(gate: str, form: str, state: HookState) -> None:
    """Fake tensors have no values: whatever asks for one raises."""
    layer = make_layer(gate, form)
    layer.hook.state = state
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        keys = fake.from_tensor(layer.keys)
        assert layer.hook(keys).shape == (BATCH, LENGTH, D_OUT)
        with pytest.raises(DataDependentOutputException):
            keys.sum().item()
