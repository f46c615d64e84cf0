"""`HookLinear` and its gates against float64 formulas, in every state, form, dtype and mode."""

import copy
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers.pytorch_utils import Conv1D

from coachhook.config import EditConfig
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import (
    CalibratedGate,
    Gate,
    KeyedGate,
    SequenceGate,
    SequenceMask,
    Threshold,
)
from coachhook.hooks.layer import HookLinear, HookState
from coachhook.hookset import HookSet
from coachhook.journal.journal import Batch, EditRecord, Journal, LayerFactors
from coachhook.models.base import BaseModel, weight_checksums
from coachhook_kernels import Delta
from tests.support.tiny import tiny_model

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


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", GATES)
def test_validated_corrects_the_open_tokens_alone(
    gate: str, form: str, base: str, dtype: torch.dtype
) -> None:
    layer = make_layer(gate, form, base, dtype)
    with torch.no_grad():
        got, plain = layer.hook(layer.keys), layer.base(layer.keys)
        naive = plain + layer.keys @ layer.dense.to(dtype).T
    assert got.dtype == dtype
    assert torch.equal(layer.hook.read(layer.keys).is_open, layer.hot)
    assert torch.equal(got[~layer.hot], plain[~layer.hot])
    exact = layer.expected(layer.hot)
    assert_as_good_as_torch(got[layer.hot], naive[layer.hot], exact[layer.hot])


@pytest.mark.parametrize("gate", GATES)
def test_off_is_the_base_bit_for_bit(gate: str) -> None:
    layer = make_layer(gate)
    layer.hook.state = HookState.OFF
    assert torch.equal(layer.hook(layer.keys), layer.base(layer.keys))


@pytest.mark.parametrize("chosen", [False, True], ids=["all", "chosen"])
@pytest.mark.parametrize("gate", GATES)
def test_temporary_corrects_what_it_is_told_to(gate: str, chosen: bool) -> None:
    layer = make_layer(gate)
    layer.hook.state = HookState.TEMPORARY
    is_open = torch.ones_like(layer.hot)
    if chosen:
        is_open = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) % 3 == 0
        layer.hook.open_at = is_open
    with torch.no_grad():
        got, plain = layer.hook(layer.keys), layer.base(layer.keys)
        flat = layer.hook(layer.keys.flatten(0, 1))
    naive = plain + layer.keys @ layer.dense.float().T
    exact = layer.expected(is_open)
    assert torch.equal(got[~is_open], plain[~is_open])
    assert_as_good_as_torch(got[is_open], naive[is_open], exact[is_open])
    torch.testing.assert_close(flat.reshape(got.shape), got)


@pytest.mark.parametrize("gate", GATES)
def test_without_edits_nothing_is_added(gate: str) -> None:
    layer = make_layer(gate)
    empty = Delta(torch.zeros(0, D_IN), torch.zeros(D_OUT, 0))
    hook = HookLinear(layer.base, empty, layer.hook.gate)
    for state in HookState:
        hook.state = state
        assert torch.equal(hook(layer.keys), layer.base(layer.keys))


@pytest.mark.parametrize("gate", GATES)
def test_factored_and_dense_read_the_same(gate: str) -> None:
    factored, dense = (make_layer(gate, form).hook.read(make_layer().keys) for form in FORMS)
    torch.testing.assert_close(factored.score, dense.score)
    torch.testing.assert_close(factored.z, dense.z)
    assert torch.equal(factored.is_open, dense.is_open)
    assert torch.equal(factored.edit, dense.edit)


def test_keyed_gate_names_the_edit() -> None:
    layer = make_layer("keyed")
    reading = layer.hook.read(layer.keys)
    assert [int(reading.edit[at]) for at in HOT] == [10, 11]
    gate = layer.hook.gate
    assert isinstance(gate, KeyedGate)
    gate.enabled[0] = False
    is_open = layer.hook.read(layer.keys).is_open
    assert [bool(is_open[at]) for at in HOT] == [False, True]
    gate.enabled[1] = False
    reading = layer.hook.read(layer.keys)
    assert not reading.is_open.any()
    assert (reading.edit == -1).all()


