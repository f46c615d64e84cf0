from pathlib import Path

from tests.support.command_line import run, run_json


def test_eval(edited: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The weather stayed dry in the city, as I was told yesterday. " * 4)
    arguments = ("eval", "tiny", "facts.jsonl", "--hooks", str(edited), "--text", str(text))
    document = run_json(*arguments)
    assert document["n_requests"] == 3
    assert set(document["retention"]) == {"1", "2"}
    shown = run(*arguments)
    for part in ("reliability", "generality", "locality", "perplexity of ordinary text"):
        assert part in shown


def test_eval_without_edits_has_no_numbers_that_json_lacks(edited: Path, tmp_path: Path) -> None:
    run("rollback", str(edited), "--to", "0")
    facts = tmp_path / "bare.csv"
    facts.write_text("prompt,subject,target\nThe capital of France is,France,Lyon\n")
    document = run_json("eval", "tiny", str(facts), "--hooks", str(edited))
    assert document["generality"]["greedy"] is None
    assert document["perplexity_before"] == document["perplexity_after"]
    run("eval", "tiny", str(facts), "--hooks", str(edited))


def test_generate(edited: Path) -> None:
    arguments = ("generate", "tiny", "The capital of France is", "--hooks", str(edited))
    document = run_json(*arguments, "--max-new-tokens", "24")
    assert document["unedited"] != document["edited"]
    assert "unedited" in run(*arguments, "--max-new-tokens", "4")


def test_generate_traced(edited: Path) -> None:
    arguments = ("generate", "tiny", "The capital of France is", "--hooks", str(edited), "--trace")
    document = run_json(*arguments, "--max-new-tokens", "4")
    assert "".join(document["trace"]["tokens"]).startswith("The capital of France is")
    assert document["edits"]["3"] == "The capital of France is → dry"
    shown = run(*arguments, "--max-new-tokens", "4")
    assert "open at layer" in shown
    assert "edit 3: The capital of France is → dry" in shown
