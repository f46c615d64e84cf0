"""Operations on a GPU: what is checked, timed and told."""

from typing import Any

import pytest
import torch

from bench.harness import timing
from bench.ops import cases, layers, published, table, tune
from coachhook_kernels.launch.tuning import lookup
from tests.support.bench import called


def test_ops_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = called(table)
    assert done.exit_code == 2
    assert "no GPU" in done.stderr
    assert done.stdout == ""


OPS = ("hook_linear", "hook_correction_", "hook_linear_sequence", "key_covariance_")


@pytest.mark.parametrize("op", OPS)
def test_a_case_is_checked_timed_and_judged(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(table, "ROTATED_BYTES", 0)
    monkeypatch.setattr(cases, "compiled", lambda: cases.published)
    cpu = torch.device("cpu")
    faster = 0.0 if op == "hook_linear_sequence" else None
    case = cases.Case("tiny", op, 40, 24, 130, must=1e9, faster=faster, dtype=torch.float32)
    with torch.inference_mode():
        lines = table.rows_of(case, table.measure(case, cpu, rounds=3), 1e9, 1e9)
    assert {line["contender"] for line in lines} >= {case.baseline}
    (own,) = [line for line in lines if "verdict" in line]
    assert "reached" in own["verdict"]
    assert "MISSED" not in own["verdict"]
    assert own["microseconds"] > 0
    (baseline,) = [line for line in lines if line["contender"] == case.baseline]
    assert baseline["ratio"] == 1.0
    table.table_of({"device": "cpu", "copy_gb_s": 1, "matmul_tflop_s": 1, "rows": lines})


def test_a_missed_promise_is_said() -> None:
    case = cases.Case("tiny", "hook_linear", 40, 24, 1, must=1.1, aim=1.05, share=0.8)
    timings = {"F.linear": timing.Timings([1.0, 2.0]), "hook_linear": timing.Timings([1.2, 2.4])}
    _, own = table.rows_of(case, timings, bandwidth=case.bytes_moved / 1.8, rate=1e18)
    assert own["ratio"] == pytest.approx(1.2)
    assert own["floor_ratio"] == pytest.approx(1.0)
    assert own["verdict"] == "×1.10 MISSED; 80% of copy reached"


@pytest.mark.parametrize("gate", ["keyed", "calibrated"])
@pytest.mark.parametrize("rank", [None, 6])
def test_the_check_of_a_layer_passes_and_fails(
    monkeypatch: pytest.MonkeyPatch, gate: str, rank: int | None
) -> None:
    torch.manual_seed(0)
    layer = layers.random_layer(512, 32, 20, gate=gate, rank=rank, edits=30, n_open=3)
    layers.check_layer(layer)
    op = layers.hook_linear

    def nudged(*arguments: Any) -> Any:
        output, score, index = op(*arguments)
        output[0, 0] += 1e-3
        return output, score, index

    monkeypatch.setattr(layers, "hook_linear", nudged)
    with pytest.raises(layers.WrongResultError, match="off by"):
        layers.check_layer(layer)
    monkeypatch.setattr(layers, "hook_linear", op)
    with pytest.raises(layers.WrongResultError, match="opened 3 of 20"):
        layers.check_layer(layer._replace(n_open=2))


def test_a_sequence_that_opens_other_tokens_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    op = cases.hook_linear_sequence

    def flipped(*arguments: Any) -> Any:
        output, score, z = op(*arguments)
        return output, score, -z

    monkeypatch.setattr(cases, "hook_linear_sequence", flipped)
    case = cases.Case("tiny", "hook_linear_sequence", 40, 24, 130, dtype=torch.float32)
    with pytest.raises(cases.WrongResultError, match="opened other tokens"):
        cases.contenders(case, torch.device("cpu"), check=True)


def test_tuning_keeps_the_default_unless_a_candidate_beats_it() -> None:
    candidates = tune.grid(BN=(16, 32), num_warps=(4,))
    problem = tune.Problem("kernel", {"d_in": 1}, (), candidates)

    def measured(config: dict[str, int] | None) -> float:
        return 2.0 if config is None else {16: 3.0, 32: 1.0}[config["BN"]]

    assert tune.best(problem, measured) == (candidates[1], 0.5)
    assert tune.best(problem, lambda config: 2.0) == (None, 1.0)


def test_a_forced_configuration_is_what_a_lookup_finds() -> None:

    default = {"BN": 1}
    with tune.forced("one", {"BN": 64}):
        assert lookup("one", torch.device("cpu"), default, d_in=8) == {"BN": 64}
        assert lookup("other", torch.device("cpu"), default, d_in=8) == default
    assert lookup("one", torch.device("cpu"), default, d_in=8) == default


def test_the_published_forms_agree() -> None:
    torch.manual_seed(0)
    keys = torch.randn(2, 50, 16)
    keys[:, ::20] *= 5
    weight, hook_weight, bias = torch.randn(8, 16), torch.randn(8, 16), torch.randn(8)
    one, other = (
        form(keys, weight, hook_weight, bias, 2.2)
        for form in (published.published, published.published_select)
    )
    assert torch.equal(one, other)
    changed = (one != torch.nn.functional.linear(keys, weight, bias)).any(-1)
    assert 0 < int(changed.sum()) < 20
