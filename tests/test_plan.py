import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from coachhook import plan
from coachhook.cli.app import app
from coachhook.config import EditConfig
from coachhook.errors import NotEnoughMemoryError
from coachhook.facts.request import EditRequest
from coachhook.models.architecture import Architecture
from coachhook.plan import Part, Plan, Sizes, edit_plan, statistics_plan
from coachhook.statistics.source import StatisticsSource
from coachhook.system import hardware as machine
from tests.support.tiny import tiny_model, tiny_tokenizer

GB = 10**9
REQUESTS = [
    EditRequest("The capital of {} is", name, "Lyon") for name in ("France", "Spain", "Italy")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `tiny` and `facts.jsonl`."""
    place = tmp_path_factory.mktemp("plan")
    tiny_model("llama").save_pretrained(place / "tiny")
    tiny_tokenizer().save_pretrained(place / "tiny")
    facts = [json.dumps(request.to_dict()) for request in REQUESTS]
    (place / "facts.jsonl").write_text("\n".join(facts))
    return place


@pytest.fixture(autouse=True)
def _own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)


def planned(**changes: Any) -> Plan:
    asked: dict[str, Any] = {"layers": (1, 2), "batch": 2, "edits": 3, "kind": "llama", **changes}
    model = tiny_model(asked["kind"])
    sizes = Sizes.of(model, Architecture.of(model))
    requests = asked.get("requests", REQUESTS[: asked["edits"]])
    return edit_plan(
        sizes,
        asked["layers"],
        EditConfig(readout="delta"),
        tiny_tokenizer(),
        requests,
        asked["batch"],
    )


def by_name(found: Plan) -> dict[str, Part]:
    return {part.name: part for part in found.parts}


def test_passing_parts_do_not_add_up() -> None:
    parts = [
        Part("moments", "cpu", 5),
        Part("inverses", "cpu", 7),
        Part("ordinary text", "cpu", 100, 2.0, passing=True),
        Part("target values", "cpu", 40, 3.0, passing=True),
        Part("writing", "cuda:0", 1000, 1.0, passing=True),
    ]
    found = Plan(parts)
    assert (found.needed("cpu"), found.needed("cuda:0"), found.seconds()) == (112, 1000, 6.0)


def test_what_cannot_fit_is_refused_with_the_arithmetic() -> None:
    parts = [
        Part("moments", "cpu", 2 * GB),
        Part("inverses", "cpu", 8 * GB),
        Part("target values", "cpu", 3 * GB, passing=True),
        Part("ordinary text", "cpu", GB, passing=True),
    ]
    assert Plan(parts, free={"cpu": 13 * GB}).check().needed("cpu") == 13 * GB
    with pytest.raises(NotEnoughMemoryError) as caught:
        Plan(parts, {"cpu": 30 * GB}, {"cpu": 6 * GB}).check()
    assert str(caught.value) == (
        "this needs 13.0 GB on cpu, beside the model's 30.0 = 8.0 inverses + 3.0 target values + "
        "2.0 moments, and 6.0 GB is free; hook fewer layers"
    )


def test_each_setting_costs_where_it_should() -> None:
    one, more = by_name(planned()), by_name(planned(layers=(0, 1, 2, 3)))
    assert more["moments"].n_bytes == 2 * one["moments"].n_bytes == 4 * 64**2 * 4
    assert more["inverses"].n_bytes == 2 * one["inverses"].n_bytes
    single = by_name(planned(batch=1))
    assert single["target values"].n_bytes < one["target values"].n_bytes
    assert single["moments"] == one["moments"]
    fewer = by_name(planned(edits=1))
    assert fewer["edits"].n_bytes < one["edits"].n_bytes


def test_a_batch_of_thousands_is_optimised_in_parts_and_solved_whole() -> None:
    some, many = (by_name(planned(requests=REQUESTS[:1] * n, batch=n)) for n in (1_000, 5_000))
    assert many["target values"].n_bytes == some["target values"].n_bytes
    assert many["writing"].n_bytes == some["writing"].n_bytes
    assert many["target values"].seconds == pytest.approx(5 * some["target values"].seconds)
    # Three keys an edit: three squares of float64 numbers, and four products with keys.
    assert some["solving"].n_bytes == 8 * 3_000 * (3 * 3_000 + 4 * 64)
    assert many["solving"].n_bytes == 8 * 15_000 * (3 * 15_000 + 4 * 64)


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt", "gpt_neox", "phi"])
def test_other_architectures_have_the_same_sizes(kind: str) -> None:
    assert by_name(planned(kind=kind))["moments"] == by_name(planned())["moments"]


def test_text_of_a_file_is_not_sampled() -> None:
    model = tiny_model("llama")
    sizes = Sizes.of(model, Architecture.of(model))
    sampled = statistics_plan(sizes, (1,), StatisticsSource())
    read = statistics_plan(sizes, (1,), StatisticsSource("text.txt"))
    assert read.seconds() < sampled.seconds()


MEASURED = """
import json, sys
from pathlib import Path
import psutil
from transformers import AutoConfig, AutoModelForCausalLM
from tests.support.tiny import tiny_model, tiny_tokenizer
from coachhook.config import EditConfig
from coachhook.editor import Editor
from coachhook.models.architecture import Architecture
from coachhook.plan import Sizes, edit_plan
from coachhook.facts.request import EditRequest
from coachhook.statistics.source import StatisticsSource

tokenizer = tiny_tokenizer()
settings = EditConfig(readout="delta", layers=(0, 1, 2), statistics=StatisticsSource(n_tokens=1024))
requests = [EditRequest("The capital of {} is", "France", "Lyon")]
# What is imported and set up once is no part of any plan.
with Editor.from_pretrained(tiny_model("llama"), tokenizer, config=settings) as editor:
    editor.edit(requests)
config = tiny_model("llama").config
config.intermediate_size = 1536
model = AutoModelForCausalLM.from_config(config).eval()
sizes = Sizes.of(model, Architecture.of(model))
plan = edit_plan(sizes, (0, 1, 2), settings, tokenizer, requests, 1)

def used():
    return psutil.Process().memory_info().rss

def highest():
    # Not ru_maxrss, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text().split("VmHWM:")[1]
    return int(status.split()[0]) * 1024

before = used()
editor = Editor.from_pretrained(model, tokenizer, config=settings)
lasting = used() - before
editor.edit(requests)
peak = highest() - before
kept = sum(p.n_bytes for p in plan.parts if not p.passing)
print(json.dumps([lasting / kept, peak / plan.needed("cpu")]))
"""


@pytest.mark.slow  # A process of its own, which loads and edits a model.
def test_a_fresh_process_needs_what_was_planned(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            # Freed memory goes back to the system at once, so that what is left can be read off.
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kept, peak = json.loads(done.stdout)
    # Moments, inverses and background keys are counted exactly, the rest is estimated.
    assert 0.8 <= kept <= 1.25, done.stdout
    assert 0.5 <= peak <= 2, done.stdout


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_edit_and_statistics_tell_their_plan_first(tmp_path: Path) -> None:
    arguments = ("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "hooks"))
    shown = invoke(*arguments, "--layers", "1-2")
    assert shown.exit_code == 0, shown.exception
    assert "inverses" in shown.stderr
    assert "GB free on cpu" in shown.stderr
    assert "inverses" not in shown.stdout
    again = json.loads(invoke(*arguments, "--json").stdout)
    assert again["plan"] is None  # nothing was left to do
    document = json.loads(invoke("statistics", "tiny", "--layers", "1", "--json").stdout)
    assert document["plan"]["parts"][0]["name"] == "moments"
    assert document["plan"]["parts"][0]["n_bytes"] == 64**2 * 4


def test_edit_refuses_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1_000_000)
    result = invoke("edit", "tiny", "facts.jsonl", "--hooks", str(tmp_path / "hooks"))
    assert result.exit_code == 2
    assert "and 0.001 GB is free; " in result.stderr.splitlines()[-1]
    assert not list((tmp_path / "hooks").glob("*.json"))


def test_weights_that_do_not_fit_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("coachhook.models.loading.load_model", load)
    monkeypatch.setattr(plan, "free_bytes", lambda _: 1000)
    result = invoke("statistics", "tiny")
    assert result.exit_code == 2, result.exception
    assert "model weights" in result.stderr


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(tmp_path: Path, version: int) -> None:
    names = {
        1: ("memory/box", "9:cpu:/\n4:memory:/box\n", "limit_in_bytes", "usage_in_bytes", "total_"),
        2: ("box", "0::/box\n", "max", "current", ""),
    }
    folder, membership, limit, usage, prefix = names[version]
    inner = tmp_path / folder
    inner.mkdir(parents=True)
    for place, most in ((inner, "5000"), (inner.parent, "max" if version == 2 else "9000")):
        (place / f"memory.{limit}").write_text(most)
        (place / f"memory.{usage}").write_text("3000")
        (place / "memory.stat").write_text(f"anon 7\n{prefix}inactive_file 500\n")
    (tmp_path / "cgroup").write_text(membership)
    rooms = machine._cgroup_room(tmp_path / "cgroup", tmp_path)
    assert rooms == ([2500] if version == 2 else [2500, 6500])
    assert machine._cgroup_room(tmp_path / "none", tmp_path) == []


def test_a_rate_is_measured() -> None:
    assert machine.matmul_rate(torch.device("cpu"), torch.float32, 64) > 1e6
