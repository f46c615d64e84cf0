from pathlib import Path

from tests.support.command_line import error_of, run, run_json


def test_statistics() -> None:
    document = run_json("statistics", "tiny", "--layers", "1", "--tokens", "512")
    (layer,) = document["layers"]
    assert (layer["layer"], layer["d_in"], layer["tokens"]) == (1, 64, 512)
    assert layer["mean_key_norm"] ** 2 <= layer["moment_trace"] * 1.01
    assert "first-position" in run("statistics", "tiny", "--layers", "1", "--tokens", "512")


def test_calibrate_for_the_memory_readout_then_edit(tmp_path: Path) -> None:
    file = str(tmp_path / "profile.json")
    command = ("calibrate", "tiny", "--readout", "memory", "--layers", "1,2", "--output", file)
    document = run_json(*command)
    assert (document["readout"], document["profile"]) == ("memory", file)
    assert document["plan"]["needed_bytes"]["cpu"] > 0
    settings = document["settings"]
    assert (settings["gate_block"], settings["write_blocks"]) == (1, [2])
    (gate,) = document["layers"]
    assert {"recall", "neighbours", "ordinary", "need", "reach", "threshold"} <= set(gate)
    assert document["figures"]["paraphrases"] > 500
    shown = run(*command)
    assert f"of {document['figures']['paraphrases']} paraphrases" in shown
    assert f"least threshold {settings['least']:g}" in shown
    hooks = ("--hooks", str(tmp_path / "hooks"), "--batch-size", "2")
    edit = ("edit", "tiny", "facts.jsonl", *hooks, "--profile", file)
    assert "give --readout memory" in error_of(*edit, "--readout", "delta")
    run(*edit)
    told = run_json("inspect", str(tmp_path / "hooks"))
    assert (told["layers"], told["write_blocks"]) == ([1], [2])


def test_calibrate_with_a_readout_that_is_not_known() -> None:
    assert "choose one of delta, memory" in error_of("calibrate", "tiny", "--readout", "x")
