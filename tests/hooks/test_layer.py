"""`HookLinear` against float64 formulas: every state, gate, form of Δ, base, dtype and shape."""

import pytest
import torch

from coachhook.hooks.layer import HookLinear, HookState
from coachhook_kernels import Delta
from tests.support.hook_layers import (
    BASES,
    BATCH,
    D_IN,
    D_OUT,
    DTYPES,
    FORMS,
    GATES,
    HOT,
    LENGTH,
    PER_TOKEN,
    assert_as_good_as_torch,
    make_layer,
)


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