@pytest.mark.parametrize(
    "shape",
    [(), (18,), (1, 18), (3, 6), (3, 2, 3), (1, 3, 1, 6)],
    ids=lambda shape: "x".join(map(str, shape)) or "vector",
)
@pytest.mark.parametrize("gate", PER_TOKEN)
def test_any_leading_shape(gate: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(gate)
    with torch.no_grad():
        whole = layer.hook(layer.keys).reshape(-1, D_OUT)
        flat = layer.keys.reshape(-1, D_IN)
        keys = flat.reshape(*shape, D_IN) if shape else flat[HOT[0][1]]
        got = layer.hook(keys)
    assert got.shape == (*shape, D_OUT)
    want = whole.reshape(got.shape) if shape else whole[HOT[0][1]]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("state", list(HookState))
@pytest.mark.parametrize("shape", [(0,), (0, 5), (2, 0)], ids=["0", "0x5", "2x0"])
@pytest.mark.parametrize("gate", GATES)
def test_empty_batch(gate: str, shape: tuple[int, ...], state: HookState) -> None:
    layer = make_layer(gate)
    layer.hook.state = state
    assert layer.hook(torch.zeros(*shape, D_IN)).shape == (*shape, D_OUT)


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

    @pytest.mark.parametrize("gate", GATES)
    def test_scores_stay_float32(self, gate: str) -> None:
        """A threshold means what it was measured to mean only if scores keep their precision."""
        layer = make_layer(gate)
        with torch.autocast("cpu", torch.bfloat16):
            reading = layer.hook.read(layer.keys)
        assert reading.score.dtype == torch.float32
        assert reading.z.dtype == torch.float32
        assert torch.equal(reading.is_open, layer.hot)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_threshold_keeps_its_precision_in_any_dtype(gate: str, dtype: torch.dtype) -> None:
    layer = make_layer(gate)
    before = {name: getattr(layer.hook.gate, name).clone() for name in ("mean", "std", "alpha")}
    layer.hook.to(dtype)
    for name, value in before.items():
        after = getattr(layer.hook.gate, name)
        assert after.dtype == torch.float32
        assert torch.equal(after, value)
    assert layer.hook.down.dtype == dtype
    assert layer.base.weight.dtype == dtype


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


def same(left: Any, right: Any) -> bool:
    """Equal entries of a state dict; a packed quantised weight is a pair of tensors."""
    if isinstance(left, tuple):
        return all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Tensor) and left.is_quantized:
        return torch.equal(left.dequantize(), right.dequantize())
    return torch.equal(left, right) if isinstance(left, Tensor) else bool(left == right)


class TestQuantisedBase:
    @pytest.mark.parametrize("base", ["int8", "torch-int8"])
    @pytest.mark.parametrize("gate", GATES)
    def test_own_forward_plus_the_correction(self, gate: str, base: str) -> None:
        layer = make_layer(gate)
        module = quantised(base)
        hook = HookLinear(module, layer.hook.delta, layer.hook.gate)
        with torch.no_grad():
            got, plain = hook(layer.keys), module(layer.keys)
            naive = plain + layer.keys @ layer.dense.float().T
        assert torch.equal(got[~layer.hot], plain[~layer.hot])
        exact = plain.double() + layer.keys.double() @ layer.dense.T
        assert_as_good_as_torch(got[layer.hot], naive[layer.hot], exact[layer.hot])

    @pytest.mark.parametrize("name", ["weight", "qweight"])
    def test_attach_to_a_quantised_copy(self, name: str) -> None:
        """Quantised modules do not agree on what their weight is called."""
        model = tiny_model("llama")
        hooks = hook_set(model)
        projection = model.get_submodule("model.layers.1.mlp.down_proj")
        assert isinstance(projection, nn.Linear)
        module = Int8Linear(projection, name)
        model.set_submodule("model.layers.1.mlp.down_proj", module)
        ids = torch.arange(3, 12)[None]
        with torch.no_grad():
            plain = model(ids).logits
            with hooks.attached(model, check=False):
                for hook in hooks.modules(model).values():
                    hook.state = HookState.TEMPORARY
                assert not torch.equal(model(ids).logits, plain)
            assert torch.equal(model(ids).logits, plain)


def hook_set(model: Any) -> HookSet:
    """Hooks on layer 1 of a tiny Llama, with one random edit."""
    weight = model.get_submodule("model.layers.1.mlp.down_proj").weight
    d_out, d_in = weight.shape
    factors = LayerFactors(
        residuals=torch.randn(1, d_out),
        solutions=torch.randn(1, d_in),
        keys=torch.randn(1, d_in),
        fingerprints=nn.functional.normalize(torch.randn(1, SKETCH), dim=-1),
        owner=torch.zeros(1, dtype=torch.long),
    )
    record = EditRecord(0, EditRequest("{} is in", "Paris", "Italy"))
    base = BaseModel(
        "tiny", weight_checksums([weight]), "model.layers.{}.mlp.down_proj", {1: (d_in, d_out)}
    )
    sketch = torch.randn(SKETCH, d_in), torch.zeros(SKETCH)
    batch = Batch([record], {1: factors}, {1: Threshold(alpha=0.5)})
    return HookSet(base, EditConfig(layers=(1,)), {1: sketch}, Journal([batch]))


