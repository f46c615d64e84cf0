"""Key statistics shared among processes: each has the whole, and one goes on where two stopped."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coachhook.statistics.measure import KeyStatistics
from tests.support.jobs import torchrun
from tests.support.measuring import LENGTH, SAMPLED, SEQUENCES, measure, stop_at, write_text
from tests.support.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("small_shards")


def assert_close(ours: KeyStatistics, theirs: dict[str, torch.Tensor]) -> None:
    for layer, found in ours.items():
        moment = theirs[f"moment.{layer}"]
        assert (found.moment - moment).abs().max() <= 1e-6 * moment.abs().max()
        assert torch.equal(found.background, theirs[f"background.{layer}"])
        assert torch.equal(found.first, theirs[f"first.{layer}"])


JOB = """
import os, signal, sys, time
from pathlib import Path
from safetensors.torch import save_file
from tests.support.tiny import tiny_lm, tiny_model
from coachhook.cli import app as cli
from coachhook.statistics import text as corpus
from coachhook.errors import StatisticsError
from coachhook.statistics.sums import KeySums
from coachhook.models.architecture import Architecture
from coachhook.system.processes import joined
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.measure import key_statistics

place = Path(sys.argv[1])
n_tokens, corpus.SEQUENCE_LENGTH, corpus.SHARD_SEQUENCES = map(int, os.environ["SIZES"].split())
model = tiny_model("llama", seed=7)
sources = {
    "sampled": StatisticsSource(n_tokens=n_tokens),
    "file": StatisticsSource(str(place / "text.txt"), n_tokens=100_000),
}
with joined() as job:
    for name, source in sources.items():
        found = key_statistics(
            tiny_lm(model), Architecture.of(model), (1, 2), source, job
        )
        tensors = {}
        for layer, s in found.items():
            tensors |= {f"{k}.{layer}": getattr(s, k) for k in ("moment", "background", "first")}
        save_file(tensors, place / f"{name}-{job.rank}.safetensors")
    other = tiny_model("llama", seed=job.rank)
    try:
        key_statistics(tiny_lm(other), Architecture.of(other), (1,), None, job)
    except StatisticsError as error:
        (place / f"refused-{job.rank}").write_text(str(error))

add = KeySums.add

def killed(self, reader, shard, *args):
    if shard.number == 3:
        # Not before both have something to go on from.
        while len(list((place / "killed" / "statistics").glob("*.partial"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    if shard.number == 4:
        time.sleep(100)
    add(self, reader, shard, *args)

KeySums.add = killed
os.environ["COACHHOOK_CACHE"] = str(place / "killed")
sys.argv[1:] = ["statistics", str(place / "model"), "--layers", "1-2", "--tokens", str(n_tokens)]
cli.main()
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a job of two processes, whose last command lost one; and what it printed."""
    place = tmp_path_factory.mktemp("job")
    write_text(place)
    tiny_model("llama", seed=7).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    outcome = torchrun(
        JOB,
        place,
        COACHHOOK_CACHE=str(place / "cache"),
        SIZES=f"{SAMPLED.n_tokens} {LENGTH} {SEQUENCES}",
        CUDA_VISIBLE_DEVICES="",
    )
    said = outcome.stdout + outcome.stderr
    assert (place / "file-1.safetensors").is_file(), said
    return place, said


@pytest.mark.slow  # A job of two processes, and its launcher.
class TestTwoProcesses:
    @pytest.fixture(autouse=True)
    def one_thread(self) -> Iterator[None]:
        """As each process of the job has: more of them may divide a product, and round it, in
        another way."""
        n_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(n_threads)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_sampled_text(self, job: tuple[Path, str], rank: int) -> None:
        assert_close(measure(), load_file(job[0] / f"sampled-{rank}.safetensors"))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_file_text(self, job: tuple[Path, str], tmp_path: Path, rank: int) -> None:
        ours = measure(write_text(tmp_path))
        assert_close(ours, load_file(job[0] / f"file-{rank}.safetensors"))

    @pytest.mark.parametrize("rank", [0, 1])
    def test_different_models_are_refused(self, job: tuple[Path, str], rank: int) -> None:
        assert "different models" in (job[0] / f"refused-{rank}").read_text()

    def test_the_survivor_stops_with_one_line_that_names_the_dead(
        self, job: tuple[Path, str]
    ) -> None:
        _, said = job
        (line,) = re.findall(r"^error: (.*)$", said, re.MULTILINE)
        (dead,) = re.findall(r"exitcode: -9\) local_rank: 1 \(pid: (\d+)\)", said)
        assert line.startswith(f"process 1 (pid {dead} on ")
        assert re.search(r"rank +: 0 .*\n +exitcode +: 2 ", said)

    def test_one_process_goes_on_where_two_were_stopped(
        self, job: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place, _ = job
        folder = place / "killed" / "statistics"
        assert {file.suffix for file in folder.iterdir()} == {".partial", ".lock"}
        monkeypatch.setenv("COACHHOOK_CACHE", str(place / "killed"))
        read = stop_at(monkeypatch, None)
        found = measure()
        assert {0, 1}.isdisjoint(read)
        assert {3, 4} <= set(read)
        assert_close(found, load_file(place / "sampled-0.safetensors"))
        assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".lock"}
