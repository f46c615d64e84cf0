"""The ways a pass through a model with a memory may go: cut, padded, broken off, copied, at once
with others. Each is the plain pass, and without an open token the unedited model's, bit for bit."""

import copy
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coachhook import EditConfig, Editor, HookSet, StatisticsSource
from coachhook.errors import AttachError, CoachhookError
from coachhook.hooks.memory import MemoryHook, MemoryRows
from coachhook.models.passes import run_to
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
from tests.support.tiny import tiny_model, tiny_tokenizer

PROMPTS = [fact.prompt for fact in FACTS]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield with_rows(editor_of())


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_every_mode_says_the_same(mode: Any, edited: Editor, plain: Any) -> None:
    model = edited.model
    want = [*logits(model, PROMPTS[0]), *logits(plain, OTHER)]
    with mode():
        for text, one in zip((PROMPTS[0], OTHER), want, strict=True):
            embedded = model.get_input_embeddings()(ids_of(text))
            assert torch.equal(model(input_ids=ids_of(text)).logits, one)
            assert torch.equal(model(inputs_embeds=embedded).logits, one)


def test_switched_and_refreshed_in_inference_mode_it_still_trains(edited: Editor) -> None:
    want = logits(edited.model, PROMPTS[0])[0]
    with torch.inference_mode():
        edited.hooks.disable(0)
        edited.hooks.enable(0)
        edited.hooks.refresh()
    edited.hooks.refresh()
    found = edited.model(input_ids=ids_of(PROMPTS[0])).logits
    found.sum().backward()
    edited.model.zero_grad()
    assert torch.equal(found, want)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0,)], ids=str)
def test_a_pass_over_nothing(shape: tuple[int, ...], edited: Editor) -> None:
    """Not every model gets through one, but hooks do."""
    hidden = torch.zeros(*shape, edited.model.config.hidden_size)
    for number in WRITES:
        block = edited.model.model.layers[number]
        if number == GATE:
            assert block.mlp(hidden).shape == hidden.shape
        (hook,) = block._forward_hooks.values()
        assert hook(block, (hidden,), hidden) is None