FEW = settings(max_examples=25)
SEEDS = st.integers(0, 2**16)


def random_gate(name: str, rng: torch.Generator, alpha: float) -> Gate:
    threshold = Threshold(mean=0.2, std=0.3, alpha=alpha)
    if name == "calibrated":
        return CalibratedGate(threshold)
    fingerprints = nn.functional.normalize(torch.randn(6, SKETCH, generator=rng), dim=-1)
    return KeyedGate(
        threshold,
        torch.randn(SKETCH, D_IN, generator=rng),
        torch.randn(SKETCH, generator=rng),
        fingerprints,
        torch.arange(6),
        torch.rand(6, generator=rng) < 0.7,
    )


class TestPerTokenGates:
    @FEW
    @given(seed=SEEDS, extra=st.integers(0, 30), scale=st.sampled_from([0.0, 1.0, 1e4]))
    @pytest.mark.parametrize("name", PER_TOKEN)
    def test_reading_does_not_depend_on_company(
        self, name: str, seed: int, extra: int, scale: float
    ) -> None:
        """Padding, order and batch mates are other tokens in other places, no more."""
        rng = torch.Generator().manual_seed(seed)
        gate = random_gate(name, rng, alpha=1.0)
        delta = torch.randn(RANK, D_IN, generator=rng)
        keys = torch.randn(7, D_IN, generator=rng)
        mates = scale * torch.randn(extra, D_IN, generator=rng)
        order = torch.randperm(7 + extra, generator=rng)
        crowd = torch.cat([keys, mates])[order]
        among = gate(crowd, crowd @ delta.T)
        alone = gate(keys, keys @ delta.T)
        places = torch.argsort(order)[:7]
        # A product may sum in another order in another shape.
        torch.testing.assert_close(among.z[places], alone.z, rtol=1e-5, atol=1e-5)
        clear = (alone.z - 1.0).abs() > 1e-4
        assert torch.equal(among.is_open[places][clear], alone.is_open[clear])

    @FEW
    @given(seed=SEEDS, low=st.floats(-3, 3, width=32), step=st.floats(0, 3, width=32))
    @pytest.mark.parametrize("name", PER_TOKEN)
    def test_higher_alpha_opens_no_more(
        self, name: str, seed: int, low: float, step: float
    ) -> None:
        keys = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(seed))
        projected = keys[:, :RANK]
        lower, higher = (
            random_gate(name, torch.Generator().manual_seed(seed), alpha)(keys, projected).is_open
            for alpha in (low, low + step)
        )
        assert not (higher & ~lower).any()


class TestThreshold:
    @FEW
    @given(
        seed=SEEDS,
        n=st.integers(2, 400),
        rate=st.sampled_from([1e-4, 1e-3, 1e-2, 0.2]),
        scale=st.sampled_from([1e-3, 1.0, 1e4]),
        digits=st.sampled_from([0, 1, 6]),
    )
    def test_no_more_of_the_background_fires_than_allowed(
        self, seed: int, n: int, rate: float, scale: float, digits: int
    ) -> None:
        """Through the gate, in float32, with ties."""
        rng = torch.Generator().manual_seed(seed)
        scores = scale * torch.randn(n, generator=rng).abs().round(decimals=digits)
        threshold = Threshold.above(scores, rate)
        gate = CalibratedGate(threshold)
        fired = gate(scores[:, None], scores[:, None]).is_open
        assert int(fired.sum()) <= int(rate * n)
        ceiling = scores.sort(descending=True).values[int(rate * n)]
        clear = ceiling * 1.01 + 0.01 * scale
        assert gate(clear[None, None], clear[None, None]).is_open

    def test_alpha_never_falls_below_its_floor(self) -> None:
        scores = torch.linspace(0, 1, 1000)
        assert Threshold.above(scores, 1e-3).alpha < 5
        assert Threshold.above(scores, 1e-3, least=5.0).alpha == 5.0


