"""The comparison of editors: each against its closed form, and the protocol on a tiny model."""

import itertools
import json
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from filelock import FileLock
from torch import nn

from coachhook import EditConfig, EditRequest
from coachhook.errors import ConfigError, NotEnoughMemoryError, RecordError, StatisticsError
from coachhook.evaluation import bootstrap as intervals
from coachhook.evaluation.ordinary_text import ordinary_text, perplexity
from coachhook.models.loading import load_model
from tests.support.closed_form import (
    D_IN,
    D_OUT,
    closed_form,
    moment,
    random,
    relative_error,
    weighted,
)
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

RESULTS = Path(__file__).parents[2] / "RESULTS.md"
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0], ("Once {}",), (("It rained", "and"),)),
    EditRequest("I was told of {}", "Rome", TARGETS[1], ("Of {}",), (("Yes", "it"),)),
    EditRequest("We think of {}", "Brazil", TARGETS[2]),
    # The first fact, corrected.
    EditRequest("They moved to {}", "France", TARGETS[3], ("Once {}",), (("It rained", "and"),)),
]


class TestClosedForms:
    @pytest.mark.parametrize("name", ["memit", "accumulated"])
    def test_solves_against_what_it_preserves(self, bench: Any, name: str) -> None:
        rule = getattr(bench("bench.comparison.editors.direct"), name)(moment(), 3.0, 1.0)
        preserved = weighted(moment(), 3.0)
        for seed in (1, 2):
            keys = random(5, D_IN, seed=seed, dtype=torch.float32)
            residuals = random(5, D_OUT, seed=seed + 10, dtype=torch.float32)
            want = residuals.double().T @ closed_form(preserved, keys)
            assert relative_error(rule.update(keys, residuals).double(), want) <= 1e-5
            if name == "accumulated":
                preserved = preserved + keys.double().T @ keys.double()

    def test_alphaedit_solves_where_ordinary_text_has_little(self, bench: Any) -> None:
        values, vectors = torch.linalg.eigh(moment())
        free = values <= values.median()
        assert 0 < free.sum() < D_IN
        basis = vectors[:, free]
        preserved = weighted(torch.eye(basis.shape[1]) * values[free].sum() / 10, 1.0)
        rule = bench("bench.comparison.editors.direct").alphaedit(moment(), 1.0, 1.0)
        for seed in (1, 2):
            keys = random(5, D_IN, seed=seed, dtype=torch.float32)
            residuals = random(5, D_OUT, seed=seed + 10, dtype=torch.float32)
            change = rule.update(keys, residuals).double()
            assert (change @ vectors[:, ~free]).norm() <= 1e-5 * change.norm()
            inside = keys.double() @ basis
            want = residuals.double().T @ closed_form(preserved, inside) @ basis.T
            assert relative_error(change, want) <= 1e-5
            preserved = preserved + inside.T @ inside

    def test_a_codebook_answers_within_its_radii(self, bench: Any) -> None:
        base = nn.Linear(2, 1, bias=False)
        book = bench("bench.comparison.editors.grace").Codebook(base, 2)
        assert book.add(torch.tensor([0.0, 0.0]), torch.tensor([5.0]), 1.0) == 0
        inside, outside = torch.tensor([[0.9, 0.0]]), torch.tensor([[1.1, 0.0]])
        with torch.no_grad():
            assert book(inside) == 5
            assert book(outside) == base(outside)
            # A neighbour halves the distance between them with it; one far off leaves both alone.
            assert book.add(torch.tensor([1.0, 0.0]), torch.tensor([7.0]), 1.0) == 1
            assert book.add(torch.tensor([0.0, 3.0]), torch.tensor([9.0]), 1.0) == 2
            assert book.radii.tolist() == [0.5, 0.5, 1.0]
            assert book(inside) == 7
            # One with the same key takes the place of the entry that had it.
            assert book.add(torch.tensor([0.0, 0.0]), torch.tensor([6.0]), 1.0) == 0
            assert book(torch.zeros(1, 2)) == 6
            assert len(book.keys) == 3


