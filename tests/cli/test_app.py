import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import coachhook
from coachhook.cli import views
from coachhook.cli.app import app, parse_layers
from coachhook.editor import Editor
from coachhook.errors import ConfigError
from coachhook.facts.remaining import latest, remaining
from coachhook.facts.request import EditRequest
from coachhook.hookset import HookSet
from coachhook.journal import folder
from tests.support.tiny import tiny_model, tiny_tokenizer

FACTS = [
    ("The capital of France is", "France", "Lyon"),
    ("The language of the city is", "city", "French"),
    ("As I was told, Paris is", "Paris", "large"),
    ("The capital of France is", "France", "dry"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model `tiny`, another `other`, and `facts.jsonl`."""
    place = tmp_path_factory.mktemp("cli")
    for seed, name in enumerate(("tiny", "other")):
        tiny_model("llama", seed=seed).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    write_facts(place / "facts.jsonl", FACTS)
    return place


@pytest.fixture(autouse=True)
def _own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    # What `main` arranges by environment variables comes too late once transformers is imported.
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def _edited(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(place / "cache"))
        patch.chdir(place)
        run("edit", "tiny", "facts.jsonl", "--hooks", "edited", *SMALL)
    return place / "edited"


@pytest.fixture
def edited(_edited: Path, tmp_path: Path) -> Path:
    """A copy of a folder into which `FACTS` were edited, two a batch."""
    return Path(shutil.copytree(_edited, tmp_path / "edited"))


SMALL = ("--layers", "1-2", "--batch-size", "2")


def write_facts(path: Path, facts: list[tuple[str, str, str]]) -> None:
    records = [dict(zip(("prompt", "subject", "target"), fact, strict=True)) for fact in facts]
    for record in records:
        record |= {"paraphrases": [f"Well, {record['prompt']}"]}
        record |= {"locality": [{"prompt": "The weather is", "answer": "dry"}]}
    path.write_text("\n".join(map(json.dumps, records)))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def run(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return str(result.stdout)


def run_json(*arguments: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(run(*arguments, "--json"), parse_constant=refuse)


def error_of(*arguments: str) -> str:
    """The one line on standard error of a command that must fail with exit status 2."""
    result = invoke(*arguments)
    assert result.exit_code == 2, result.exception
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return str(line)


def request(name: str) -> EditRequest:
    """Fact "a" with target "1" from "a1"."""
    return EditRequest(f"The {name[0]} is", name[0], name[1])


def requests(names: str) -> list[EditRequest]:
    return [request(name) for name in names.split()]


@pytest.mark.parametrize(
    ("done", "wanted", "left"),
    [
        ("", "a1 b1", "a1 b1"),
        ("a1 b1", "a1 b1", ""),
        ("a1", "a1 b1 c1", "b1 c1"),
        ("a1 b1", "a1 b1 a2", "a2"),  # corrected later in the file
        ("a1 b1 a2", "a1 b1 a2", ""),
        ("a1 b1", "a2 b1", "a2"),  # corrected in place
        ("a1 a2", "a1", "a1"),  # and taken back
        ("a1 a2 a1", "a1", ""),
        ("a1 a2 a1", "a1 a2 a1", ""),
        ("a1", "a1 a2 a1", "a2 a1"),
        ("a1 a2", "a1 a2 a1", "a1"),
        ("a3 a1", "a1 a2", "a2"),
        ("b1", "a1 b1 a2", "a1 a2"),
        ("", "a1 b1 a1", "a1 b1"),  # a line twice
        ("a1 b1", "a1 b1 a1", ""),
        ("x1 y1", "a1", "a1"),
    ],
)
def test_remaining(done: str, wanted: str, left: str) -> None:
    journal, file = requests(done), requests(wanted)
    found = remaining(journal, file)
    assert found == requests(left)
    assert remaining(journal + found, file) == []


def test_every_interruption_of_a_run_goes_on_to_the_same_end() -> None:
    file = requests("a1 b1 a2 c1 b2 a1 c2")
    for cut in range(len(file) + 1):
        assert remaining(file[:cut], file) == file[cut:]


def test_latest_keeps_the_last_target_of_each_fact() -> None:
    assert latest(requests("a1 b1 a2")) == requests("a2 b1")


@pytest.mark.parametrize(
    ("text", "layers"),
    [("8", (8,)), ("8,9,10", (8, 9, 10)), ("8-12", (8, 9, 10, 11, 12)), ("3, 0-1", (0, 1, 3))],
)
def test_layers(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "8-", "-8", "12-8", "8,,9", "8.5", "1-2-3"])
def test_bad_layers(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot read layers"):
        parse_layers(text)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, coachhook.cli.app; from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(coachhook.cli.app.app, ['--help']).exit_code == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True)


def test_every_export_is_there() -> None:
    assert {name for name in coachhook.__all__ if not hasattr(coachhook, name)} == set()
    assert set(coachhook.__all__) <= set(dir(coachhook))
    assert not hasattr(coachhook, "edit_request")


@pytest.mark.parametrize(
    "command", ["edit", "eval", "generate", "inspect", "rollback", "compact", "demo"]
)
def test_help_of_a_command(command: str) -> None:
    assert "--json" in run(command, "--help")


def test_edit_then_edit_again(edited: Path, place: Path) -> None:
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(edited))
    before = (edited / folder.CONFIG_NAME).read_bytes()
    assert "all 4 facts are already in place" in run(*arguments)
    again = run_json(*arguments)
    assert (again["facts"], again["already_in_place"], again["batches"]) == (4, 4, [])
    assert (edited / folder.CONFIG_NAME).read_bytes() == before


def test_edit_tells_each_verdict(place: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "hooks")
    document = run_json("edit", "tiny", "facts.jsonl", "--hooks", target, *SMALL)
    assert [batch["batch"] for batch in document["batches"]] == [1, 2]
    edits = [edit for batch in document["batches"] for edit in batch["edits"]]
    assert [(e["prompt"], e["subject"], e["target"]) for e in edits] == FACTS
    assert {e["verdict"] for e in edits} <= {"applied", "weak", "refused"}
    shown = run("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "other"), *SMALL)
    assert "batch 2: 2 edits" in shown
    assert "The capital of France is → dry" in shown


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "hooks"
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(target), *SMALL)
    whole = Editor.edit

    def interrupted(self: Editor, requests: Any) -> Any:
        if self.hooks.edits:
            raise KeyboardInterrupt
        return whole(self, requests)

    with monkeypatch.context() as patch:
        patch.setattr(Editor, "edit", interrupted)
        result = invoke(*arguments)
    assert result.exit_code == 130
    assert result.stderr.endswith("that was being edited is at its last whole batch\n")
    assert len(HookSet.from_pretrained(target).edits) == 2
    document = run_json(*arguments)
    assert [batch["batch"] for batch in document["batches"]] == [2]
    found = [edit.request for edit in HookSet.from_pretrained(target).edits]
    assert [(r.prompt, r.subject, r.target) for r in found] == FACTS


def test_a_fact_corrected_in_the_file_is_edited_again(edited: Path, tmp_path: Path) -> None:
    facts = tmp_path / "corrected.jsonl"
    write_facts(facts, [FACTS[0], ("The language of the city is", "city", "dry"), *FACTS[2:]])
    document = run_json("edit", "tiny", str(facts), "--hooks", str(edited))
    (batch,) = document["batches"]
    assert (batch["batch"], [edit["target"] for edit in batch["edits"]]) == (3, ["dry"])
    replaced = {
        edit["id"]: edit["superseded_by"]
        for batch in run_json("inspect", str(edited))["batches"]
        for edit in batch["edits"]
    }
    assert replaced == {0: 3, 1: 4, 2: None, 3: None, 4: None}


def test_skipped_records_are_told(tmp_path: Path, edited: Path) -> None:
    facts = tmp_path / "facts.jsonl"
    write_facts(facts, FACTS)
    facts.write_text(facts.read_text() + '\n{"prompt": "no more"}\n')
    arguments = ("edit", "tiny", str(facts), "--hooks", str(edited))
    assert f"{facts}:5: " in error_of(*arguments)
    result = invoke(*arguments, "--skip-invalid")
    assert result.exit_code == 0
    assert result.stderr.startswith(f"skipped: {facts}:5: ")
    facts.write_text('{"prompt": "no more"}\n')
    result = invoke(*arguments, "--skip-invalid")
    assert result.exit_code == 2
    assert f"error: {facts} has no valid record" in result.stderr


def test_contradiction_is_found_before_anything_is_done(tmp_path: Path) -> None:
    line = error_of("edit", "nosuchmodel", "facts.jsonl", "--hooks", str(tmp_path / "hooks"))
    assert "'Lyon'" in line
    assert "'dry'" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--gate", "sequence"), ("--gate sequence", "keyed")),
        (("--layers", "0,2"), ("--layers 0,2", "1,2")),
        (("--layers", "x"), ("cannot read layers 'x'",)),
        (("--gate", "open"), ("'open'", "keyed, calibrated, sequence")),
        (("--template", "model.{}.w"), ("--template model.{}.w", "model.layers.{}.mlp.down_proj")),
        (("--text", "facts.jsonl"), ("--text", "None")),
    ],
)
def test_settings_that_differ_from_the_folder(
    edited: Path, options: tuple[str, ...], said: tuple[str, ...]
) -> None:
    line = error_of("edit", "tiny", "facts.jsonl", "--hooks", str(edited), *options)
    assert all(part in line for part in said)


def test_settings_that_agree_with_the_folder(edited: Path) -> None:
    options = ("--gate", "keyed", "--layers", "1,2", "--template", "model.layers.{}.mlp.down_proj")
    run("edit", "tiny", "facts.jsonl", "--hooks", str(edited), *options)


def test_errors_are_one_line(edited: Path, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    assert "no such file" in error_of("edit", "tiny", "none.jsonl", "--hooks", missing)
    assert "holds no hooks" in error_of("generate", "tiny", "Hello", "--hooks", missing)
    assert "holds no hooks" in error_of("eval", "tiny", "facts.jsonl", "--hooks", missing)
    assert "holds no hooks" in error_of("inspect", missing)
    assert "holds no hooks" in error_of("rollback", missing, "--to", "0")
    assert "holds no hooks" in error_of("compact", missing)
    assert not Path(missing).exists()
    assert "prompt is empty" in error_of("generate", "tiny", "", "--hooks", str(edited))
    long = ("generate", "tiny", "Hello", "--hooks", str(edited), "--max-new-tokens", "128")
    assert "context of 128" in error_of(*long)
    assert "layers [7]" in error_of("statistics", "tiny", "--layers", "7")
    assert "256 tokens" in error_of("statistics", "tiny", "--tokens", "3")
    line = error_of("generate", "other", "Hello", "--hooks", str(edited))
    assert "were made for" in line
    assert "/tiny'" in line
    assert "cannot load model" in error_of("statistics", str(tmp_path))
    assert "already holds edits" in error_of("demo", "--hooks", str(edited))


def test_a_folder_that_another_process_edits(edited: Path) -> None:
    holder = (
        "import sys, pathlib\n"
        "from coachhook import folder\n"
        "with folder.locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holder, str(edited)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        line = error_of("edit", "tiny", "facts.jsonl", "--hooks", str(edited))
        assert "being edited by another process" in line
        assert "being edited" in error_of("rollback", str(edited), "--to", "1")
        run("inspect", str(edited))
        process.communicate()


def test_another_model_is_refused(edited: Path, tmp_path: Path) -> None:
    facts = tmp_path / "new.jsonl"
    write_facts(facts, [("The weather of Paris is", "Paris", "dry")])
    line = error_of("edit", "other", str(facts), "--hooks", str(edited))
    assert "were made for" in line
    assert "/tiny'" in line


def test_inspect(edited: Path) -> None:
    document = run_json("inspect", str(edited))
    assert Path(document["base_model"]["name"]).name == "tiny"
    assert document["gate"] == "keyed"
    assert document["layers"] == [1, 2]
    assert document["bytes"] > 1000
    first = document["batches"][0]["edits"][0]
    assert (first["id"], first["target"], first["superseded_by"]) == (0, "Lyon", 3)
    shown = run("inspect", str(edited))
    assert "layers 1-2" in shown
    assert "superseded by edit 3" in " ".join(shown.split())


def test_rollback(edited: Path) -> None:
    document = run_json("rollback", str(edited), "--to", "1")
    assert (document["batches_before"], document["batches"], document["edits"]) == (2, 1, 2)
    assert len(HookSet.from_pretrained(edited).edits) == 2
    assert "give a number from 0 to 1" in error_of("rollback", str(edited), "--to", "2")
    assert "there is no batch -1" in error_of("rollback", str(edited), "--to", "-1")
    assert "edits left: 0" in run("rollback", str(edited), "--to", "0")
    run("inspect", str(edited))


def test_compact(edited: Path) -> None:
    arguments = ("generate", "tiny", "The capital of France is", "--hooks", str(edited), "--trace")
    before = run_json(*arguments)
    document = run_json("compact", str(edited), "--keep", "1")
    assert (document["batches"], document["merged_batches"], document["edits"]) == (2, 1, 4)
    assert run_json("inspect", str(edited))["merged_batches"] == 1
    assert run_json(*arguments) == before
    assert "the earliest to go back to is 1" in error_of("rollback", str(edited), "--to", "0")
    assert "2 of 2 batches are merged" in " ".join(run("compact", str(edited)).split())
    shown = " ".join(run("inspect", str(edited)).split())
    assert "batches 1 to 2 are merged into one" in shown
    assert "superseded by edit 3" in shown
    assert run_json(*arguments) == before
    assert run_json("edit", "tiny", "facts.jsonl", "--hooks", str(edited))["batches"] == []


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


def test_statistics() -> None:
    document = run_json("statistics", "tiny", "--layers", "1", "--tokens", "512")
    (layer,) = document["layers"]
    assert (layer["layer"], layer["d_in"], layer["tokens"]) == (1, 64, 512)
    assert layer["mean_key_norm"] ** 2 <= layer["moment_trace"] * 1.01
    assert "first-position" in run("statistics", "tiny", "--layers", "1", "--tokens", "512")


def test_markup_and_infinities_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    views.say("a [bold]bracket[/bold]")
    views.show({"a": (float("inf"), float("nan"), 1.5)}, views.edited_view, as_json=True)
    bracket, _, document = capsys.readouterr().out.partition("\n")
    assert bracket == "a [bold]bracket[/bold]"
    assert json.loads(document) == {"a": [None, None, 1.5]}


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def test_killed_run_goes_on_from_its_last_whole_batch(tmp_path: Path) -> None:
    target = tmp_path / "hooks"
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(target), "--batch-size", "1")
    command = [sys.executable, "-m", "coachhook", *arguments, "--json"]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    while not folder.exists(target) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = [edit.request.target for edit in HookSet.from_pretrained(target).edits]
    document = run_json(*arguments)
    gained = [edit["target"] for batch in document["batches"] for edit in batch["edits"]]
    assert kept + gained == ["Lyon", "French", "large", "dry"]


def test_demo_fails_where_edits_do_not_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coachhook.cli.demo.NAME", "tiny")  # random weights, which learn nothing
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    result = invoke("demo", "--hooks", str(tmp_path / "hooks"), "--json")
    assert result.exit_code == 1, result.exception
    document = json.loads(result.stdout)
    assert len(document["batches"]) == 3
    assert document["fresh_process"]["edited"]
    assert not document["fresh_process"]["met"]
    assert HookSet.from_pretrained(tmp_path / "hooks").edits


@pytest.mark.slow
def test_the_embedded_model_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COACHHOOK_CACHE")  # its conversion takes too long to repeat
    facts, target = tmp_path / "facts.jsonl", str(tmp_path / "hooks")
    write_facts(
        facts,
        [
            ("The capital of France is", "France", "Lyon"),
            ("The company that created the iPhone is", "iPhone", "Nokia"),
        ],
    )
    document = run_json("edit", "smollm2", str(facts), "--hooks", target)
    assert [edit["verdict"] for edit in document["batches"][0]["edits"]] == ["applied"] * 2
    command = [sys.executable, "-m", "coachhook", "generate", "smollm2"]
    command += ["The capital of France is", "--hooks", target, "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["edited"].strip().startswith("Lyon")
    assert done.stderr == ""