@st.composite
def sequences(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    """Norms of a few sequences, and how much wider than the longest the rectangle is."""
    norms = st.floats(0, 100, width=32)
    rows = draw(st.lists(st.lists(norms, min_size=1, max_size=12), min_size=1, max_size=4))
    return rows, draw(st.integers(0, 5))


def read_sequences(
    rows: list[list[float]], width: int, *, left: bool, alpha: float, filler: float
) -> list[tuple[Tensor, Tensor]]:
    """z-scores and decisions of the real tokens of each row, padded to `width`."""
    norms = torch.full((len(rows), width), filler)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    places = [slice(width - len(r), width) if left else slice(0, len(r)) for r in rows]
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        norms[i, place], mask[i, place] = torch.tensor(row), 1
    context = SequenceMask()
    context(nn.Identity(), (), {"attention_mask": mask})
    gate = SequenceGate(Threshold(alpha=alpha), context)
    reading = gate(norms[..., None], norms[..., None])
    return [(reading.z[i, p], reading.is_open[i, p]) for i, p in enumerate(places)]


def has_z(norms: Any) -> bool:
    """Whether their deviations are more than rounding, and their squares more than subnormal."""
    single = np.finfo(np.float32)
    spread = np.ptp(norms)
    return bool(spread >= 1e-3 * norms.max() and spread**2 >= single.tiny)


def z_error(norms: Any) -> Any:
    """How far z-scores may be from exact: of `n` norms, the mean is within `n ε` of the largest.

    That moves every deviation alike and hardly their squares, whose sum is within `n ε` of itself,
    and within as much again for what the smaller of them lose as subnormal numbers; the root halves
    both. The steps around it round as well.
    """
    n, epsilon = len(norms), np.finfo(np.float32).eps
    deviation = norms.std(ddof=1)
    z = np.abs(norms - norms.mean()) / deviation
    return epsilon * (n * norms.max() / deviation + (n + 4) * z)


class TestSequenceGate:
    @FEW
    @given(case=sequences(), left=st.booleans())
    def test_equals_the_papers_formula(
        self, case: tuple[list[list[float]], int], left: bool
    ) -> None:
        rows, slack = case
        width = max(map(len, rows)) + slack
        for row, (z, _) in zip(
            rows, read_sequences(rows, width, left=left, alpha=1.0, filler=7.0), strict=True
        ):
            exact = np.array(row, dtype=np.float64)
            if len(row) < 2 or not has_z(exact):
                continue
            want = (exact - exact.mean()) / exact.std(ddof=1)
            assert (np.abs(z.numpy() - want) <= z_error(exact)).all()

    @FEW
    @given(case=sequences(), left=st.booleans())
    def test_padding_changes_nothing(self, case: tuple[list[list[float]], int], left: bool) -> None:
        rows, slack = case
        width = max(map(len, rows)) + slack
        plain = read_sequences(rows, width, left=left, alpha=0.5, filler=0.0)
        for filler in (1e6, math.inf, math.nan):
            other = read_sequences(rows, width, left=left, alpha=0.5, filler=filler)
            for (z, is_open), (z_other, open_other) in zip(plain, other, strict=True):
                assert torch.equal(z.nan_to_num(), z_other.nan_to_num())
                assert torch.equal(is_open, open_other)

    @FEW
    @given(row=st.lists(st.floats(0, 1e4, width=32), min_size=2, max_size=40))
    def test_z_is_at_most_n_minus_1_over_root_n(self, row: list[float]) -> None:
        n = len(row)
        [(z, _)] = read_sequences([row], n, left=False, alpha=0.0, filler=0.0)
        exact = np.array(row, dtype=np.float64)
        if has_z(exact):
            assert z.max().item() <= (n - 1) / math.sqrt(n) + z_error(exact).max()

    @pytest.mark.parametrize("norm", [0.0, 1.0, 1e6])
    @pytest.mark.parametrize("alpha", [-math.inf, -1.0, 0.0, 2.2])
    def test_a_single_token_never_fires(self, alpha: float, norm: float) -> None:
        [(_, is_open)] = read_sequences([[norm]], 3, left=True, alpha=alpha, filler=0.0)
        assert not is_open.any()

    def test_keeps_rows_apart_where_the_batch_is_flattened(self) -> None:
        norms = torch.tensor([[9.0, 1.0, 2.0, 1.0], [100.0, 400.0, 100.0, 100.0]])
        context = SequenceMask()
        context(nn.Identity(), (), {"attention_mask": torch.ones(2, 4)})
        gate = SequenceGate(Threshold(alpha=1.0), context)
        square, flat = norms[..., None], norms.reshape(-1, 1)
        assert torch.equal(gate(flat, flat).z.reshape(2, 4), gate(square, square).z)

    def test_cached_pass_uses_the_last_columns_of_its_mask(self) -> None:
        norms = torch.tensor([[1.0, 5.0, 2.0], [4.0, 1.0, 1.0]])
        context = SequenceMask()
        mask = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
        context(nn.Identity(), (), {"attention_mask": mask})
        gate = SequenceGate(Threshold(alpha=1.0), context)
        reading = gate(norms[..., None], norms[..., None])
        want = (norms - norms.mean(1, keepdim=True)) / norms.std(1, keepdim=True)
        torch.testing.assert_close(reading.z, want)
