"""What `hook_linear` and `hook_correction_` say of tensors that do not fit together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook_kernels import (
    Delta,
    KernelInputError,
    TokenGate,
    hook_correction_,
    hook_linear,
)
from tests.support.kernels import (
    BRAIN,
    DEVICE,
    Case,
    Problem,
    base_output,
    make,
)

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

KEYED = make(Case(rank=5, size=9, fingerprints=4))
META = "meta"
EIGHT_BITS = torch.float8_e4m3fn


def with_gate(**parts: Any) -> Problem:
    return KEYED._replace(gate=KEYED.gate._replace(**parts))


def with_delta(down: Tensor | None = None, up: Tensor | None = None) -> Problem:
    delta = KEYED.delta
    assert delta.up is not None
    return KEYED._replace(
        delta=Delta(delta.down if down is None else down, delta.up if up is None else up)
    )


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, device=options.pop("device", DEVICE), **options)


D_IN, D_OUT = KEYED.weight.shape[1], KEYED.weight.shape[0]
BAD_FOR_BOTH = {
    "keys without a dimension": (KEYED._replace(keys=zeros()), r"\(\.\.\., d_in\)"),
    "integer keys": (KEYED._replace(keys=KEYED.keys.long()), "torch.int64.*floats expected"),
    "keys for storage alone": (
        KEYED._replace(keys=KEYED.keys.to(EIGHT_BITS)), "torch.float8_e4m3fn.*floats expected"
    ),
    "complex keys": (KEYED._replace(keys=KEYED.keys + 0j), "torch.complex64.*floats expected"),
    "delta for storage alone": (with_delta(KEYED.delta.down.to(EIGHT_BITS)), "delta.*float8"),
    "fingerprints for storage alone": (
        with_gate(fingerprints=zeros(4, 9).to(EIGHT_BITS)), "fingerprints.*float8"
    ),
    "integer offset": (with_gate(offset=zeros(9, dtype=torch.int64)), "offset is torch.int64"),
    "mean of another dtype": (with_gate(mean=zeros(dtype=BRAIN)), "mean is torch.bfloat16"),
    "down for other keys": (with_delta(zeros(5, 36)), r"delta.down.*\(5, 36\).*\(rank, 37\)"),
    "down of three dimensions": (with_delta(zeros(1, 5, 37)), r"delta.down.*\(rank, 37\)"),
    "down transposed": (with_delta(zeros(37, 5)), r"delta.down.*\(37, 5\).*\(rank, 37\)"),
    "up of another rank": (with_delta(up=zeros(23, 4)), r"delta.up.*\(23, 4\).*\(d_out, 5\)"),
    "up transposed": (with_delta(up=zeros(5, 23)), r"delta.up.*\(5, 23\).*\(d_out, 5\)"),
    "up without a dimension": (with_delta(up=zeros()), r"delta.up.*\(d_out, 5\)"),
    "up for another layer": (with_delta(up=zeros(22, 5)), "delta makes 22 outputs.*has 23"),
    "integer delta": (
        with_delta(zeros(5, D_IN, dtype=torch.int64), zeros(D_OUT, 5, dtype=torch.int64)),
        "delta.*torch.int64",
    ),
    "down elsewhere": (with_delta(zeros(5, D_IN, device=META)), f"down is on meta.*{DEVICE}"),
    "up elsewhere": (with_delta(up=zeros(D_OUT, 5, device=META)), "up is on meta"),
    "projection for other keys": (
        with_gate(projection=zeros(9, 36)), r"projection.*\(9, 36\).*\(s, 37\)"
    ),
    "projection of one dimension": (
        with_gate(projection=zeros(9)), r"projection.*\(9,\).*\(s, 37\)"
    ),
    "projection without a dimension": (
        with_gate(projection=zeros()), r"projection.*\(\).*\(s, 37\)"
    ),
    "integer projection": (
        with_gate(projection=zeros(9, D_IN, dtype=torch.int64)), "projection.*torch.int64"
    ),
    "offset of another size": (with_gate(offset=zeros(8)), r"offset.*\(8,\).*\(9,\)"),
    "fingerprints of another size": (
        with_gate(fingerprints=zeros(4, 8)), r"fingerprints.*\(4, 8\).*\(e, 9\)"
    ),
    "fingerprints without a dimension": (
        with_gate(fingerprints=zeros()), r"fingerprints.*\(\).*\(e, 9\)"
    ),
    "enabled of another length": (
        with_gate(enabled=zeros(3).bool()), r"enabled.*\(3,\).*\(4,\)"
    ),
    "enabled as numbers": (with_gate(enabled=zeros(4)), r"enabled is torch.float32.*bool \(4,\)"),
    "no projection": (with_gate(projection=None), "keyed gate needs projection, offset"),
    "no offset": (with_gate(offset=None), "keyed gate needs projection, offset"),
    "no fingerprints": (with_gate(fingerprints=None), "needs projection, offset, fingerprints"),
    "no enabled": (with_gate(enabled=None), "needs projection, offset, fingerprints and enabled"),
    **{
        f"{name} of one element": (with_gate(**{name: zeros(1)}), "mean, std and alpha are 0-d")
        for name in ("mean", "std", "alpha")
    },
    **{
        f"{name} elsewhere": (
            with_gate(**{name: getattr(KEYED.gate, name).to(META)}),
            f"{name} is on meta, the keys are on {DEVICE}",
        )
        for name in TokenGate._fields
    },
}  # fmt: skip
BAD_FOR_LINEAR = {
    "weight of one dimension": (KEYED._replace(weight=zeros(D_OUT)), r"weight.*\(d_out, 37\)"),
    "weight for other keys": (
        KEYED._replace(weight=zeros(D_OUT, 36)), r"weight.*\(23, 36\).*\(d_out, 37\).*transpose"
    ),
    "weight untransposed": (
        KEYED._replace(weight=KEYED.weight.mT.contiguous()),
        r"weight.*\(37, 23\).*\(d_out, 37\).*Conv1D.*transpose",
    ),
    "weight of another dtype": (
        KEYED._replace(weight=KEYED.weight.to(BRAIN)), "weight is torch.bfloat16.*torch.float32"
    ),
    "weight elsewhere": (KEYED._replace(weight=KEYED.weight.to(META)), "weight is on meta"),
    "bias of another length": (KEYED._replace(bias=zeros(22)), r"bias.*\(22,\).*\(23,\)"),
    "bias of another dtype": (
        KEYED._replace(bias=zeros(D_OUT, dtype=BRAIN)), "bias is torch.bfloat16.*torch.float32"
    ),
    "bias elsewhere": (KEYED._replace(bias=zeros(D_OUT, device=META)), "bias is on meta"),
}  # fmt: skip


class TestBadInput:
    @pytest.mark.parametrize("fault", [*BAD_FOR_BOTH, *BAD_FOR_LINEAR])
    def test_hook_linear(self, fault: str) -> None:
        problem, told = {**BAD_FOR_BOTH, **BAD_FOR_LINEAR}[fault]
        with pytest.raises(KernelInputError, match=told):
            hook_linear(*problem)

    @pytest.mark.parametrize("fault", BAD_FOR_BOTH)
    def test_hook_correction(self, fault: str) -> None:
        problem, told = BAD_FOR_BOTH[fault]
        output = zeros(*problem.keys.shape[:-1], D_OUT)
        with pytest.raises(KernelInputError, match=told):
            hook_correction_(output, problem.keys, problem.delta, problem.gate)

    @pytest.mark.parametrize(
        ("output", "told"),
        [
            (zeros(4, D_OUT), r"output \(4, 23\) and keys \(5, 37\)"),
            (zeros(1, 5, D_OUT), r"output \(1, 5, 23\) and keys \(5, 37\)"),
            (zeros(5, 22), "delta makes 23 outputs.*has 22"),
            (zeros(5, D_OUT, device=META), "output is on meta"),
            (zeros(5, D_OUT, dtype=torch.int64), "output.*torch.int64"),
            (zeros(5, D_OUT).to(EIGHT_BITS), "output.*torch.float8_e4m3fn"),
        ],
        ids=["rows", "dimensions", "width", "device", "dtype", "storage"],
    )
    def test_output(self, output: Tensor, told: str) -> None:
        with pytest.raises(KernelInputError, match=told):
            hook_correction_(output, KEYED.keys, KEYED.delta, KEYED.gate)

    def test_output_without_a_dimension(self) -> None:
        with pytest.raises(KernelInputError, match="output"):
            hook_correction_(zeros(), KEYED.keys[0], KEYED.delta, KEYED.gate)

    def test_an_error_leaves_the_output(self) -> None:
        output = base_output(KEYED)
        before = output.clone()
        bad = with_gate(enabled=zeros(3).bool())
        with pytest.raises(KernelInputError):
            hook_correction_(output, bad.keys, bad.delta, bad.gate)
        assert torch.equal(output, before)


def test_an_output_that_lies_on_top_of_itself() -> None:
    problem = KEYED
    rows = problem.keys.shape[0]
    with pytest.raises(KernelInputError, match="more than once"):
        hook_correction_(
            zeros(1, D_OUT).expand(rows, -1), problem.keys, problem.delta, problem.gate
        )


def test_an_output_that_shares_memory_with_the_keys() -> None:
    rows = KEYED.keys.shape[0]
    both = zeros(rows, D_IN + D_OUT)
    keys, output = both[:, :D_IN], both[:, D_IN - 1 : D_IN - 1 + D_OUT]
    with pytest.raises(KernelInputError, match="share memory"):
        hook_correction_(output, keys, KEYED.delta, KEYED.gate)
