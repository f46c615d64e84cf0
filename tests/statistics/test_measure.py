"""Key statistics at scale: interrupted, shared among processes, of any dtype; and what can fail."""

import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from transformers import AutoModelForCausalLM

from coachhook.errors import ModelError, StatisticsError
from coachhook.models.architecture import Architecture
from coachhook.statistics import measure as statistics
from coachhook.statistics import text as corpus
from coachhook.statistics.cache import divide
from coachhook.statistics.measure import KeyStatistics, key_statistics
from coachhook.statistics.source import StatisticsSource
from coachhook.statistics.sums import KeyReader, KeySums
from coachhook.statistics.text import Shard, TokenBatch
from tests.support.jobs import torchrun
from tests.support.tiny import D_FF, tiny_model, tiny_tokenizer

LAYERS = (1, 2)
LENGTH, SEQUENCES = 16, 8
# Five shards, of which the last is smaller.
SAMPLED = StatisticsSource(n_tokens=LENGTH * (4 * SEQUENCES + 3))
ADD = KeySums.add


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SEQUENCE_LENGTH", LENGTH)
    monkeypatch.setattr(corpus, "SHARD_SEQUENCES", SEQUENCES)


def measure(source: StatisticsSource = SAMPLED, model: Any = None) -> KeyStatistics:
    model = model or tiny_model("llama", seed=7)
    return key_statistics(model, tiny_tokenizer(), Architecture.of(model), LAYERS, source)


def leftovers(tmp_path: Path) -> list[str]:
    """What the cache holds beside finished files and locks."""
    folder = tmp_path / "cache" / "statistics"
    return [f.name for f in folder.iterdir() if f.suffix not in (".safetensors", ".lock")]


class Stopped(BaseException):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int | None) -> list[int]:
    """Have a pass stop before shard `number`; the list tells which shards are read."""
    read: list[int] = []

    def watched(self: KeySums, reader: KeyReader, shard: Shard, *args: Any) -> None:
        if shard.number == number:
            raise Stopped
        read.append(shard.number)
        ADD(self, reader, shard, *args)

    monkeypatch.setattr(KeySums, "add", watched)
    return read


def write_text(place: Path) -> StatisticsSource:
    """A file of paragraphs of 2 to 90 words, in an odd number of shards."""
    words = [
        "the",
        "weather",
        "stayed",
        "dry",
        "in",
        "other",
        "news",
        "as",
        "I",
        "was",
        "told",
        "yesterday",
        "Paris",
    ]
    lengths = [2 + (37 * i) % 89 for i in range(11)]
    text = "\n\n".join(" ".join((words * 9)[:n]) for n in lengths)
    (place / "text.txt").write_text(text)
    return StatisticsSource(str(place / "text.txt"), n_tokens=100_000)


def assert_close(ours: KeyStatistics, theirs: dict[str, torch.Tensor]) -> None:
    for layer, found in ours.items():
        moment = theirs[f"moment.{layer}"]
        assert (found.moment - moment).abs().max() <= 1e-6 * moment.abs().max()
        assert torch.equal(found.background, theirs[f"background.{layer}"])
        assert torch.equal(found.first, theirs[f"first.{layer}"])


