"""A tiny model's folder, in which every test of the command line works."""

import shutil
from pathlib import Path

import pytest
import transformers

from tests.support.command_line import FACTS, SMALL, run, write_facts
from tests.support.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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
