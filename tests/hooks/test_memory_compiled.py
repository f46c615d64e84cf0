"""The memory readout in compiled models: whole, in parts, for every shape, in graphs on a GPU."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook import Editor, EditRequest
from coachhook.hooks.memory import LEAST_ROOM
from tests.support.memory_readout import (
    FACTS,
    OTHER,
    WRITES,
    editor_of,
    ids_of,
    logits,
    with_rows,
)
from tests.support.tiny import HIDDEN, TARGETS, tiny_model

PROMPTS = [fact.prompt for fact in FACTS]
PARTS = {
    "the gate's block": ["model.layers.1"],
    "the gate's FFN": ["model.layers.1.mlp"],
    "a write block": ["model.layers.2"],
    "every block": [f"model.layers.{i}" for i in range(3)],
}

WHOLE: dict[str, Any] = {"fullgraph": True, "dynamic": True, "backend": "eager"}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def model() -> Any:
    # No larger than it must be: compiling takes a second a block.
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture
def editor() -> Editor:
    return with_rows(editor_of(num_hidden_layers=3))


def graphs() -> int:
    """How many this test has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("parts", PARTS)
def test_of_a_model_compiled_in_parts_every_token_receives_its_row(
    parts: str, editor: Editor
) -> None:
    """The gate may be in a graph and the write blocks in none, and the other way round."""
    want, plain = logits(editor.model, *PROMPTS), logits(editor.model, OTHER)
    for name in PARTS[parts]:
        editor.model.get_submodule(name).compile(backend="eager")
    found: list[Tensor] = []

    def run() -> None:
        found.extend(logits(editor.model, *PROMPTS, *PROMPTS, OTHER))

    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    for one, other in zip(found, [*want, *want, *plain] * 2, strict=True):
        assert torch.equal(one, other)


def test_one_graph_for_every_shape_and_closed_it_is_the_unedited_model_s(editor: Editor) -> None:
    compiled = torch.compile(editor.model, **WHOLE)
    unedited = torch.compile(model(), **WHOLE)
    # Of one text alone torch makes another graph than of several.
    texts = (ids_of(PROMPTS[0]), ids_of(OTHER), ids_of(OTHER)[:, :5])
    batches = [ids.repeat(2 + i, 1) for i, ids in enumerate(texts)]
    with torch.no_grad():
        found = [compiled(input_ids=ids).logits for ids in batches]
        assert graphs() == 1
        for ids, one, opens in zip(batches, found, (True, False, False), strict=True):
            assert torch.equal(one, editor.model(input_ids=ids).logits)
            assert torch.equal(one, unedited(input_ids=ids).logits) is not opens


def test_compiled_before_hooks_come_or_go_it_follows_them(editor: Editor) -> None:
    """Compiled graphs are shared by models alike, and are not told of hooks."""
    hooks, text = editor.hooks, PROMPTS[0]
    edited = logits(editor.model, text)[0]
    other = model()
    plain = logits(other, text)[0]
    with torch.no_grad():
        compiled = torch.compile(other, **WHOLE)
        assert torch.equal(compiled(input_ids=ids_of(text)).logits, plain)
        with hooks.attached(other):
            assert torch.equal(compiled(input_ids=ids_of(text)).logits, edited)
            assert graphs() == 2
        assert torch.equal(compiled(input_ids=ids_of(text)).logits, plain)
        beside = torch.compile(editor.model, **WHOLE)
        assert torch.equal(beside(input_ids=ids_of(text)).logits, edited)
    assert "forward" not in vars(other.model.layers[1].mlp)


def test_rolled_back_and_grown_beyond_its_room_it_is_followed(editor: Editor) -> None:
    compiled = torch.compile(editor.model, **WHOLE)
    plain = logits(model(), *PROMPTS)

    def found(text: str) -> Tensor:
        with torch.no_grad():
            return compiled(input_ids=ids_of(text)).logits

    assert not torch.equal(found(PROMPTS[0]), plain[0])
    before = graphs()
    many = [EditRequest("We think of {}", f"Brazil {i}", TARGETS[3]) for i in range(LEAST_ROOM)]
    editor.edit(many, values=torch.ones(len(many), len(WRITES), HIDDEN))
    for text in (*PROMPTS, many[-1].prompt):
        torch.testing.assert_close(found(text), logits(editor.model, text)[0])
    grown = graphs()
    assert before < grown <= before + 2
    editor.rollback(0)
    assert torch.equal(found(PROMPTS[0]), plain[0])
    assert graphs() == grown


@pytest.mark.slow  # Inductor compiles C++.
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_reduce_overhead(editor: Editor) -> None:
    """Without a GPU there is nothing to reduce, but it must run."""
    unedited = torch.compile(model(), mode="reduce-overhead")
    compiled = torch.compile(editor.model, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        opened = compiled(input_ids=ids_of(PROMPTS[0])).logits
        torch.testing.assert_close(opened, logits(editor.model, PROMPTS[0])[0])
        editor.hooks.disable(0)
        closed = compiled(input_ids=ids_of(PROMPTS[0])).logits
        assert torch.equal(closed, unedited(input_ids=ids_of(PROMPTS[0])).logits)
        assert not torch.equal(closed, opened)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_edits_that_come_and_go(editor: Editor) -> None:
    edited, hooks = editor.model.to("cuda"), editor.hooks
    more = EditRequest("We think of {}", "Brazil", TARGETS[3])
    texts = [*PROMPTS, more.prompt, OTHER]
    longest = max(ids_of(text).shape[1] for text in texts)
    # Tokens behind those that are asked for change nothing of them.
    rows = [
        torch.nn.functional.pad(ids_of(text), (0, longest - ids_of(text).shape[1]))
        for text in texts
    ]
    ids = torch.cat(rows).to("cuda")
    stream = torch.cuda.Stream()

    @torch.no_grad()
    def run() -> Tensor:
        found: Tensor = edited(input_ids=ids, use_cache=False).logits
        return found

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    seen = []

    def same() -> None:
        graph.replay()
        assert torch.equal(captured, run())
        seen.append(captured.clone())

    same()
    hooks.disable(0)
    same()
    hooks.enable(0)
    same()
    editor.edit([more], values=torch.ones(1, len(WRITES), HIDDEN))
    same()
    editor.rollback(0)
    same()
    assert torch.equal(seen[2], seen[0])
    assert not any(torch.equal(seen[i], seen[j]) for i, j in ((0, 1), (2, 3), (3, 4)))
    with hooks.off(edited):
        assert torch.equal(run(), seen[4])