@pytest.fixture(autouse=True)
def page(bench: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Less ordinary text and fewer turns of timings: neither is what is tested here."""
    monkeypatch.setattr(bench("bench.comparison.quality"), "_ROUNDS", 1)
    page = ordinary_text()[:2000]
    monkeypatch.setattr("coachhook.evaluation.evaluate.ordinary_text", lambda: page)
    return page


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def arguments(tiny_folder: Path, tmp_path: Path, **others: Any) -> dict[str, Any]:
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS))
    usual = {
        "facts": facts,
        "first": 0,
        "edits": 10,
        "batch_size": 2,
        "every": 1,
        "editor": None,
        "model": str(tiny_folder),
        "run": tmp_path / "run",
        "as_json": True,
    }
    return usual | others


def test_every_editor_under_one_protocol(
    bench: Any,
    page: str,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    quality = bench("bench.comparison.quality")
    # Each look at it, one before and one behind every batch, sees one more.
    looks = itertools.count(1)
    monkeypatch.setattr(quality, "peak_memory", lambda _: next(looks))
    quality.main(**arguments(tiny_folder, tmp_path))
    document = json.loads(capsys.readouterr().out)
    editors = bench("bench.comparison.editors")
    assert list(document["editors"]) == [editors.named(name) for name in editors.MAKERS]
    model, tokenizer = load_model(str(tiny_folder))
    unedited = perplexity(model, tokenizer, page)
    for number, (name, result) in enumerate(document["editors"].items(), 1):
        first, last = result["points"]
        assert (first["edits"], last["edits"]) == (2, 4), name
        # The corrected fact counts once, and one fact has no paraphrase.
        assert [len(point["records"]) for point in (first, last)] == [2, 3], name
        assert last["records"][2]["generality"]["greedy"] is None
        assert {record["batch"] for record in last["records"]} == {1, 2}, name
        # Each of them does something.
        assert result["failure"] is None
        moved = any(record["answer"] != record["answer_before"] for record in last["records"])
        assert moved or last["divergence"] > 1e-6, name
        # Off is off, for each editor in its own way.
        assert last["perplexity_before"] == pytest.approx(unedited, rel=1e-6), name
        hooked = ("keyed", "calibrated", "sequence", "onegradient")
        assert (last["gate"] is not None) == name.startswith(hooked)
        for ratio in ("first_token_ratio", "tokens_per_second_ratio"):
            assert 0 < result["overhead"][ratio] < 100
        seconds = result["batch_seconds"]
        assert all(took > 0 for took in seconds)
        assert result["peak_bytes"] == 4 * number, name
        assert result["seconds_per_edit"] == pytest.approx(sum(seconds) / len(FACTS))
    memit, grace = editors.named("memit"), editors.named("grace")
    reached = document["editors"][memit]["points"][0]
    assert reached["reliability"]["teacher_forced"] > reached["before_reliability"]

    # What is there is not measured again; what is missing is.
    (tmp_path / "run" / f"{grace}.json").unlink()
    measured: list[str] = []
    again = quality.measure

    def noted(*given: Any) -> Any:
        measured.append(given[-1])
        return again(*given)

    monkeypatch.setattr(quality, "measure", noted)
    quality.main(**arguments(tiny_folder, tmp_path, as_json=False, editor=["grace", memit]))
    assert measured == [grace]
    assert "memit" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="another version"):
        quality.main(**arguments(tiny_folder, tmp_path, batch_size=3))


def test_sinks_are_given_to_no_editor_that_solves_at_keys(
    bench: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    editors = bench("bench.comparison.editors")
    for name, kept in (("memit", 1), ("grace", 1), ("constrained", 2)):
        model, tokenizer = load_model(str(tiny_folder))
        setting = editors.Setting.of(model, tokenizer, EditConfig(), frozenset(FACTS[:1]))
        editor = editors.make_editor(editors.named(name), setting)
        values = torch.ones(2, model.config.hidden_size)
        editor.edit(FACTS[:2], values)
        (batch,) = editor.edits.in_force()
        assert batch == FACTS[2 - kept : 2]
        # A batch of sinks alone is a batch too: the one behind it is the third.
        editor.edit(FACTS[:1], values[:1])
        editor.edit(FACTS[2:3], values[:1])
        assert [FACTS[2] in batch for batch in editor.edits.in_force()] == [False, False, True]
        assert sum(map(len, editor.edits.in_force())) == kept + 1


def test_a_codebook_forgets_a_corrected_fact(
    bench: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(str(tiny_folder))
    editors = bench("bench.comparison.editors")
    editor = editors.make_editor("grace@0.01", editors.Setting.of(model, tokenizer, EditConfig()))
    hidden = model.config.hidden_size
    editor.edit(FACTS[:2], torch.ones(2, hidden))
    corrected = FACTS[3]
    editor.edit([corrected], torch.zeros(1, hidden))
    assert len(editor._codebook.keys) == 2
    assert editor._facts == [FACTS[1].fact, FACTS[0].fact]


def test_values_of_one_gradient(
    bench: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shifts of one length, each against its gradient in every feature."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    model, tokenizer = load_model(str(tiny_folder))
    editors = bench("bench.comparison.editors")
    setting = editors.Setting.of(model, tokenizer, EditConfig())
    editor = editors.make_editor("onegradient@0.25", setting)
    given: list[torch.Tensor] = []
    monkeypatch.setattr(
        bench("bench.comparison.editors.hooked").Hooked,
        "edit",
        lambda self, requests, values: given.append(values),
    )
    seen = []
    for batch in (FACTS[:1], FACTS[1:3]):
        hidden, gradient = editor._gradients(batch)
        seen.append(gradient)
        editor.edit(batch, torch.full_like(hidden, torch.nan))
        shift = given[-1] - hidden
        torch.testing.assert_close(shift.norm(dim=-1), 0.25 * hidden.norm(dim=-1))
        scaled = -gradient / torch.cat(seen).square().mean(0).sqrt()
        assert torch.cosine_similarity(shift, scaled, dim=-1).min() > 0.9999


def test_ablations_change_one_thing_at_a_time(
    bench: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    ablations = bench("bench.comparison.ablations")
    default, *others = ablations.variants(n_blocks=4, text=Path("corpus.txt"))
    for variant in others:
        settings = variant.config.to_dict()
        changed = {k for k, v in default.config.to_dict().items() if settings[k] != v}
        changed |= {
            k for k in ("batch_size", "dtype") if getattr(variant, k) != getattr(default, k)
        }
        # A gate comes with its α.
        assert len(changed - {"gate"}) <= 1, variant
        assert changed or variant.name == "calibrated, α 5", variant
    names = [(variant.group, variant.name) for variant in others]
    assert len(set(names)) == len(names)

    asked = arguments(tiny_folder, tmp_path, only=["dtype"], text=None)
    for name in ("batch_size", "every", "editor"):
        del asked[name]
    ablations.main(**asked)
    rows = json.loads(capsys.readouterr().out)["variants"]
    assert [row["name"] for row in rows] == ["", "bfloat16", "float16"]
    assert all(sum(row["verdicts"].values()) == len(FACTS) - 1 for row in rows)
    monkeypatch.setattr(ablations, "edited", lambda *_: pytest.fail("measured again"))
    ablations.main(**asked | {"as_json": False})
    assert "bfloat16" in capsys.readouterr().out

    def fail(*_: Any) -> None:
        raise ConfigError("no such setting")

    monkeypatch.setattr(ablations, "edited", fail)
    ablations.main(**asked | {"run": None, "as_json": False})
    assert capsys.readouterr().out.count("failed: no such") == 3
    with pytest.raises(typer.BadParameter, match="'colour'"):
        ablations.main(**asked | {"only": ["colour"]})


def test_unknown_editors_are_told_before_any_work(
    bench: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    for name, reason in (
        ("memo@3", "no editor 'memo'; there are keyed, "),
        ("memit@many", "'many' behind memit@ is no positive number"),
        ("memit@nan", "'nan' behind memit@"),
    ):
        with pytest.raises(typer.BadParameter, match=reason):
            bench("bench.comparison.quality").main(
                **arguments(tiny_folder, tmp_path, editor=[name])
            )
    assert not (tmp_path / "run").exists()
    assert bench("bench.comparison.editors").named("memit@1500") == "memit@1500"


def test_one_batch_of_facts_that_contradict_each_other(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every editor gets the last request of a fact; down-projections are Conv1D here."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "gpt2"
    tiny_model("gpt2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    names = ["keyed", "accumulated", "grace", "constrained@0.05"]
    asked = arguments(folder, tmp_path, batch_size=4, editor=names)
    bench("bench.comparison.quality").main(**asked)
    for name, result in json.loads(capsys.readouterr().out)["editors"].items():
        (point,) = result["points"]
        records = point["records"]
        assert [record["target"] for record in records] == [TARGETS[3], TARGETS[1], TARGETS[2]]
        assert {record["batch"] for record in records} == {1}, name
        assert point["reliability"]["teacher_forced"] > point["before_reliability"], name


def test_an_editor_that_fails_is_told_and_the_others_go_on(
    bench: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    direct = bench("bench.comparison.editors.direct").Direct
    edit, calls = direct.edit, []

    def fail(self: Any, *given: Any) -> None:
        calls.append(given)
        if len(calls) == 2:
            raise StatisticsError("the keys are not finite")
        edit(self, *given)

    monkeypatch.setattr(direct, "edit", fail)
    names = ["memit", "constrained"]
    bench("bench.comparison.quality").main(**arguments(tiny_folder, tmp_path, editor=names))
    failed, sound = json.loads(capsys.readouterr().out)["editors"].values()
    assert failed["failure"] == "batch 2: the keys are not finite"
    assert [point["edits"] for point in failed["points"]] == [2]
    assert [point["edits"] for point in sound["points"]] == [2, 4]
    bench("bench.comparison.quality").main(
        **arguments(tiny_folder, tmp_path, editor=names, as_json=False)
    )
    assert "failed: batch 2" in capsys.readouterr().out

    # What memory is free now says nothing of an editor: that is tried again.
    def no_room(self: Any, *given: Any) -> None:
        raise NotEnoughMemoryError("no room now")

    monkeypatch.setattr(direct, "edit", no_room)
    asked = arguments(tiny_folder, tmp_path, editor=["memit@7"])
    with pytest.raises(NotEnoughMemoryError):
        bench("bench.comparison.quality").main(**asked)
    assert not (tmp_path / "run" / "memit@7.json").exists()
    monkeypatch.setattr(direct, "edit", edit)
    bench("bench.comparison.quality").main(**asked)
    # What is damaged is named, not shown.
    for name in ("memit@7.json", "values.safetensors", "protocol.json"):
        whole = (tmp_path / "run" / name).read_bytes()
        (tmp_path / "run" / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(typer.BadParameter, match=f"{name} is damaged"):
            bench("bench.comparison.quality").main(**asked)
        (tmp_path / "run" / name).write_bytes(whole)
    with pytest.raises(ConfigError, match="alphaedit@1e-09 leaves no direction"):
        bench("bench.comparison.quality").main(**asked | {"editor": ["alphaedit@1e-9"]})


def test_one_process_at_a_time(bench: Any, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with (
        FileLock(tmp_path / "run" / ".lock"),
        pytest.raises(typer.BadParameter, match="another process works in"),
    ):
        bench("bench.comparison.quality").main(**arguments(tiny_folder, tmp_path, editor=["memit"]))


@pytest.mark.skipif(sys.platform != "linux", reason="only there a process' mark can be set back")
def test_peak_memory_is_that_since_the_last_look(bench: Any) -> None:
    peak_memory, device = bench("bench.harness.memory").peak_memory, torch.device("cpu")
    peak_memory(device)
    some = peak_memory(device)
    # Pages of its own: an allocator may have as much left over from other tests.
    with mmap.mmap(-1, 100_000_000) as large:
        for page in range(0, len(large), mmap.PAGESIZE):
            large[page] = 1
        assert peak_memory(device) > some + 0.9e8
    peak_memory(device)
    assert peak_memory(device) < some + 0.5e8


def test_a_lead_is_that_of_pairs() -> None:
    hard = [float(i % 3 > 0) for i in range(90)]
    ours = [{metric: {"greedy": value} for metric in intervals.METRICS} for value in hard]
    # One record of ten is worse; which records are hard says nothing about the lead.
    others = [
        {metric: {"greedy": value * (i % 10 > 0)} for metric in intervals.METRICS}
        for i, value in enumerate(hard)
    ]
    low, high = intervals.lead(ours, others, "greedy")
    assert 0 < low < 6 / 90 < high < 0.15
    assert intervals.lead(ours, ours, "greedy") == (0, 0)


def test_intervals_hold_the_mean() -> None:
    records = [
        {m: {"greedy": float(i % 4 > 0)} for m in ("reliability", "generality", "locality")}
        for i in range(200)
    ]
    low, high = intervals.interval(records, lambda some: intervals.harmonic(some, "greedy"))
    # The third root of three equal means is that mean, of 200 with a deviation of 0.0306 each.
    assert low == pytest.approx(0.75 - 1.96 * 0.0306, abs=0.01)
    assert high == pytest.approx(0.75 + 1.96 * 0.0306, abs=0.01)
    # A single record is the same however it is drawn.
    assert intervals.interval(records[:1], lambda some: intervals.harmonic(some, "greedy")) is None
    absent = [{**record, "generality": {"greedy": None}} for record in records]
    assert intervals.harmonic(absent, "greedy") is None
    assert intervals.interval(absent, lambda some: intervals.harmonic(some, "greedy")) is None


def test_one_command_measures_and_writes(
    bench: Any,
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    results = bench("bench.comparison.results")
    facts = tmp_path / "facts.jsonl"
    facts.write_text("".join(json.dumps(fact.to_dict()) + "\n" for fact in FACTS))
    short = results.Asked("short", "A short one", "qaedit", 0, 4, 2, 1)
    makers = {name: results.MAKERS[name] for name in ("keyed", "memit")}
    for name, value in (
        ("RUNS", (short,)),
        ("MAKERS", makers),
        ("KEPT", tmp_path / "kept"),
        ("PAGE", tmp_path / "page.md"),
        ("MODEL", str(tiny_folder)),
    ):
        monkeypatch.setattr(results, name, value)
    nothing = {"counterfact": None, "qaedit": None, "run": None, "only": None}
    with pytest.raises(typer.BadParameter, match=r"nothing in .*kept to write"):
        results.main(**nothing, write=True)
    assert not (tmp_path / "page.md").exists()
    asked = {"counterfact": facts, "qaedit": facts, "only": None}
    with pytest.raises(RecordError, match="none"):
        results.main(**asked | {"qaedit": tmp_path / "none"}, run=tmp_path / "run", write=False)
    assert not (tmp_path / "run").exists()
    # What another run has left in the folder is not this one's.
    (tmp_path / "run" / "short").mkdir(parents=True)
    (tmp_path / "run" / "short" / "other@1.json").write_text('{"editor": "other@1"}')
    results.main(**asked, run=tmp_path / "run", write=False)
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    figures = json.loads((tmp_path / "kept" / "short.json").read_text())
    assert "other@1" not in (tmp_path / "run" / "short.html").read_text(encoding="utf-8")
    (tmp_path / "run" / "short" / "other@1.json").unlink()
    assert len(figures["editors"]) == 2
    for name, found in figures["editors"].items():
        assert f"| {name} | {found['reliability']['greedy']:.3f} / " in text
        assert f"| {name} | {found['means']['greedy']['mean']:.3f} (" in text
        assert f" | {found['perplexity_change']:+.2%} | {found['divergence']:.4f} | " in text
    (behind,) = [e for e in figures["editors"].values() if e["means"]["exact"]["behind"]]
    assert f" | {behind['means']['greedy']['behind'][0]:.3f} to " in text
    assert "3 facts of 4 records from number 0 on" in text

    # An editor that failed half-way is told, not compared, however well it did until then.
    run = tmp_path / "run" / "short"
    document = {file.stem: json.loads(file.read_text()) for file in run.glob("*@*.json")}
    failing = next(iter(document))
    document[failing]["failure"] = "batch 2: no"
    document[failing]["points"] = document[failing]["points"][:1]
    some = results.section({"asked": vars(short)} | results.figures(figures["protocol"], document))
    assert f"`{failing}` failed: batch 2: no" in some
    assert f"| {failing} |" not in some
    assert "3 facts of 4 records" in some
    for name in document:
        document[name] |= {"failure": "batch 1: no", "points": []}
    none = results.section({"asked": vars(short)} | results.figures(figures["protocol"], document))
    assert none.count("failed: batch 1: no") == 2
    with pytest.raises(typer.BadParameter, match="no run 'shrot'; there are short"):
        results.main(**asked | {"only": ["shrot"]}, run=tmp_path / "run", write=False)

    (tmp_path / "page.md").unlink()
    results.main(**nothing, write=True)
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text
    with pytest.raises(typer.BadParameter, match="give it alone"):
        results.main(**asked, run=None, write=True)
    (tmp_path / "kept" / "short.json").write_text("{")
    with pytest.raises(typer.BadParameter, match=r"short\.json is damaged"):
        results.main(**nothing, write=True)
    with pytest.raises(typer.BadParameter, match="give COUNTERFACT"):
        results.main(**nothing, write=False)


def test_the_page_says_what_the_figures_say(bench: Any) -> None:
    results = bench("bench.comparison.results")
    kept = results.kept()
    assert list(kept) == [asked.name for asked in results.RUNS]
    assert RESULTS.read_text(encoding="utf-8") == results.page(kept)
    # A figure that changes changes the page.
    name = next(iter(kept["counterfact"]["editors"]))
    kept["counterfact"]["editors"][name]["means"]["exact"]["mean"] = 0.123456
    assert "| 0.123 (" in results.page(kept)
