"""Launches that go past Triton's own preparation take the variant that Triton would have taken."""

from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from coachhook_kernels.launch import prepared


class Matrix(NamedTuple):
    pointer: object
    stride: object


def added(p_output, left, right, p_bias, n_rows, size, BLOCK: tl.constexpr):
    """A kernel's parameters; what it would compute does not matter."""


def arguments(**changed):
    found = {
        "left": Matrix(torch.zeros(32), 8),
        "right": Matrix(torch.zeros(32), 1),
        "p_output": torch.zeros(32),
        "p_bias": None,
        "n_rows": 3,
        "size": 48,
        "BLOCK": 16,
        "num_warps": 4,
    }
    assert changed.keys() <= found.keys()
    return found | changed


class Compiled:
    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *given: self.launches.append((grid, given))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(prepared, "_variants", {})
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    return JITFunction(added, do_not_specialize=["n_rows"])


@pytest.fixture
def compiled(monkeypatch):
    """The kernels that Triton was asked for, in order."""
    found = []

    def run(*_, **__):
        found.append(Compiled())
        return found[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    return found


def test_the_second_launch_passes_addresses_in_the_order_of_the_parameters(kernel, compiled):
    given = arguments()
    prepared.launch(kernel, (5,), **given)
    prepared.launch(kernel, (7, 2), **arguments(**given | {"n_rows": 4}))
    (one,) = compiled
    addresses = [given["p_output"].data_ptr(), given["left"].pointer.data_ptr()]
    right = given["right"].pointer.data_ptr()
    assert one.launches == [
        ((7, 2, 1, 1), (addresses[0], (addresses[1], 8), (right, 1), None, 4, 48, 16))
    ]


SLICED = torch.zeros(33)[1:]


@pytest.mark.parametrize(
    "changed",
    [
        {"p_output": torch.zeros(32, dtype=torch.bfloat16)},
        {"p_output": SLICED},
        {"left": Matrix(SLICED, 8)},
        {"left": Matrix(torch.zeros(32), 16)},
        {"left": Matrix(None, 8)},
        {"p_bias": torch.zeros(32)},
        {"n_rows": 2**31},
        {"size": 1},
        {"size": 2**40},
        {"BLOCK": 32},
        {"num_warps": 8},
        # The same values in another order.
        {"size": 16, "BLOCK": 48},
    ],
)
def test_what_triton_compiles_in_makes_a_variant_of_its_own(kernel, compiled, changed):
    prepared.launch(kernel, (1,), **arguments())
    prepared.launch(kernel, (1,), **arguments(**changed))
    assert len(compiled) == 2


def test_on_an_amd_gpu_a_tensor_in_large_memory_makes_a_variant_of_its_own(
    kernel: Any, compiled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "POINTER_RANGE", True)
    storage = SimpleNamespace(nbytes=lambda: 2**31)
    prepared.launch(kernel, (1,), **arguments())
    with mock.patch.object(torch.Tensor, "untyped_storage", return_value=storage):
        prepared.launch(kernel, (1,), **arguments())
    assert len(compiled) == 2


def test_another_device_makes_a_variant_of_its_own(kernel, compiled, monkeypatch):
    prepared.launch(kernel, (1,), **arguments())
    monkeypatch.setattr(triton.runtime.driver._active, "get_current_device", lambda: 1)
    prepared.launch(kernel, (1,), **arguments())
    assert len(compiled) == 2


def test_variants_do_not_pile_up(kernel, compiled, monkeypatch):
    monkeypatch.setattr(prepared, "MOST", 4)
    for size in range(2, 12):
        prepared.launch(kernel, (1,), **arguments(size=size))
    assert len(compiled) == 10
    assert len(prepared._variants) <= 4


tensors = st.sampled_from(
    [SLICED, torch.zeros(32), torch.zeros(32, dtype=torch.float16), torch.zeros(4)[2:], None]
)
integers = st.one_of(st.integers(0, 100), st.sampled_from([2**31 - 1, 2**31, 2**40]))
changes = st.fixed_dictionaries(
    {},
    optional={
        "p_output": tensors,
        "p_bias": tensors,
        "left": st.builds(Matrix, tensors, integers),
        "n_rows": integers,
        "size": integers,
        "BLOCK": st.sampled_from([16, 32]),
    },
)


@settings(max_examples=300, deadline=None)
@given(changes, changes)
def test_no_two_variants_of_triton_share_a_key(one, other):
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)
    )
    kernel = JITFunction(added, do_not_specialize=["n_rows"])
    with (
        mock.patch.object(triton.runtime.driver, "_active", driver),
        mock.patch.object(prepared, "_variants", {}),
        mock.patch.object(JITFunction, "run", return_value=Compiled()),
    ):
        binder = kernel.device_caches[0][-1]
        wanted = set()
        for changed in (one, other):
            prepared.launch(kernel, (1,), **arguments(**changed))
            wanted.add(str(binder(**arguments(**changed))[1:]))
        assert len(prepared._variants) >= len(wanted)