class TestInterruption:
    def test_goes_on_from_its_last_shard_to_the_same_bits(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 3)
        with pytest.raises(Stopped):
            measure()
        assert len(leftovers(tmp_path)) == 1
        read = stop_at(monkeypatch, None)
        resumed = measure()
        assert len(read) < 5
        assert 4 in read
        assert leftovers(tmp_path) == []
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "another"))
        whole = measure()
        for layer in LAYERS:
            assert torch.equal(resumed[layer].moment, whole[layer].moment)
            assert torch.equal(resumed[layer].background, whole[layer].background)
        assert resumed[1].n_tokens == whole[1].n_tokens == SAMPLED.n_tokens

    def test_another_recipe_does_not_go_on_from_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stop_at(monkeypatch, 3)
        with pytest.raises(Stopped):
            measure()
        read = stop_at(monkeypatch, None)
        measure(StatisticsSource(n_tokens=SAMPLED.n_tokens, seed=1))
        assert read == [0, 1, 2, 3, 4]
        assert len(leftovers(tmp_path)) == 1

    @pytest.mark.parametrize("keep", [0, 40, -7])
    def test_a_broken_partial_file_is_removed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
    ) -> None:
        stop_at(monkeypatch, 1)
        with pytest.raises(Stopped):
            measure()
        (name,) = leftovers(tmp_path)
        partial = tmp_path / "cache" / "statistics" / name
        partial.write_bytes(partial.read_bytes()[:keep])
        # What a process killed while it wrote leaves behind.
        (partial.parent / f".writing-{name.split('.')[0]}-abc").write_text("half")
        read = stop_at(monkeypatch, None)
        measure()
        assert read == [0, 1, 2, 3, 4]
        assert leftovers(tmp_path) == []

    def test_no_shard_is_taken_up_twice(self) -> None:
        listings = [{"a": [0, 1], "b": [0, 1, 2], "d": [5]}, {"a": [0, 1], "c": [3, 4], "d": [5]}]
        taken = divide(listings)
        assert taken == [["b", "d"], ["c"]] or taken == [["b"], ["c", "d"]]

    def test_a_second_process_waits_and_finds_it_done(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        is_measuring, may_go_on = threading.Event(), threading.Event()
        read = stop_at(monkeypatch, None)
        watched = KeySums.add

        def held(self: KeySums, *args: Any) -> None:
            is_measuring.set()
            assert may_go_on.wait(30)
            watched(self, *args)

        monkeypatch.setattr(KeySums, "add", held)
        found: list[KeyStatistics] = []
        threads = [threading.Thread(target=lambda: found.append(measure())) for _ in range(2)]
        threads[0].start()
        assert is_measuring.wait(30)
        threads[1].start()
        while "waiting for it" not in caplog.text:
            assert threads[1].is_alive()
            time.sleep(0.01)
        may_go_on.set()
        for thread in threads:
            thread.join(30)
        assert read == [0, 1, 2, 3, 4]
        assert torch.equal(found[0][1].moment, found[1][1].moment)


JOB = """
import os, signal, sys, time
from pathlib import Path
from safetensors.torch import save_file
from tests.support.tiny import tiny_model, tiny_tokenizer
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
            model, tiny_tokenizer(), Architecture.of(model), (1, 2), source, job
        )
        tensors = {}
        for layer, s in found.items():
            tensors |= {f"{k}.{layer}": getattr(s, k) for k in ("moment", "background", "first")}
        save_file(tensors, place / f"{name}-{job.rank}.safetensors")
    other = tiny_model("llama", seed=job.rank)
    try:
        key_statistics(other, tiny_tokenizer(), Architecture.of(other), (1,), None, job)
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


class TestFaults:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
    def test_models_of_other_dtypes(self, dtype: torch.dtype) -> None:
        # Text of a file, because sampled text would differ where logits are rounded.
        ours = measure(self.text, tiny_model("llama", seed=7).to(dtype))
        reference = measure(self.text)
        for layer in LAYERS:
            assert ours[layer].moment.dtype == torch.float32
            scale = reference[layer].moment.abs().max()
            difference = (ours[layer].moment - reference[layer].moment).abs().max()
            assert difference <= (1e-5 if dtype == torch.float64 else 3e-2) * scale

    @pytest.fixture(autouse=True)
    def _text(self, tmp_path: Path) -> None:
        self.text = write_text(tmp_path)

    def test_a_batch_larger_than_memory_is_read_in_halves(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = measure(self.text)
        read = KeyReader.read

        def small(self: KeyReader, batch: TokenBatch) -> dict[int, torch.Tensor]:
            if 2 < len(batch.ids) <= SEQUENCES:
                raise torch.OutOfMemoryError("no room")
            return read(self, batch)

        monkeypatch.setattr(KeyReader, "read", small)
        monkeypatch.setattr(statistics, "_cached", lambda *_: None)
        halved = measure(self.text)
        for layer in LAYERS:
            torch.testing.assert_close(halved[layer].moment, whole[layer].moment)
            torch.testing.assert_close(halved[layer].background, whole[layer].background)

    def test_a_key_that_is_not_finite_is_named(self, tmp_path: Path) -> None:
        model, ids = tiny_model("llama", seed=7), [torch.empty(0)]
        seven = tiny_tokenizer()("7")["input_ids"][0]
        model.get_input_embeddings().register_forward_pre_hook(
            lambda _, args: ids.__setitem__(0, args[0])
        )
        model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(
            lambda _, args: args[0].masked_fill((ids[0] == seven).unsqueeze(-1), torch.inf)
        )
        with pytest.raises(
            StatisticsError, match=r"layer 1 .* the token '7', number \d+ .* in 'As in 1987, the"
        ):
            measure(self.odd_text(tmp_path), model)

    def test_a_model_that_is_not_finite_below_is_told_by_its_text(self, tmp_path: Path) -> None:
        model = tiny_model("llama", seed=7)
        with torch.no_grad():
            model.get_input_embeddings().weight[tiny_tokenizer()("7")["input_ids"][0]] = torch.nan
        with pytest.raises(StatisticsError, match=r"layer 1 .* every token of .* 'As in 19"):
            measure(self.odd_text(tmp_path), model)

    def odd_text(self, tmp_path: Path) -> StatisticsSource:
        text = "The weather was dry.\n\n" * 60 + "As in 1987, the weather."
        (tmp_path / "odd.txt").write_text(text)
        return StatisticsSource(str(tmp_path / "odd.txt"), n_tokens=100_000)

    def test_less_text_than_dimensions_is_measured_with_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        config = tiny_model("llama").config
        config.intermediate_size = 300
        model = AutoModelForCausalLM.from_config(config).eval()
        found = measure(StatisticsSource(n_tokens=256), model)
        assert found[1].moment.shape == (300, 300)
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "256 tokens" in warning
        assert "300 dimensions" in warning

    def test_by_default_as_much_text_as_the_keys_are_wide(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("coachhook.statistics.source._FEWEST_BY_DEFAULT", 256)
        assert measure(StatisticsSource())[1].n_tokens == 8 * D_FF

    def test_an_offloaded_model_is_the_same_model(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = accelerate.cpu_offload(tiny_model("llama", seed=7), torch.device("cpu"))
        assert model.device.type == "meta"
        offloaded = measure(self.text, model)
        with monkeypatch.context() as patch:
            patch.setattr(statistics, "_measure", lambda *_: pytest.fail("not found in the cache"))
            measure(self.text)
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "another"))
        assert torch.equal(offloaded[1].moment, measure(self.text)[1].moment)

    def test_weights_without_values(self) -> None:
        with pytest.raises(ModelError, match="meta device"):
            measure(self.text, tiny_model("llama").to("meta"))

    def test_divided_weights(self) -> None:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            model = tiny_model("llama")
            mesh = init_device_mesh("cpu", (1,))
            distribute_module(model.get_submodule("model.layers.1.mlp"), mesh)
            with pytest.raises(StatisticsError, match="divided among processes"):
                measure(self.text, model)
        finally:
            dist.destroy_process_group()
