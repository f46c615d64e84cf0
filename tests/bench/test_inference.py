"""Generation with and without edits: what is printed, and when nothing is."""

import json
from typing import Any

import pytest
import torch

from bench.inference import __main__ as inference
from bench.inference import memory, shapes
from bench.ops import layers
from coachhook.hooks import gates
from tests.support.bench import called


@pytest.mark.parametrize(
    ("gate", "form"),
    [("keyed", ["--dense"]), ("calibrated", ["--factored", "--rank", "8"]), ("memory", [])],
)
def test_inference_prints_its_measurements(
    monkeypatch: pytest.MonkeyPatch, gate: str, form: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = ["--gate", gate, *form, "--edits", "50", "--rounds", "2", "--tokens", "4"]
    done = called(inference, "--shape", "tiny", *settings, "--json", "-")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["model"] == "tiny"
    assert result["gate"] == gate
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


def test_inference_stops_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def always_open(*arguments: Any) -> Any:
        return layers.random_gate(*arguments, gates.Threshold(alpha=float("-inf")))

    monkeypatch.setattr(shapes, "random_gate", always_open)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = called(inference, "--shape", "tiny", "--edits", "5", "--rounds", "1")
    assert done.exit_code == 1
    assert "nothing timed" in done.output


@pytest.mark.parametrize("fault", ["always open", "never open"])
def test_a_memory_that_opens_wrongly_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    hook = memory.MemoryHook
    if fault == "always open":
        hold = hook.hold
        monkeypatch.setattr(hook, "hold", lambda self, entries, _: hold(self, entries, -1.0))
    else:
        monkeypatch.setattr(memory.MemoryRows, "add", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = called(inference, "--shape", "tiny", "--gate", "memory", "--edits", "5")
    assert done.exit_code == 1
    assert "nothing timed" in done.output
