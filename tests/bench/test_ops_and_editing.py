"""The benchmark scripts: what they print, when they stop, and that their checks can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script as `make bench` runs it, on the packages that this test imports, without a GPU."""
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def called(script: Any, *arguments: str) -> Result:
    """A script's command in this process: another one takes seconds to start."""
    app = typer.Typer()
    app.command()(script.main)
    return CliRunner().invoke(app, arguments)


def test_update_prints_how_fast_and_how_accurate_it_is(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    bench("bench.editing.update").main(
        d_in=130, keys=7, rounds=2, accuracy_d_in=60, batches=5, threads=None, json_to="-"
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["d_in"], result["keys"], result["rounds"]) == (130, 7, 2)
    assert result["update_speedup"] > 0
    assert 0 < result["difference"] <= 1e-9
    assert 0 < result["update_error"] <= 1e-9
    assert result["update_error"] < result["update_error_float32"] <= 1e-2


def test_update_is_not_timed_when_it_is_wrong(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = bench("bench.editing.update")
    right = script.RecursiveInverse.solve
    monkeypatch.setattr(script.RecursiveInverse, "solve", lambda *a, **k: 1.001 * right(*a, **k))
    with pytest.raises(
        bench("bench.ops.layers").WrongResultError, match="differs from the direct solve"
    ):
        script.measure(d_in=50, n_keys=3, rounds=1, accuracy_d_in=20, batches=1)


@pytest.mark.parametrize(
    ("gate", "form"), [("keyed", ["--dense"]), ("calibrated", ["--factored", "--rank", "8"])]
)
def test_inference_prints_its_measurements(
    bench: Any, monkeypatch: pytest.MonkeyPatch, gate: str, form: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = ["--gate", gate, *form, "--edits", "50", "--rounds", "2", "--tokens", "4"]
    done = called(bench("bench.inference.__main__"), "--shape", "tiny", *settings, "--json", "-")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["model"] == "tiny"
    assert result["threads"] == torch.get_num_threads()
    assert result["hook_bytes"] > 0
    cases = [(row["case"], row["batch"], row["pairs"]) for row in result["rows"]]
    assert cases == [
        ("first token after 4", 1, 2),
        ("first token after 8", 1, 2),
        ("decode after 8", 1, 4),
        ("decode after 8", 4, 4),
    ]
    for row in result["rows"]:
        assert row["unhooked_ms"] > 0
        assert row["hooked_ms"] > 0
        assert row["ratio"] > 0
    decode = result["rows"][-1]
    assert decode["same_tokens_checked"] == 8
    assert decode["hooked_gb_s"] > 0


def test_inference_stops_on_a_wrong_result(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inference, shapes, gates = (
        bench("bench.inference.__main__"),
        bench("bench.inference.shapes"),
        bench("coachhook.hooks.gates"),
    )

    def always_open(*arguments: Any) -> Any:
        return bench("bench.ops.layers").random_gate(
            *arguments, gates.Threshold(alpha=float("-inf"))
        )

    monkeypatch.setattr(shapes, "random_gate", always_open)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = called(inference, "--shape", "tiny", "--edits", "5", "--rounds", "1")
    assert done.exit_code == 1
    assert "nothing timed" in done.output


def test_ops_needs_a_gpu() -> None:
    done = run("bench.ops.table")
    assert done.returncode == 2
    assert "no GPU" in done.stderr
    assert done.stdout == ""


OPS = ("hook_linear", "hook_correction_", "hook_linear_sequence", "key_covariance_")


@pytest.mark.parametrize("op", OPS)
def test_a_case_is_checked_timed_and_judged(
    bench: Any, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    cases, ops = bench("bench.ops.cases"), bench("bench.ops.table")
    monkeypatch.setattr(ops, "ROTATED_BYTES", 0)
    monkeypatch.setattr(cases, "compiled", lambda: cases.published)
    cpu = torch.device("cpu")
    faster = 0.0 if op == "hook_linear_sequence" else None
    case = cases.Case("tiny", op, 40, 24, 130, must=1e9, faster=faster, dtype=torch.float32)
    with torch.inference_mode():
        lines = ops.rows_of(case, ops.measure(case, cpu, rounds=3), 1e9, 1e9)
    assert {line["contender"] for line in lines} >= {case.baseline}
    (own,) = [line for line in lines if "verdict" in line]
    assert "reached" in own["verdict"]
    assert "MISSED" not in own["verdict"]
    assert own["microseconds"] > 0
    (baseline,) = [line for line in lines if line["contender"] == case.baseline]
    assert baseline["ratio"] == 1.0
    ops.table_of({"device": "cpu", "copy_gb_s": 1, "matmul_tflop_s": 1, "rows": lines})


def test_a_missed_promise_is_said(bench: Any) -> None:
    cases, ops, timing = (
        bench("bench.ops.cases"),
        bench("bench.ops.table"),
        bench("bench.harness.timing"),
    )
    case = cases.Case("tiny", "hook_linear", 40, 24, 1, must=1.1, aim=1.05, share=0.8)
    timings = {"F.linear": timing.Timings([1.0, 2.0]), "hook_linear": timing.Timings([1.2, 2.4])}
    _, own = ops.rows_of(case, timings, bandwidth=case.bytes_moved / 1.8, rate=1e18)
    assert own["ratio"] == pytest.approx(1.2)
    assert own["floor_ratio"] == pytest.approx(1.0)
    assert own["verdict"] == "×1.10 MISSED; 80% of copy reached"


@pytest.mark.parametrize("gate", ["keyed", "calibrated"])
@pytest.mark.parametrize("rank", [None, 6])
def test_the_check_of_a_layer_passes_and_fails(
    bench: Any, monkeypatch: pytest.MonkeyPatch, gate: str, rank: int | None
) -> None:
    layers = bench("bench.ops.layers")
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


def test_a_sequence_that_opens_other_tokens_is_refused(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = bench("bench.ops.cases")
    op = cases.hook_linear_sequence

    def flipped(*arguments: Any) -> Any:
        output, score, z = op(*arguments)
        return output, score, -z

    monkeypatch.setattr(cases, "hook_linear_sequence", flipped)
    case = cases.Case("tiny", "hook_linear_sequence", 40, 24, 130, dtype=torch.float32)
    with pytest.raises(cases.WrongResultError, match="opened other tokens"):
        cases.contenders(case, torch.device("cpu"), check=True)


def test_tuning_keeps_the_default_unless_a_candidate_beats_it(bench: Any) -> None:
    tune = bench("bench.ops.tune")
    candidates = tune.grid(BN=(16, 32), num_warps=(4,))
    problem = tune.Problem("kernel", {"d_in": 1}, (), candidates)

    def measured(config: dict[str, int] | None) -> float:
        return 2.0 if config is None else {16: 3.0, 32: 1.0}[config["BN"]]

    assert tune.best(problem, measured) == (candidates[1], 0.5)
    assert tune.best(problem, lambda config: 2.0) == (None, 1.0)


def test_a_forced_configuration_is_what_a_lookup_finds(bench: Any) -> None:
    from coachhook_kernels.launch.tuning import lookup

    tune = bench("bench.ops.tune")
    default = {"BN": 1}
    with tune.forced("one", {"BN": 64}):
        assert lookup("one", torch.device("cpu"), default, d_in=8) == {"BN": 64}
        assert lookup("other", torch.device("cpu"), default, d_in=8) == default
    assert lookup("one", torch.device("cpu"), default, d_in=8) == default


def test_contenders_take_turns(bench: Any) -> None:
    timing = bench("bench.harness.timing")
    called: list[str] = []
    steps = {name: (lambda name=name: called.append(name)) for name in "abc"}
    prepared: list[str] = []
    timings = timing.take_turns(steps, 3, torch.device("cpu"), prepared.append)
    assert called == list("abcbcacab")
    assert prepared == called
    assert all(len(found.seconds) == 3 for found in timings.values())


def test_a_ratio_is_the_median_within_rounds(bench: Any) -> None:
    timing = bench("bench.harness.timing")
    # The machine slows tenfold after the first round: medians of each would say 5.5 times.
    fast, slow = timing.Timings([1.0, 10.0, 10.0]), timing.Timings([2.0, 20.0, 40.0])
    assert slow.over(fast) == (2.0, 1.0)
    assert (slow.median, slow.best) == (20.0, 2.0)
    assert slow.spread == pytest.approx(19 / 20)


def test_the_published_forms_agree(bench: Any) -> None:
    published = bench("bench.ops.published")
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


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model with its tokenizer, and four facts."""
    place = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    facts = [
        {"prompt": "They all moved to {}", "subject": subject, "target": target}
        for subject, target in zip(("France", "Rome", "Troy", "Peru"), TARGETS, strict=True)
    ]
    (place / "facts.jsonl").write_text("".join(f"{json.dumps(fact)}\n" for fact in facts))
    return place / "model", place / "facts.jsonl"


def test_editing_measures_its_three_parts(
    bench: Any, tiny_folder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    model, facts = map(str, tiny_folder)
    sizes = ["--d-in", "64", "--keys", "8", "--batches", "2", "--accuracy-d-in", "64"]
    few = ["--edits", "2", "--steps", "2", "--rounds", "2"]
    done = called(bench("bench.editing.parts"), facts, "--model", model, *sizes, *few, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["values_speedup"] > 0
    assert result["update_speedup"] > 0
    assert result["statistics_overhead"] > 0
    rows = result["values"]["rows"]
    # The same contexts and every step: only the way of computing differs.
    ours, published = rows["ours, published prefixes, every step"], rows["published"]
    assert ours["loss"] == pytest.approx(published["loss"], rel=1e-3)


def test_a_consecutive_run_goes_on_where_it_stopped(
    bench: Any, tiny_folder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    model, facts = map(str, tiny_folder)
    common = ["--model", model, "--batch-size", "1", "--run", str(tmp_path / "run"), "--json"]
    first = run("bench.editing.consecutive", facts, "--edits", "2", *common)
    assert first.returncode == 0, first.stderr
    script = bench("bench.editing.consecutive")
    # As if it had been killed between saving the second batch and noting it.
    notes = tmp_path / "run" / "batches.jsonl"
    notes.write_text(notes.read_text().splitlines()[0] + "\n")
    second = called(script, facts, "--edits", "4", *common)
    assert second.exit_code == 0, second.output
    batches = json.loads(second.stdout)["batches"]
    assert [bool(batch) for batch in batches] == [True, False, True, True]
    assert batches[0] == json.loads(first.stdout)["batches"][0]
    # Not the batches that the folder holds: these would pass some facts over.
    other = called(script, facts, "--edits", "4", *common, "--batch-size", "2")
    assert other.exit_code == 2
    assert "other facts, batches or gate" in " ".join(other.stderr.split())
