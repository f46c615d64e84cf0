from tests.support.command_line import run, run_json


def test_statistics() -> None:
    document = run_json("statistics", "tiny", "--layers", "1", "--tokens", "512")
    (layer,) = document["layers"]
    assert (layer["layer"], layer["d_in"], layer["tokens"]) == (1, 64, 512)
    assert layer["mean_key_norm"] ** 2 <= layer["moment_trace"] * 1.01
    assert "first-position" in run("statistics", "tiny", "--layers", "1", "--tokens", "512")
