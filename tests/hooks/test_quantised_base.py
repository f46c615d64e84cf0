"""A hook over a quantised layer: the base's own forward, plus Δ where the gate is open."""

from typing import Any

import pytest
import torch
from torch import nn

from coachhook.config import EditConfig
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import Threshold
from coachhook.hooks.layer import HookLinear, HookState
from coachhook.hookset import HookSet
from coachhook.journal.factors import LayerFactors
from coachhook.journal.journal import Batch, EditRecord, Journal
from coachhook.models.base import BaseModel, weight_checksums
from tests.support.hook_layers import (
    D_IN,
    D_OUT,
    GATES,
    SKETCH,
    assert_as_good_as_torch,
    make_layer,
)
from tests.support.quantised import Int8Linear, quantised
from tests.support.tiny import tiny_model


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
    return HookSet(base, EditConfig(readout="delta", layers=(1,)), {1: sketch}, Journal([batch]))


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

    @pytest.mark.parametrize("known", [True, False])
    def test_a_known_layer_is_corrected_in_place(self, known: bool) -> None:
        class Recording(Int8Linear):
            def forward(self, keys: torch.Tensor) -> torch.Tensor:
                self.given = super().forward(keys)
                return self.given

        Recording.__module__ = "bitsandbytes.nn.modules"
        Recording.__qualname__ = "Linear4bit" if known else "Other"
        layer = make_layer("keyed")
        module = Recording(torch.nn.Linear(D_IN, D_OUT))
        hook = HookLinear(module, layer.hook.delta, layer.hook.gate)
        with torch.no_grad():
            output = hook(layer.keys)
        assert (output.data_ptr() == module.given.data_ptr()) == known

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
