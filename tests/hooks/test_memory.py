"""The memory readout on models: closed it changes no bit, open it adds its rows, in every mode."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from coachhook import Editor, EditRequest, HookSet
from coachhook.errors import AttachError, BaseModelMismatchError, CorruptFolderError
from coachhook.hooks.memory import LEAST_ROOM, OFF, Entries, MemoryHook, MemoryRows
from coachhook_kernels.memory.reference import memory_gate as memory_reference
from tests.support.memory_readout import (
    FACTS,
    GATE,
    OTHER,
    WRITES,
    editor_of,
    ids_of,
    logits,
    with_rows,
)
from tests.support.tiny import KINDS, TARGETS, tiny_model, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield with_rows(editor_of())


@pytest.mark.parametrize("kind", KINDS)
def test_closed_it_changes_no_bit_and_open_it_changes_what_follows(kind: str) -> None:
    editor = editor_of(kind)
    before = logits(editor.model, OTHER, FACTS[0].prompt)
    with_rows(editor)
    reading = editor.hooks.trace(editor.model, editor.tokenizer, FACTS[0].prompt)
    assert reading.is_open.any()
    assert reading.edit[0, reading.is_open[0]].tolist() == [0]
    after = logits(editor.model, OTHER, FACTS[0].prompt)
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])
    editor.close()
    again = logits(editor.model, OTHER, FACTS[0].prompt)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    assert not any(isinstance(m, MemoryHook | MemoryRows) for m in editor.model.modules())


def test_an_open_token_receives_its_edit_s_rows_after_every_write_block(edited: Editor) -> None:
    seen: dict[int, list[Tensor]] = {block: [] for block in WRITES}
    blocks = edited.model.model.layers
    handles = [
        blocks[block].register_forward_hook(
            lambda _, __, output, at=seen[block]: at.append(output.clone())
        )
        for block in WRITES
    ]
    logits(edited.model, FACTS[1].prompt)
    with edited.hooks.off(edited.model):
        logits(edited.model, FACTS[1].prompt)
    for handle in handles:
        handle.remove()
    rows = edited.hooks.journal.rows(GATE, len(WRITES), edited.model.config.hidden_size)
    added = seen[WRITES[0]][0] - seen[WRITES[0]][1]
    opened = edited.hooks.trace(edited.model, edited.tokenizer, FACTS[1].prompt).is_open[0]
    assert opened.sum() == 1
    torch.testing.assert_close(added[0, opened][0], rows[1, 0].float())
    assert torch.equal(added[0, ~opened], torch.zeros_like(added[0, ~opened]))
    # The second row comes on top of what the second block made of the first.
    further = seen[WRITES[1]][0] - seen[WRITES[1]][1]
    assert not torch.allclose(further[0, opened][0], added[0, opened][0])


def test_with_a_cache_in_batches_and_padded_it_says_the_same(edited: Editor) -> None:
    model, tokenizer = edited.model, edited.tokenizer
    texts = [FACTS[0].prompt, FACTS[1].prompt + " and they", OTHER]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = [
        model.generate(ids_of(text), use_cache=cached, **options)[0, -6:].tolist()
        for cached in (True, False)
        for text in texts
    ]
    assert alone[:3] == alone[3:]
    padded = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")
    together = model.generate(
        padded["input_ids"], attention_mask=padded["attention_mask"], **options
    )
    assert together[:, -6:].tolist() == alone[:3]
    with edited.hooks.off(model):
        unedited = model.generate(ids_of(texts[0]), **options)[0, -6:].tolist()
    assert unedited != alone[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_and_autocast(edited: Editor, dtype: torch.dtype) -> None:
    model = copy.deepcopy(edited.model).to(dtype)
    plain = tiny_model("llama").to(dtype)
    assert torch.equal(logits(model, OTHER)[0], logits(plain, OTHER)[0])
    assert not torch.equal(logits(model, FACTS[0].prompt)[0], logits(plain, FACTS[0].prompt)[0])
    with torch.autocast("cpu", dtype):
        one, other = logits(edited.model, OTHER)[0], logits(tiny_model("llama"), OTHER)[0]
        assert torch.equal(one, other)


def test_a_copy_has_a_memory_of_its_own(edited: Editor) -> None:
    model = copy.deepcopy(edited.model)
    before = logits(edited.model, FACTS[0].prompt)[0]
    for module in model.modules():
        if isinstance(module, MemoryRows):
            module.rows.zero_()
    assert torch.equal(logits(edited.model, FACTS[0].prompt)[0], before)
    assert torch.equal(
        logits(model, FACTS[0].prompt)[0], logits(tiny_model("llama"), FACTS[0].prompt)[0]
    )


def test_the_state_is_the_unedited_model_s(edited: Editor) -> None:
    assert edited.model.state_dict().keys() == tiny_model("llama").state_dict().keys()


def test_edits_are_switched_in_place(edited: Editor) -> None:
    before = logits(edited.model, *[fact.prompt for fact in FACTS])
    plain = logits(tiny_model("llama"), *[fact.prompt for fact in FACTS])
    edited.hooks.disable(0)
    now = logits(edited.model, *[fact.prompt for fact in FACTS])
    assert torch.equal(now[0], plain[0])
    assert torch.equal(now[1], before[1])
    edited.hooks.enable(0)
    again = logits(edited.model, *[fact.prompt for fact in FACTS])
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


def test_threads_do_not_read_each_other(edited: Editor) -> None:
    texts = [FACTS[0].prompt, FACTS[1].prompt + " and they", OTHER, FACTS[0].prompt + " again"]
    want = logits(edited.model, *texts)
    wrong = []

    def run(number: int) -> None:
        for _ in range(30):
            if not torch.equal(logits(edited.model, texts[number])[0], want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_gradients_are_those_with_the_rows_as_constants(edited: Editor) -> None:
    model, ids = edited.model, ids_of(FACTS[0].prompt)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits[0, -1].square().sum().backward()
        found.append(embedded.grad)
        model.zero_grad()
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(found[0], found[1])
    assert found[0].abs().max() > 0


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_whole_it_follows_edits_without_compiling_again() -> None:
    editor = with_rows(editor_of())
    model = editor.model
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    counts = torch._dynamo.utils.counters["stats"]
    texts = (FACTS[0].prompt, OTHER)
    with torch.no_grad():
        for text in texts:
            got = compiled(input_ids=ids_of(text)).logits
            torch.testing.assert_close(got, logits(model, text)[0])
        before = counts["unique_graphs"]
        editor.hooks.disable(0)
        got = compiled(input_ids=ids_of(texts[0])).logits
        torch.testing.assert_close(got, logits(tiny_model("llama"), texts[0])[0])
        editor.hooks.enable(0)
        shape = (1, len(WRITES), model.config.hidden_size)
        editor.edit([EditRequest("We think of {}", "Brazil", TARGETS[3])], values=torch.ones(shape))
        got = compiled(input_ids=ids_of("We think of Brazil")).logits
        torch.testing.assert_close(got, logits(model, "We think of Brazil")[0])
    assert counts["unique_graphs"] == before


def test_it_grows_beyond_its_first_room() -> None:
    editor = editor_of()
    facts = [
        EditRequest("They moved to {}", f"Rome {i}", TARGETS[0]) for i in range(LEAST_ROOM + 3)
    ]
    shape = (len(facts), len(WRITES), editor.model.config.hidden_size)
    editor.edit(facts, values=torch.ones(shape))
    hook = editor.hooks.modules(editor.model)[GATE]
    assert hook.fingerprints.shape[0] > LEAST_ROOM
    own = hook.enabled & (hook.edit >= 0)
    assert int(own.sum()) == len(editor.hooks.journal.fingerprints(GATE, 64)[0])


def test_more_than_a_hundred_thousand_entries() -> None:
    """Held, matched and added as one is; the second time nothing grows."""
    n, d, size = 100_001, 8, 8
    random = torch.Generator().manual_seed(0)
    marks = normalize(torch.randn(n, size, generator=random), dim=-1)
    site, block = nn.Identity(), nn.Identity()
    hook = MemoryHook(torch.eye(size, d), torch.zeros(size), site)
    rows = MemoryRows(hook, d, is_last=True)
    for _ in range(2):
        rows.hold(torch.arange(n).float()[:, None].expand(n, d))
        hook.hold(Entries(marks, torch.arange(n), torch.arange(n)), 0.9999)
    assert len(hook.fingerprints) == len(rows.rows) == 2**17
    places = torch.tensor([0, 1, 65_535, 65_536, 100_000])
    keys = torch.cat([marks[places], -marks[places]])
    hook.switch(torch.arange(n).masked_fill(torch.arange(n) == 1, OFF))
    hook.watch(site, (keys,))
    assert rows.add(block, (keys,), added := torch.zeros(10, d)) is None
    score, _ = memory_reference(keys, hook.gate(hook.row))
    assert score[1] < 0.9999 <= score[[0, 2, 3, 4]].min()
    is_open = score >= 0.9999
    assert torch.equal(added[:5, 0], torch.where(is_open[:5], places, 0.0))
    best = (keys @ marks.T).argmax(1)
    assert torch.equal(added[:, 0], torch.where(is_open, best, 0.0))


def test_saved_loaded_resumed_rolled_back_and_compacted_it_is_the_same(tmp_path: Path) -> None:
    editor = with_rows(editor_of())
    more = EditRequest("We think of {}", "Brazil", TARGETS[3])
    first = logits(editor.model, *[fact.prompt for fact in FACTS])
    shape = (1, len(WRITES), editor.model.config.hidden_size)
    editor.edit([more], values=torch.ones(shape))
    texts = [*[fact.prompt for fact in FACTS], more.prompt, OTHER]
    want = logits(editor.model, *texts)
    editor.save_pretrained(tmp_path / "edits")
    model = tiny_model("llama")
    hooks = HookSet.from_pretrained(tmp_path / "edits")
    with hooks.attached(model):
        got = logits(model, *texts)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        with pytest.raises(AttachError, match="already"):
            hooks.attach(model)
    hooks.compact()
    hooks.save_pretrained(tmp_path / "edits")
    compacted = HookSet.from_pretrained(tmp_path / "edits")
    with compacted.attached(model):
        got = logits(model, *texts)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    editor.close()
    resumed = Editor.resume(tmp_path / "edits", model, tiny_tokenizer())
    last = EditRequest("The year was {}", "1984", TARGETS[2])
    resumed.edit([last], values=torch.ones(shape))
    resumed.rollback(2)
    got = logits(resumed.model, *texts)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    resumed.close()
    again = with_rows(editor_of())
    again.edit([more], values=torch.ones(shape))
    again.rollback(1)
    got = logits(again.model, *[fact.prompt for fact in FACTS])
    assert all(torch.equal(a, b) for a, b in zip(got, first, strict=True))


def test_another_model_is_refused(tmp_path: Path) -> None:
    with_rows(editor_of()).save_pretrained(tmp_path / "edits")
    hooks = HookSet.from_pretrained(tmp_path / "edits")
    with pytest.raises(BaseModelMismatchError, match="made for"):
        hooks.attach(tiny_model("llama", seed=1))


def test_rows_that_cannot_be_read_leave_no_hook_behind(tmp_path: Path) -> None:
    with_rows(editor_of()).save_pretrained(tmp_path / "edits")
    hooks = HookSet.from_pretrained(tmp_path / "edits")
    (batch,) = (tmp_path / "edits").glob("batch-*.safetensors")
    batch.write_bytes(batch.read_bytes()[:-8])
    model = tiny_model("llama")
    with pytest.raises(CorruptFolderError, match="truncated"):
        hooks.attach(model)
    assert not any(isinstance(m, MemoryHook | MemoryRows) for m in model.modules())
    assert torch.equal(logits(model, OTHER)[0], logits(tiny_model("llama"), OTHER)[0])


def two_hooks() -> tuple[MemoryHook, MemoryRows, Tensor]:
    """A gate of three entries and their rows, and keys of which the second opens the last entry."""
    torch.manual_seed(0)
    keys = torch.randn(1, 2, 16)
    memory = MemoryHook(torch.eye(8, 16), torch.zeros(8), torch.nn.Identity())
    part = MemoryRows(memory, 16, is_last=True)
    marks = torch.nn.functional.normalize(torch.randn(3, 8), dim=-1)
    marks[2] = torch.nn.functional.normalize(keys[0, 1, :8], dim=-1)
    memory.hold(Entries(marks, torch.arange(3), torch.arange(3)), 0.95)
    part.hold(torch.randn(3, 16))
    return memory, part, keys


def run_two_hooks(memory: MemoryHook, part: MemoryRows, keys: Tensor) -> Tensor:
    output = keys.clone()
    memory.watch(memory.site, (keys,))
    part.add(memory.site, (keys,), output)
    return output


@torch.no_grad()
def test_on_a_cpu_closed_tokens_leave_nothing_for_later_blocks_and_room_is_not_read() -> None:
    memory, part, keys = two_hooks()
    memory.watch(memory.site, (keys[:, :1],))
    assert memory.passing.get() is None
    memory.watch(memory.site, (keys,))
    assert memory.passing.get() is not None
    wanted = keys.clone()
    wanted[0, 1] += part.rows[2]
    assert torch.equal(run_two_hooks(memory, part, keys), wanted)
    assert len(memory.fingerprints) == LEAST_ROOM
    gate = memory.gate(memory.row)
    assert [len(gate.fingerprints), len(gate.owner), len(gate.enabled)] == [3, 3, 3]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_on_closed_tokens_it_holds_for_open_ones_and_later_edits() -> None:
    memory, part, keys = two_hooks()
    closed = keys[:, :1].expand(1, 2, 16).contiguous()
    traced = torch.jit.trace(
        lambda given: run_two_hooks(memory, part, given), (closed,), check_trace=False
    )
    assert torch.equal(traced(keys), run_two_hooks(memory, part, keys))
    marks = torch.cat([memory.fingerprints[:2].flip(0).repeat(2, 1), memory.fingerprints[2:3]])
    memory.hold(Entries(marks, torch.arange(5), torch.tensor([0, 1, 0, 1, 2])), 0.95)
    assert not torch.equal(traced(keys), keys)
    assert torch.equal(traced(keys), run_two_hooks(memory, part, keys))
