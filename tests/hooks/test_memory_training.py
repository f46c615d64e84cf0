"""The memory readout where gradients are wanted: blocks run again for them, LoRA on top of edits,
functional transforms."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from coachhook import Editor, HookSet
from coachhook.hooks.memory import MemoryRows
from tests.support.memory_readout import FACTS, OTHER, config, editor_of, ids_of, logits, with_rows
from tests.support.tiny import tiny_model, tiny_tokenizer

PROMPTS = tuple(fact.prompt for fact in FACTS)


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Editor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield with_rows(editor_of())


def embedded(model: Any, text: str) -> Tensor:
    found: Tensor = model.get_input_embeddings()(ids_of(text)).detach()
    return found


def in_this_thread(run: Callable[[], None]) -> None:
    run()


def in_another_thread(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()


def gradients(
    model: Any, texts: tuple[str, ...], backward: Callable[[Callable[[], None]], None]
) -> list[Tensor]:
    """In the embeddings of every text: all pass forward before any goes backward."""
    inputs = [embedded(model, text).requires_grad_() for text in texts]
    passed = [model(inputs_embeds=one, use_cache=False).logits[0, -1] for one in inputs]
    backward(torch.stack([one.square().sum() for one in passed]).sum().backward)
    model.zero_grad()
    assert all(one.grad is not None for one in inputs)
    return [one.grad for one in inputs if one.grad is not None]


@contextmanager
def run_again(model: Any, reentrant: bool) -> Iterator[list[int]]:
    """Inside, every block is checkpointed with its hooks, as by torch's `checkpoint_wrapper`
    (transformers' own checkpointing leaves hooks out of what is run again). The list is of the
    blocks that ran."""
    ran: list[int] = []
    blocks = model.model.layers
    (kind,) = {type(block) for block in blocks}

    class Checkpointed(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            run = partial(super().__call__, **kwargs)
            return checkpoint(run, *args, use_reentrant=reentrant)

    handles = [
        block.register_forward_pre_hook(lambda *_, n=number: ran.append(n))
        for number, block in enumerate(blocks)
    ]
    for block in blocks:
        block.__class__ = Checkpointed
    try:
        yield ran
    finally:
        for block, handle in zip(blocks, handles, strict=True):
            block.__class__ = kind
            handle.remove()


@pytest.mark.parametrize("backward", [in_this_thread, in_another_thread])
@pytest.mark.parametrize("texts", [PROMPTS[:1], (*PROMPTS, OTHER)], ids=len)
@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
def test_blocks_run_again_receive_what_they_received(
    reentrant: bool,
    texts: tuple[str, ...],
    backward: Callable[[Callable[[], None]], None],
    edited: Editor,
) -> None:
    """On a GPU autograd has threads of its own, and several passes may await their gradient."""
    want = gradients(edited.model, texts, in_this_thread)
    with run_again(edited.model, reentrant) as ran:
        found = gradients(edited.model, texts, backward)
    assert len(ran) == 2 * len(texts) * len(edited.model.model.layers)
    for one, other in zip(found, want, strict=True):
        assert torch.equal(one, other)


def test_a_pass_that_is_no_repetition_keeps_nothing_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tensor may go in again: soft prompts do, changed in place, and edits switched."""
    monkeypatch.setenv("COACHHOOK_CACHE", str(tmp_path))
    settings = config(gate_block=0, write_blocks=(0,))
    with Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=settings) as editor:
        model = editor.model
        editor.edit(FACTS, values=torch.ones(len(FACTS), 1, model.config.hidden_size))
        given = embedded(model, PROMPTS[0]).requires_grad_()
        before = model(inputs_embeds=given).logits
        editor.hooks.disable(0)
        (plain,) = logits(tiny_model("llama"), PROMPTS[0])
        assert not torch.equal(before, plain)
        assert torch.equal(model(inputs_embeds=given).logits, plain)
        editor.hooks.enable(0)
        assert torch.equal(model(inputs_embeds=given).logits, before)


def test_what_is_kept_for_the_gradient_goes_with_it(edited: Editor) -> None:
    parts = [part for part in edited.model.modules() if isinstance(part, MemoryRows)]
    for _ in range(5):
        gradients(edited.model, PROMPTS, in_this_thread)
    assert [len(part._kept._of_input) for part in parts] == [2, 2]


@pytest.mark.parametrize("text", [PROMPTS[0], OTHER], ids=["open", "closed"])
def test_functional_gradients(edited: Editor, text: str) -> None:
    model = copy.deepcopy(edited.model).double()

    def loss(given: Tensor) -> Tensor:
        found: Tensor = model(inputs_embeds=given).logits[0, -1].square().sum()
        return found

    (want,) = gradients(model, (text,), in_this_thread)
    torch.testing.assert_close(torch.func.grad(loss)(embedded(model, text)), want)


def test_lora_on_top_of_edits_and_edits_on_top_of_lora(edited: Editor, tmp_path: Path) -> None:
    """Adapters are trained beside the hooks; saved and merged, they hold nothing of them."""
    edited.save_pretrained(tmp_path / "edits")
    # After the gate's block: a random model's keys would not survive a step of training.
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[3])

    def adapted(model: Any) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(model, adapters)

    def trained(model: Any) -> Any:
        matrices = [p for name, p in model.named_parameters() if "lora_" in name]
        model(input_ids=ids_of(PROMPTS[0])).logits[0, -1].square().sum().backward()
        with torch.no_grad():
            for matrix in matrices:
                assert matrix.grad is not None
                matrix -= 0.01 * matrix.grad
        return model

    plain, hooked = tiny_model("llama"), tiny_model("llama")
    hooks = HookSet.from_pretrained(tmp_path / "edits")
    hooks.attach(hooked)
    lora, on_top = adapted(plain), trained(adapted(hooked))
    assert not torch.equal(logits(on_top, OTHER)[0], logits(lora, OTHER)[0])
    state = on_top.state_dict()
    assert state.keys() == lora.state_dict().keys()
    lora.load_state_dict(state)
    assert torch.equal(logits(on_top, OTHER)[0], logits(lora, OTHER)[0])
    edited_too = logits(on_top, PROMPTS[0])[0]
    assert not torch.equal(edited_too, logits(lora, PROMPTS[0])[0])
    hooks.detach(hooked)
    hooks.attach(plain, check=False)
    assert torch.equal(logits(lora, PROMPTS[0])[0], edited_too)
    hooks.detach(plain)
    merged = on_top.merge_and_unload()
    assert torch.equal(logits(merged, OTHER)[0], logits(lora.merge_and_unload(), OTHER)[0])
