"""Gates that read each token alone, and the threshold they share."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from coachhook.hooks.gates import CalibratedGate, Gate, KeyedGate, Threshold
from tests.support.hook_layers import D_IN, GATES, HOT, PER_TOKEN, RANK, SKETCH, make_layer

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
