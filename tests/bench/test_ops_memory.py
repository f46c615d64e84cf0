"""The memory readout as it is measured: what its check refuses, what counts, what is searched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.first_contact.phases import is_early
from bench.harness.script import WrongResultError
from bench.ops import memory, tune
from bench.ops.cases import Case, all_cases
from bench.ops.interpreted import interpreted
from bench.ops.lines import key_of

CPU = torch.device("cpu")
TOKENS, N_OPEN = 48, 3


@pytest.fixture
def made() -> memory.Memory:
    torch.manual_seed(0)
    return memory.random_memory(512, TOKENS, 20, n_open=N_OPEN)


def gate_but(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    op = memory.memory_gate
    return lambda *given: change(*(part.clone() for part in op(*given)))


def test_what_is_right_passes_in_every_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        memory.check_memory(memory.random_memory(512, TOKENS, 20, n_open=N_OPEN, dtype=dtype))


def test_open_tokens_are_spread(made: memory.Memory) -> None:
    assert made.opened().tolist() == [0, 16, 32]
    score, entry = memory.memory_gate(made.keys, made.gate)
    assert (score >= made.gate.threshold).nonzero().flatten().tolist() == [0, 16, 32]
    # Fingerprints 0, 1 and 2 are those of the first entry.
    assert entry[made.opened()].tolist() == [0, 0, 0]


def opened_another(score: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    score[1], score[0] = 0.9, 0.1
    return score, entry


def scored_too_high(score: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    score[5] += 1e-3
    return score, entry


def opened_for_another(score: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    entry[16] = 7
    return score, entry


def named_another_nearest(score: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    entry[5] = (entry[5] + 1) % 20
    return score, entry


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (opened_another, "not the 3 right ones"),
        (scored_too_high, "memory_gate is off by"),
        (opened_for_another, "entries that are not theirs"),
        (named_another_nearest, "too low"),
    ],
)
def test_a_wrong_gate_is_refused(
    monkeypatch: pytest.MonkeyPatch, made: memory.Memory, change: Any, told: str
) -> None:
    monkeypatch.setattr(memory, "memory_gate", gate_but(change))
    with pytest.raises(WrongResultError, match=told):
        memory.check_memory(made)


@pytest.mark.parametrize(
    ("token", "told"), [(0, "memory_add_ is off by"), (1, "changed closed tokens")]
)
def test_a_wrong_addition_is_refused(
    monkeypatch: pytest.MonkeyPatch, made: memory.Memory, token: int, told: str
) -> None:
    op = memory.memory_add_

    def nudged(*given: Any) -> Tensor:
        output: Tensor = op(*given)
        # Of a closed token less than any rounding that an open one is allowed.
        output[token, 0] += 1e-3 if token == 0 else 1e-6
        return output

    monkeypatch.setattr(memory, "memory_add_", nudged)
    with pytest.raises(WrongResultError, match=told):
        memory.check_memory(made)


def test_bytes_and_operations() -> None:
    # By hand, at d 8, two tokens, one entry of three fingerprints: keys, F, offset, fingerprints;
    # three flags; score, entry and owner.
    gate = Case("one", memory.GATE, 8, 64, 2, edits=1)
    assert gate.work == (2 * (2 * 8 + 64 * 8 + 64 + 3 * 64) + 3 + 2 * 20, 2 * 2 * 64 * (8 + 3))
    closed, one = (Case("one", memory.ADD, 8, 8, 2, n_open=n) for n in (0, 1))
    assert closed.work == (2 * 12, 0)
    assert one.work == (2 * 12 + 3 * 2 * 8, 8)
    layer = Case("one", memory.LAYER, 8, 32, 2, edits=1)
    ffn = (2 * (3 * 8 * 32 + 2 * 2 * 8), 6 * 2 * 8 * 32)
    assert layer.baseline_work == ffn
    assert layer.work == tuple(map(sum, zip(ffn, gate.work, closed.work, strict=True)))
    assert gate.baseline_work == gate.work


def test_the_sketch_is_searched_in_the_gate_alone() -> None:
    layer = Case("layer", memory.LAYER, 128, 32, 2, edits=3)
    with torch.inference_mode(), interpreted():
        [problem] = tune.problems_of(layer, CPU)
        assert tune.problems_of(Case("add", memory.ADD, 128, 128, 2), CPU) == []
    assert problem.kernel == "memory_sketch_16bit"
    assert problem.described == (("d", 128), ("rows", 2))
    assert problem.case.op == memory.GATE


def test_the_first_contact_sees_some_of_each_and_few_in_all() -> None:
    cases = list(all_cases())
    assert len({key_of(case) for case in cases}) == len(cases)
    early = [case for case in cases if is_early(case)]
    of_memory = [case for case in early if case.op in memory.OPERATIONS]
    assert {case.op for case in of_memory} == set(memory.OPERATIONS)
    assert len(of_memory) < len(early) / 8
    assert {case.n_open > 0 for case in of_memory if case.op == memory.ADD} == {True, False}
