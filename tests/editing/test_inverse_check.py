"""An inverse that is wrong is found out and made anew; what it holds; where and how it is kept."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coachhook.config import EditConfig, ValueConfig
from coachhook.editing import inverse as update
from coachhook.editing.inverse import Earlier, RecursiveInverse
from coachhook.editor import Editor
from coachhook.errors import ConfigError, StatisticsError
from coachhook.facts.request import EditRequest
from coachhook.statistics.source import StatisticsSource
from tests.support.closed_form import (
    D_IN,
    PRESERVATION,
    Harsh,
    closed_form,
    moment,
    random,
    relative_error,
    weighted,
)
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

Damage = Callable[[RecursiveInverse, float], None]


def scaled(solver: RecursiveInverse, size: float) -> None:
    solver.block_rows[0].mul_(1 + size)


def one_entry(solver: RecursiveInverse, size: float) -> None:
    solver.block_rows[0][7, 3] += 100 * size * solver.block_rows[0][7, 7]


def not_a_number(solver: RecursiveInverse, _: float) -> None:
    solver.block_rows[0][0, 0] = torch.nan


def lost(solver: RecursiveInverse, _: float) -> None:
    solver.block_rows.pop()


class TestCheck:
    @pytest.mark.parametrize("damage", [scaled, one_entry, not_a_number, lost])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_damage_is_repaired_before_anything_is_computed(
        self, dtype: torch.dtype, damage: Damage
    ) -> None:
        seen = [random(5, D_IN, seed=50)]
        solver = RecursiveInverse(moment(), PRESERVATION, lambda: Earlier(seen), dtype=dtype)
        seen.append(random(4, D_IN, seed=51))
        solver.absorb(seen[-1])
        damage(solver, 1e-5 if dtype == torch.float64 else 0.1)
        probe, keys = random(6, D_IN, seed=52), torch.cat(seen)
        want = closed_form(weighted(moment()) + keys.T @ keys, probe)
        allowed = 1e-10 if dtype == torch.float64 else 1e-5
        assert relative_error(solver.solve(probe, 1.0), want) <= allowed

    @pytest.mark.parametrize("size", [10.0**-i for i in range(1, 10)])
    def test_no_error_at_one_key_alone_gets_past_it(self, size: float) -> None:
        """The hardest to see: Q is right but for one direction, that of the key to be edited."""
        key = random(1, D_IN, seed=60)
        solver = RecursiveInverse(moment(), PRESERVATION)
        right = torch.linalg.solve(weighted(moment()), key.T).T
        solver.block_rows[0].add_(size / (key @ right.T).item() * right.T @ right)
        delta = solver.solve(key, fit=1.0)
        assert relative_error(delta, closed_form(weighted(moment()), key)) <= 2e-6

    def test_an_absorption_broken_off_half_way_is_noticed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Tensor] = []
        solver = RecursiveInverse(moment(), PRESERVATION, lambda: Earlier(seen))
        seen.append(random(5, D_IN, seed=50))

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(update, "_add_outer", interrupted)
            with pytest.raises(KeyboardInterrupt):
                solver.absorb(seen[0])
        probe = random(6, D_IN, seed=52)
        want = closed_form(weighted(moment()) + seen[0].T @ seen[0], probe)
        assert relative_error(solver.solve(probe, 1.0), want) <= 1e-10

    def test_a_float32_inverse_is_made_anew_when_it_has_drifted(self) -> None:
        harsh = Harsh(64, 150.0)
        solver = RecursiveInverse(harsh.moment, 150.0, harsh.earlier, dtype=torch.float32)
        assert harsh.run(solver, batches=60, n=10) <= 1e-2
        assert solver.block_rows[0].dtype == torch.float32
        assert 1 < harsh.times_made < 30

    def test_a_float32_inverse_without_the_check_would_be_useless(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the test above would say if nothing were ever made anew."""
        monkeypatch.setitem(update._ERROR, torch.float32, float("inf"))
        harsh = Harsh(64, 1.0)
        solver = RecursiveInverse(harsh.moment, 1.0, harsh.earlier, dtype=torch.float32)
        assert harsh.run(solver, batches=60, n=10) > 1e-2
        assert harsh.times_made == 1

    @pytest.mark.parametrize(
        ("dtype", "size", "remedy"),
        [(torch.float32, 1e6, "inverse_dtype to 'float64'"), (torch.float64, 1e11, "more text")],
        ids=str,
    )
    def test_what_even_a_new_inverse_cannot_hold_is_refused(
        self, dtype: torch.dtype, size: float, remedy: str
    ) -> None:
        """Rather than made anew for every batch, and wrong all the same."""
        huge = Earlier([size * random(3, D_IN, seed=1)])
        with pytest.raises(StatisticsError, match=remedy):
            RecursiveInverse(moment(), PRESERVATION, lambda: huge, dtype=dtype)


