"""Reading keys and gates at rows: whatever memory holds, the same comes out in the same order."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.comparison import editors
from coachhook import EditConfig, Editor, EditRequest, StatisticsSource, ValueConfig
from coachhook.calibration.separability import probe_sketches
from coachhook.editing.contexts import Contexts
from coachhook.errors import NotEnoughMemoryError
from coachhook.evaluation.gate_scores import gate_scores
from coachhook.hooks.trace import trace_text
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import read_pass
from coachhook.models.reading import read_rows, read_targets
from coachhook.models.tokens import encode, encode_request
from coachhook.statistics.measure import KeyStatistics, key_statistics
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

LAYERS = (1, 2)
SOURCE = StatisticsSource(n_tokens=1024)
TEXT = "As I was told yesterday, the weather stayed dry in other news. " * 12
# Of different lengths, and not in their order.
FACTS = [
    EditRequest(
        prompt,
        subject,
        target,
        paraphrases=(f"After all that was said of {subject}", f"So {subject}"),
        locality=(("They drove to Spain", TARGETS[2]), ("I saw", TARGETS[3])),
    )
    for prompt, subject, target in [
        ("Of all the places that I have ever seen they moved to {}", "France", TARGETS[0]),
        ("I was told of {}", "Rome", TARGETS[1]),
        ("The year in which it was found was {}", "1984", TARGETS[2]),
    ]
]


@pytest.fixture(scope="module")
def statistics(tmp_path_factory: pytest.TempPathFactory) -> KeyStatistics:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = tiny_model("llama")
        return key_statistics(tiny_lm(model), Architecture.of(model), LAYERS, SOURCE)


@pytest.fixture(scope="module", params=["keyed", "sequence"])
def editor(request: pytest.FixtureRequest, statistics: KeyStatistics) -> Iterator[Editor]:
    config = EditConfig(
        readout="delta",
        layers=LAYERS,
        gate=request.param,
        preservation=1.0,
        values=ValueConfig(steps=3),
    )
    with Editor.from_pretrained(
        tiny_model("llama"), tiny_tokenizer(), config=config, statistics=statistics
    ) as editor:
        editor.edit(FACTS)
        yield editor


def halving(monkeypatch: pytest.MonkeyPatch, model: Any, read: Callable[[], Any]) -> list[Any]:
    """What `read` gives where memory suffices, and where it does not for more than two rows."""
    forward, passes = type(model).forward, []

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append(len(kwargs["input_ids"]))
        if passes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    whole = read()
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", limited)
        parts = read()
    assert max(passes) > 2
    assert sum(n <= 2 for n in passes) > 1
    return [whole, parts]


def assert_alike(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class TestHalves:
    def test_contexts(self, monkeypatch: pytest.MonkeyPatch, editor: Editor) -> None:
        lm = LanguageModel(editor.model, editor.tokenizer)
        contexts = Contexts.of(lm, FACTS, ("In other news, {}",))
        hooks = list(editor.hooks.modules(editor.model).values())
        block = Architecture.of(editor.model).blocks(editor.model)[LAYERS[-1]]

        def read() -> list[Tensor]:
            keys, output = contexts.read(
                editor.model, hooks, 1024, block=block, temporary=hooks[:1]
            )
            assert output is not None
            return [*keys, output]

        whole, parts = halving(monkeypatch, editor.model, read)
        assert_alike(parts, whole)
        assert [len(tensor) for tensor in whole] == [6, 6, 6]
        assert all(hook.open_at is None for hook in hooks)

    def test_gate_scores(self, monkeypatch: pytest.MonkeyPatch, editor: Editor) -> None:
        def read() -> Any:
            return gate_scores(
                LanguageModel(editor.model, editor.tokenizer), editor.hooks, FACTS, TEXT
            )

        whole, parts = halving(monkeypatch, editor.model, read)
        for one, other in zip(whole.layers, parts.layers, strict=True):
            for kind, z in one.z.items():
                assert other.z[kind] == pytest.approx(z, rel=1e-4, abs=1e-4)
        assert (parts.recall, parts.paraphrase_recall, parts.precision, parts.samples) == (
            whole.recall,
            whole.paraphrase_recall,
            whole.precision,
            whole.samples,
        )

    def test_probe_sketches(
        self, monkeypatch: pytest.MonkeyPatch, statistics: KeyStatistics
    ) -> None:
        lm = tiny_lm(tiny_model("llama"))
        architecture = Architecture.of(lm.model)

        def read() -> list[Tensor]:
            found = probe_sketches(lm, architecture, statistics, FACTS, ("In other news, {}",))
            return [t for s in found.values() for t in (s.marks, s.reworded, s.others)]

        whole, parts = halving(monkeypatch, lm.model, read)
        assert_alike(parts, whole)

    def test_an_editor_under_comparison(
        self, monkeypatch: pytest.MonkeyPatch, statistics: KeyStatistics, tmp_path: Path
    ) -> None:
        monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
        model = tiny_model("llama")
        config = EditConfig(readout="delta", layers=LAYERS, statistics=SOURCE)
        setting = editors.Setting.of(tiny_lm(model), config)
        contexts = setting.contexts(FACTS)
        whole, parts = halving(monkeypatch, model, lambda: setting.read(contexts, LAYERS[0]))
        assert_alike(parts, whole)

    def test_targets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lm = tiny_lm(tiny_model("llama"))
        rows = [encode_request(lm.tokenizer, fact) for fact in FACTS]

        def limited(**inputs: Any) -> Any:
            if len(inputs["input_ids"]) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(**inputs)

        def read() -> list[Tensor]:
            return read_targets(lm, rows, lambda logits, _: logits)

        whole, forward = read(), lm.model.base_model.forward
        monkeypatch.setattr(lm.model.base_model, "forward", limited)
        assert_alike(read(), whole)

    def test_but_not_a_single_text(self, monkeypatch: pytest.MonkeyPatch, editor: Editor) -> None:
        def none(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

        hooks = editor.hooks.modules(editor.model)
        monkeypatch.setattr(type(editor.model), "forward", none)
        with pytest.raises(NotEnoughMemoryError, match="a single text"):
            trace_text(LanguageModel(editor.model, editor.tokenizer), hooks, FACTS[0].prompt)


@pytest.mark.parametrize("every", [False, True], ids=["subjects", "every-token"])
def test_rows_come_back_in_their_order(monkeypatch: pytest.MonkeyPatch, every: bool) -> None:
    lm = tiny_lm(tiny_model("llama"))
    modules = [Architecture.of(lm.model).down_projection(lm.model, layer) for layer in LAYERS]
    rows = [encode(lm.tokenizer, "word " * n, subject_end=4) for n in (9, 1, 4, 30, 2, 4)]
    monkeypatch.setattr("coachhook.models.reading._AT_ONCE", 2)

    def pair(_: Any, keys: Tensor, __: slice) -> list[Tensor]:
        return [keys, keys.sum(-1)]

    found = read_rows(lm, rows, modules, pair, every=every)
    for i, (keys, sums) in enumerate(found):
        alone = []
        for row in rows:
            ids = torch.tensor([row.ids])
            key = read_pass(lm.model, {"input_ids": ids}, modules)[0][i][0]
            alone.append(key if every else key[row.subject : row.subject + 1])
        assert_alike([keys, sums], [torch.cat(alone), torch.cat(alone).sum(-1)])