@pytest.mark.parametrize("side", ["left", "right"])
def test_in_a_padded_batch_only_those_that_are_asked_receive_a_row(
    side: str, edited: Editor, plain: Any
) -> None:
    texts = [PROMPTS[0], OTHER, PROMPTS[1], "As I was told yesterday"]
    given = tiny_tokenizer(padding_side=side)(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        found, unedited = edited.model(**given).logits, plain(**given).logits
    mask = given["attention_mask"].bool()
    for i, text in enumerate(texts):
        torch.testing.assert_close(found[i][mask[i]], logits(edited.model, text)[0][0])
        assert torch.equal(found[i][mask[i]], unedited[i][mask[i]]) is (i in (1, 3))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("text", [PROMPTS[0], OTHER], ids=["open", "closed"])
def test_beams_and_a_static_cache(
    text: str, options: dict[str, Any], edited: Editor, plain: Any
) -> None:
    beams = options.get("num_beams", 1)
    found = edited.model.generate(ids_of(text), **OPTIONS, **options)
    wanted = edited.model.generate(ids_of(text), **OPTIONS, num_beams=beams, use_cache=False)
    assert torch.equal(found, wanted)
    unedited = plain.generate(ids_of(text), **OPTIONS, **options)
    assert torch.equal(found, unedited) is (text == OTHER)


def test_a_subject_cut_between_two_passes_opens_at_its_last_token(edited: Editor) -> None:
    model, ids = edited.model, ids_of(PROMPTS[0])
    assert ids.shape[1] - ids_of("They moved to").shape[1] > 2
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for cut in range(1, ids.shape[1]):
            first = model(input_ids=ids[:, :cut], use_cache=True)
            rest = model(input_ids=ids[:, cut:], past_key_values=first.past_key_values)
            joined = torch.cat([first.logits, rest.logits], dim=1)
            torch.testing.assert_close(joined, whole)
    assert not torch.allclose(whole[:, -1], logits(tiny_model("llama"), PROMPTS[0])[0][:, -1])


class BrokenError(Exception):
    """Raised in mid-pass."""


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("then", [PROMPTS[0], PROMPTS[1], OTHER])
def test_a_pass_broken_off_leaves_nothing_for_the_next(
    then: str, grad: bool, edited: Editor
) -> None:
    """Between the gate and the last write block: by an error, or to read a hidden state."""
    model = edited.model
    (want,) = logits(model, then)

    def fail(*_: Any) -> None:
        raise BrokenError

    with torch.set_grad_enabled(grad):
        handle = model.model.layers[WRITES[-1]].register_forward_pre_hook(fail)
        with pytest.raises(BrokenError):
            model(input_ids=ids_of(PROMPTS[0]))
        handle.remove()
        assert torch.equal(model(input_ids=ids_of(then)).logits, want)
        run_to(model.model.layers[GATE], model, {"input_ids": ids_of(PROMPTS[0])})
        assert torch.equal(model(input_ids=ids_of(then)).logits, want)


def test_blocks_by_themselves_receive_nothing_of_a_pass_that_is_over(
    edited: Editor, plain: Any
) -> None:
    inputs: dict[str, Tensor] = {}

    def keep(_: Any, args: Any, kwargs: Any) -> None:
        inputs.update(hidden=args[0].detach(), **kwargs)

    handle = edited.model.model.layers[2].register_forward_pre_hook(keep, with_kwargs=True)
    edited.model(input_ids=ids_of(PROMPTS[0]), use_cache=False)
    handle.remove()
    hidden = inputs.pop("hidden")
    found = edited.model.model.layers[2](hidden, **inputs)
    assert torch.equal(found, plain.model.layers[2](hidden, **inputs))


def test_threads_generate_at_once(edited: Editor, plain: Any) -> None:
    texts = [PROMPTS[0], OTHER, PROMPTS[1]]
    want = [edited.model.generate(ids_of(text), **OPTIONS) for text in texts]
    assert not torch.equal(want[0], plain.generate(ids_of(texts[0]), **OPTIONS))
    wrong: list[int] = []
    start = threading.Barrier(len(texts))

    def run(number: int) -> None:
        start.wait()
        for _ in range(4):
            found = edited.model.generate(ids_of(texts[number]), **OPTIONS)
            if not torch.equal(found, want[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_says_the_same_and_its_hooks_come_off(
    copied: Any, edited: Editor, plain: Any
) -> None:
    twin = copied(edited.model)
    texts = (*PROMPTS, OTHER)
    for one, other in zip(logits(twin, *texts), logits(edited.model, *texts), strict=True):
        assert torch.equal(one, other)
    edited.hooks.detach(twin)
    for one, other in zip(logits(twin, *texts), logits(plain, *texts), strict=True):
        assert torch.equal(one, other)
    assert not any(isinstance(m, MemoryHook | MemoryRows) for m in twin.modules())
    assert not torch.equal(logits(edited.model, PROMPTS[0])[0], logits(plain, PROMPTS[0])[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_moved_to_another_dtype_it_is_as_if_attached_there(
    dtype: torch.dtype, edited: Editor, tmp_path: Path
) -> None:
    edited.save_pretrained(tmp_path / "edits")
    hooks = HookSet.from_pretrained(tmp_path / "edits")
    moved, there = tiny_model("llama"), tiny_model("llama").to(dtype)
    hooks.attach(moved)
    moved.to(dtype)
    hooks.attach(there, check=False)
    for one, other in zip(
        logits(moved, *PROMPTS, OTHER), logits(there, *PROMPTS, OTHER), strict=True
    ):
        assert one.dtype == dtype
        assert torch.equal(one, other)
    hooks.detach()
    assert not torch.equal(one, logits(there, PROMPTS[1])[0])


def test_a_second_set_of_either_readout_is_refused(edited: Editor, tmp_path: Path) -> None:
    edited.save_pretrained(tmp_path / "edits")
    other = HookSet.from_pretrained(tmp_path / "edits")
    want = logits(edited.model, PROMPTS[0])[0]
    with pytest.raises(AttachError, match="already has hooks attached; detach those first"):
        other.attach(edited.model)
    other.detach(edited.model)
    source = StatisticsSource(n_tokens=512)
    with pytest.raises(CoachhookError, match=r"has hooks attached.*; detach the hooks first"):
        Editor.from_pretrained(
            edited.model,
            tiny_tokenizer(),
            config=EditConfig(readout="delta", layers=(1,), statistics=source),
        )
    assert torch.equal(logits(edited.model, PROMPTS[0])[0], want)