class Largest(TorchDispatchMode):
    """The most numbers that any operation inside it put into a tensor that was not there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in result if isinstance(result, tuple | list) else [result]:
            if isinstance(made, Tensor):
                storage = made.untyped_storage()
                if storage.data_ptr() not in self.known:
                    self.numbers = max(self.numbers, storage.nbytes() // 8)
        return result


class TestMemory:
    D = 500

    @pytest.fixture(autouse=True)
    def blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(update, "_BLOCK", 128)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
    def test_one_triangle_is_held_however_many_batches(self, dtype: torch.dtype) -> None:
        solver = RecursiveInverse(torch.eye(self.D), PRESERVATION, dtype=dtype)

        def held() -> int:
            return sum(block.untyped_storage().nbytes() for block in solver.block_rows)

        before = held()
        assert before <= 0.65 * self.D**2 * dtype.itemsize
        for number in range(3):
            solver.absorb(random(5, self.D, seed=number))
        assert held() == before

    def test_a_batch_makes_nothing_of_the_size_of_the_matrix(self) -> None:
        solver = RecursiveInverse(torch.eye(self.D), PRESERVATION)
        keys = random(10, self.D, seed=1)
        with Largest(solver.block_rows) as largest:
            solver.solve(keys, fit=20.0)
            solver.absorb(keys)
        assert len(keys) * self.D <= largest.numbers <= 2 * len(keys) * self.D


class TestSettings:
    @pytest.mark.parametrize(
        "settings",
        [
            {"inverse_dtype": "float16"},
            {"inverse_dtype": None},
            {"inverse_device": "mps"},
            {"inverse_device": "cuda:"},
            {"inverse_device": 0},
        ],
        ids=str,
    )
    def test_what_cannot_hold_an_inverse_is_refused(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(settings))):
            EditConfig(readout="delta", **settings)

    @pytest.mark.parametrize("device", [None, "cpu", "cuda", "cuda:1"])
    def test_they_come_back_from_json(self, device: str | None) -> None:
        config = EditConfig(readout="delta", inverse_dtype="float32", inverse_device=device)
        assert EditConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
]
LATER = [EditRequest("The year was {}", "1984", TARGETS[2])]


def editor(**settings: Any) -> Editor:
    config = EditConfig(
        readout="delta",
        layers=(1, 2),
        preservation=1.0,
        false_alarms=0.02,
        statistics=StatisticsSource(n_tokens=1024),
        values=ValueConfig(steps=3),
        **settings,
    )
    return Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=config)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def factors(editor: Editor) -> list[Tensor]:
    """What the last batch wrote, layer by layer."""
    written = editor.hooks.journal.batches[-1].layers
    assert all(len(written[layer].keys) for layer in written)
    return [written[layer].solutions for layer in written]


@pytest.fixture(scope="module")
def wanted() -> list[Tensor]:
    """The second batch, where nothing went wrong."""
    straight = editor()
    straight.edit(FACTS)
    straight.edit(LATER)
    return factors(straight)


class TestInTheEditor:
    def test_a_damaged_inverse_is_made_anew_from_the_journal(self, wanted: list[Tensor]) -> None:
        edited = editor()
        edited.edit(FACTS)
        for writer in edited._writing._writers.values():
            writer.solver.block_rows[0].mul_(1.01)
        edited.edit(LATER)
        torch.testing.assert_close(factors(edited), wanted, rtol=1e-6, atol=0)

    def test_interrupted_between_two_layers_no_key_counts_twice(
        self, wanted: list[Tensor], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        edited = editor()

        def interrupted(_: Tensor) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(edited._writing._writers[2].solver, "absorb", interrupted)
            with pytest.raises(KeyboardInterrupt):
                edited.edit(FACTS)
        edited.edit(FACTS)
        edited.edit(LATER)
        torch.testing.assert_close(factors(edited), wanted, rtol=1e-6, atol=0)

    def test_after_a_rollback_the_keys_taken_back_do_not_count(self, wanted: list[Tensor]) -> None:
        edited = editor()
        edited.edit(FACTS)
        edited.edit([EditRequest("We think of {}", "Brazil", TARGETS[3])])
        edited.rollback(1)
        edited.edit(LATER)
        torch.testing.assert_close(factors(edited), wanted, rtol=1e-6, atol=0)

    def test_resuming_counts_the_keys_of_earlier_batches(
        self, wanted: list[Tensor], tmp_path: Path
    ) -> None:
        edited = editor()
        edited.edit(FACTS)
        edited.save_pretrained(tmp_path)
        again = Editor.resume(tmp_path, tiny_model("llama"), tiny_tokenizer())
        again.edit(LATER)
        torch.testing.assert_close(factors(again), wanted, rtol=1e-6, atol=0)

    def test_float32_gives_nearly_the_same(self, wanted: list[Tensor]) -> None:
        edited = editor(inverse_dtype="float32")
        assert edited._writing._writers[1].solver.block_rows[0].dtype == torch.float32
        edited.edit(FACTS)
        edited.edit(LATER)
        torch.testing.assert_close(factors(edited), wanted, rtol=1e-2, atol=1e-4)

    def test_a_gpu_that_is_not_there_is_done_without(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            edited = editor(inverse_device="cuda:99")
        assert "no cuda:99 here" in caplog.text
        assert edited._writing._writers[1].solver.block_rows[0].device.type == "cpu"
