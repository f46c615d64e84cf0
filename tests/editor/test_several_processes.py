"""Editing by several processes gives what one process gives."""

import json
from pathlib import Path
from typing import Any

import pytest

from coachhook import HookSet
from tests.support.jobs import torchrun

pytestmark = pytest.mark.slow  # A job of two processes, and its launcher.

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer
import coachhook as ch
from coachhook.system.processes import ALONE, joined

def edited(processes):
    config = ch.EditConfig(
        readout="delta", layers=(1, 2), preservation=1.0, false_alarms=0.02,
        statistics=ch.StatisticsSource(n_tokens=2048),
        values=ch.ValueConfig(steps=15, rate=0.3, clamp=8.0),
    )
    facts = [
        ch.EditRequest("They moved to {}", "France", TARGETS[0]),
        ch.EditRequest("I was told of {}", "Rome", TARGETS[1]),
        ch.EditRequest("The year was {}", "1984", TARGETS[2]),
    ]
    editor = ch.Editor.from_pretrained(
        tiny_model("llama").double(), tiny_tokenizer(), config=config, processes=processes
    )
    reports = [editor.edit(facts), editor.edit([ch.EditRequest("We saw {}", "Troy", TARGETS[3])])]
    return editor, [[str(e.verdict) for e in r.edits] for r in reports]

place = Path(sys.argv[1])
with joined() as processes:
    editor, verdicts = edited(processes)
    editor.save_pretrained(place / "together")
    assert all(batch.stored is not None for batch in editor.hooks.journal.batches)
    editor.hooks.save_pretrained(place / f"process-{processes.rank}")
    (place / f"verdicts-{processes.rank}.json").write_text(json.dumps(verdicts))
    processes.everyone(True)
    if processes.is_first:
        editor.close()
        alone, verdicts = edited(ALONE)
        alone.save_pretrained(place / "alone")
        (place / "verdicts-alone.json").write_text(json.dumps(verdicts))
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("job")
    done = torchrun(SCRIPT, place, COACHHOOK_CACHE=str(place / "cache"))
    assert done.returncode == 0, done.stderr
    return place


def factors(folder: Path) -> dict[str, Any]:
    hooks = HookSet.from_pretrained(folder)
    return {
        f"{number}.{layer}.{name}": getattr(batch.layers[layer], name)
        for number, batch in enumerate(hooks.journal.batches)
        for layer in hooks.layers
        for name in ("residuals", "solutions", "keys", "fingerprints")
    }


def test_every_process_has_the_same_edits(job: Path) -> None:
    first, second = factors(job / "process-0"), factors(job / "process-1")
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_two_processes_edit_as_one_does(job: Path) -> None:
    alone, first = factors(job / "alone"), factors(job / "process-0")
    for name, wanted in alone.items():
        error = (first[name] - wanted).norm() / wanted.norm().clamp_min(1e-30)
        assert error < 1e-6, name
    verdicts = [json.loads((job / f"verdicts-{who}.json").read_text()) for who in ("alone", 0, 1)]
    assert verdicts[0] == verdicts[1] == verdicts[2]
    assert len(verdicts[0][0]) == 3
