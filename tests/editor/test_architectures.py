"""The whole engine on tiny random models of every listed architecture."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coachhook import (
    BatchReport,
    EditConfig,
    Editor,
    EditRequest,
    HookLinear,
    HookSet,
    StatisticsSource,
    ValueConfig,
    Verdict,
)
from coachhook.editing.values import optimise_values
from coachhook.errors import ArchitectureError
from coachhook.models.architecture import DOWN_PROJECTIONS, Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import hidden_of, read_pass
from coachhook.models.tokens import Row, encode_request
from coachhook.statistics.measure import KeyStatistics, key_statistics
from tests.support.tiny import KINDS, LAYERS, TARGETS, tiny_model, tiny_tokenizer

HOOKED = (1, 2)
# A random model has no facts to move along, so the shift may be large and is not held back; and
# with 64 channels any key is like some ordinary one, so more of those may open a gate.
CONFIG = EditConfig(
    readout="delta",
    layers=HOOKED,
    preservation=1.0,
    false_alarms=0.02,
    statistics=StatisticsSource(n_tokens=2048),
    values=ValueConfig(steps=40, rate=0.3, clamp=8.0, kl=0.0, decay=0.0),
)
FACTS = [
    EditRequest("They moved to {}", "France", TARGETS[0]),
    EditRequest("I was told of {}", "Rome", TARGETS[1]),
    EditRequest("The year was {}", "1984", TARGETS[2]),
]
LATER = EditRequest("We think of {}", "Brazil", TARGETS[3])
# Edited and ordinary prompts of different lengths.
PROMPTS = [*(fact.prompt for fact in FACTS), "Yes", "It rained, and the streets were wet again"]


@dataclass(frozen=True)
class Case:
    """flipped: embeddings tied where the architecture leaves them untied, and the reverse."""

    kind: str
    bos: bool
    padding_side: str
    flipped: bool

    def __str__(self) -> str:
        bos, tied = ("bos" if self.bos else "bare"), ("flipped" if self.flipped else "default")
        return f"{self.kind}-{bos}-{self.padding_side}-{tied}"

    def model(self) -> PreTrainedModel:
        tied = is_tied(tiny_model(self.kind))
        seed = 2 * KINDS.index(self.kind) + self.bos
        model = tiny_model(self.kind, seed=seed, tied=tied != self.flipped)
        assert is_tied(model) == (tied != self.flipped)
        return model

    def tokenizer(self) -> PreTrainedTokenizerFast:
        return tiny_tokenizer(bos=self.bos, padding_side=self.padding_side)


@dataclass(frozen=True)
class Edited:
    """An editor after one batch, where it was saved, and its model as it was before."""

    case: Case
    editor: Editor
    report: BatchReport
    folder: Path
    modules: dict[str, nn.Module]
    state: dict[str, Tensor]
    logits: Tensor


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COACHHOOK_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(
    scope="module",
    params=[
        Case(kind, bos, side, flipped)
        for kind in KINDS
        for bos, side, flipped in ((False, "right", False), (True, "left", True))
    ],
    ids=str,
)
def edited(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Edited:
    case: Case = request.param
    model, tokenizer = case.model(), case.tokenizer()
    modules = dict(model.named_modules())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    logits = logits_of(model, tokenizer)
    editor = Editor.from_pretrained(model, tokenizer, config=CONFIG)
    report = editor.edit(FACTS)
    folder = tmp_path_factory.mktemp("hooks")
    editor.save_pretrained(folder)
    return Edited(case, editor, report, folder, modules, state, logits)


def is_tied(model: PreTrainedModel) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def logits_of(model: Any, tokenizer: Any) -> Tensor:
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits


def generate(model: Any, tokenizer: Any, prompts: list[str], **options: Any) -> list[list[int]]:
    """Eight greedy tokens after each prompt, padded on the left."""
    batch = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    out = model.generate(
        **batch, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **options
    )
    new: list[list[int]] = out[:, batch["input_ids"].shape[1] :].tolist()
    return new


def assert_tells(editor: Editor, facts: list[EditRequest]) -> None:
    for fact in facts:
        want = encode_request(editor.tokenizer, fact).target
        got = generate(editor.model, editor.tokenizer, [fact.prompt])[0]
        assert tuple(got[: len(want)]) == want, fact.prompt


def test_edit_reaches_its_targets(edited: Edited) -> None:
    assert [edit.request for edit in edited.report.edits] == FACTS
    assert all(edit.verdict is not Verdict.REFUSED for edit in edited.report.edits)
    assert_tells(edited.editor, FACTS)
    edited_logits = logits_of(edited.editor.model, edited.editor.tokenizer)
    assert not torch.equal(edited_logits[: len(FACTS)], edited.logits[: len(FACTS)])


def test_gate_opens_at_the_subject_and_names_its_edit(edited: Edited) -> None:
    model, tokenizer = edited.editor.model, edited.editor.tokenizer
    for number, fact in enumerate(FACTS):
        at = encode_request(tokenizer, fact).subject
        batch = tokenizer(fact.prompt, return_tensors="pt")
        hooks = edited.editor.hooks.modules(model).values()
        # One layer may be without it: where this random model gives it the key of first words.
        written = [hook for hook in hooks if number in hook.gate.owner]
        assert len(written) >= len(HOOKED) - 1
        for hook in written:
            keys: list[Tensor] = []
            handle = hook.register_forward_pre_hook(lambda _, args, seen=keys: seen.append(args[0]))
            with torch.no_grad():
                model(**batch)
            handle.remove()
            reading = hook.read(keys[0].reshape(-1, keys[0].shape[-1])[at])
            assert reading.is_open
            assert reading.edit == number


def test_saved_hooks_edit_a_fresh_copy_alike(edited: Edited) -> None:
    fresh, tokenizer = edited.case.model(), edited.case.tokenizer()
    hooks = HookSet.from_pretrained(edited.folder)
    with hooks.attached(fresh):
        assert torch.equal(logits_of(fresh, tokenizer), logits_of(edited.editor.model, tokenizer))
    assert torch.equal(logits_of(fresh, tokenizer), edited.logits)


def test_cached_generation_equals_uncached(edited: Edited) -> None:
    model, tokenizer = edited.editor.model, edited.editor.tokenizer
    cached = generate(model, tokenizer, PROMPTS, use_cache=True)
    assert cached == generate(model, tokenizer, PROMPTS, use_cache=False)


def test_generation_in_a_padded_batch_equals_generation_alone(edited: Edited) -> None:
    model, tokenizer = edited.editor.model, edited.editor.tokenizer
    alone = [generate(model, tokenizer, [prompt])[0] for prompt in PROMPTS]
    assert generate(model, tokenizer, PROMPTS) == alone


def test_off_and_detach_give_the_model_back_bit_for_bit(edited: Edited) -> None:
    editor, hooks = edited.editor, edited.editor.hooks
    with hooks.off(editor.model):
        assert torch.equal(logits_of(editor.model, editor.tokenizer), edited.logits)
    hooked = logits_of(editor.model, editor.tokenizer)
    hooks.detach(editor.model)
    try:
        assert torch.equal(logits_of(editor.model, editor.tokenizer), edited.logits)
        state = editor.model.state_dict()
        assert list(state) == list(edited.state)
        assert all(torch.equal(state[name], value) for name, value in edited.state.items())
        modules = dict(editor.model.named_modules())
        assert list(modules) == list(edited.modules)
        assert all(modules[name] is module for name, module in edited.modules.items())
    finally:
        hooks.attach(editor.model)
    assert torch.equal(logits_of(editor.model, editor.tokenizer), hooked)


def test_editing_goes_on_from_the_folder(edited: Edited) -> None:
    editor = Editor.resume(edited.folder, edited.case.model(), edited.case.tokenizer())
    report = editor.edit([LATER])
    assert report.number == 2
    assert_tells(editor, [*FACTS, LATER])


@pytest.mark.parametrize("gate", ["keyed", "calibrated", "sequence"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_two_batches_under_each_gate(kind: str, gate: str) -> None:
    config = replace(CONFIG, gate=gate, calibrated_alpha=1.0)
    editor = Editor.from_pretrained(tiny_model(kind, seed=50), tiny_tokenizer(), config=config)
    editor.edit(FACTS)
    editor.edit([LATER])
    assert_tells(editor, [LATER])


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_sequence_gate_ignores_padding(kind: str, padding_side: str) -> None:
    """OPT flattens batch and sequence before its FFN, the others do not."""
    config = replace(CONFIG, gate="sequence")
    tokenizer = tiny_tokenizer(padding_side=padding_side)
    editor = Editor.from_pretrained(tiny_model(kind, seed=50), tokenizer, config=config)
    editor.edit(FACTS)
    together = logits_of(editor.model, tokenizer)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    for prompt, row, length in zip(PROMPTS, together, lengths, strict=True):
        real = row[:length] if padding_side == "right" else row[-length:]
        with torch.no_grad():
            alone = editor.model(**tokenizer(prompt, return_tensors="pt")).logits[0]
        torch.testing.assert_close(real, alone, rtol=1e-4, atol=1e-4)


def test_sequence_gate_sees_a_mask_given_by_position() -> None:
    config = replace(CONFIG, gate="sequence")
    tokenizer = tiny_tokenizer()
    editor = Editor.from_pretrained(tiny_model("llama", seed=50), tokenizer, config=config)
    editor.edit(FACTS)
    batch = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        by_name = editor.model(**batch).logits
        by_position = editor.model(batch["input_ids"], batch["attention_mask"]).logits
    assert torch.equal(by_position, by_name)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_sequence_gate_keeps_sequences_of_a_batch_apart_without_a_mask(kind: str) -> None:
    config = replace(CONFIG, gate="sequence")
    tokenizer = tiny_tokenizer()
    editor = Editor.from_pretrained(tiny_model(kind, seed=50), tokenizer, config=config)
    editor.edit(FACTS)
    ids = tokenizer(FACTS[0].prompt, return_tensors="pt")["input_ids"]
    other = torch.randint(3, 300, (2, ids.shape[1]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = editor.model(input_ids=ids).logits
        together = editor.model(input_ids=torch.cat([ids, other])).logits[:1]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_the_values_is_what_a_full_pass_gives(kind: str) -> None:
    """Skipping lower blocks and the text left of the subject must not change the objective."""
    model, tokenizer = tiny_model(kind), tiny_tokenizer(bos=True)
    architecture = Architecture.of(model)
    context = "As I was told yesterday, {}"
    settings = ValueConfig(steps=3, rate=0.3, contexts=(context,), gain=0.7, enough=0.0)
    facts = [
        EditRequest("The capital of {} is", "France", "Lyon or so"),
        EditRequest("In the year {} they", "1984", "built"),
        FACTS[1],
    ]
    values = optimise_values(
        LanguageModel(model, tokenizer), architecture, HOOKED[-1], facts, settings
    )
    block = architecture.blocks(model)[HOOKED[-1]]
    for fact, hidden, loss in zip(facts, values.hidden, values.loss, strict=True):
        texts = ("{}", context)
        rows = [encode_request(tokenizer, fact, text, stop=settings.stop) for text in texts]
        bare = torch.tensor([rows[0].ids])
        _, origin = read_pass(model, {"input_ids": bare}, output_of=block)
        assert origin is not None
        shift = hidden - origin[0, rows[0].subject]
        assert shift.norm() > 0
        losses = [
            shifted_loss(model, block, row, gain * shift)
            for row, gain in zip(rows, (1.0, settings.gain), strict=True)
        ]
        assert loss.item() == pytest.approx(sum(losses) / 2, rel=1e-4)


def shifted_loss(model: Any, block: nn.Module, row: Row, shift: Tensor) -> float:
    """Mean negative log-likelihood of a row's target with `shift` added to what `block` puts out
    at its subject, by a pass over the whole row."""

    def move(_: nn.Module, __: Any, output: Any) -> Any:
        states = hidden_of(output).clone()
        states[0, row.subject] += shift
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = block.register_forward_hook(move)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row.ids])).logits[0]
    handle.remove()
    log_p = logits[-row.n_target - 1 : -1].log_softmax(-1)
    return -log_p.gather(-1, torch.tensor(row.target)[:, None]).mean().item()


def test_a_tokenizer_without_a_padding_token_will_do() -> None:
    model, tokenizer = tiny_model("gpt2", seed=70), tiny_tokenizer(pad=False)
    assert tokenizer.pad_token_id is None
    editor = Editor.from_pretrained(model, tokenizer, config=CONFIG)
    editor.edit(FACTS)
    assert_tells(editor, FACTS)


def test_unknown_architecture_names_the_known_ones_and_takes_a_template(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    model.config.model_type = "mystery"
    with pytest.raises(ArchitectureError) as caught:
        Editor.from_pretrained(model, tokenizer, config=CONFIG)
    assert "'mystery'" in str(caught.value)
    assert all(kind in str(caught.value) for kind in KINDS)
    assert not any(isinstance(module, HookLinear) for module in model.modules())

    config = replace(CONFIG, template="model.layers.{}.mlp.down_proj")
    editor = Editor.from_pretrained(model, tokenizer, config=config)
    editor.edit(FACTS)
    assert_tells(editor, FACTS)
    editor.save_pretrained(tmp_path)
    fresh = tiny_model("llama")
    fresh.config.model_type = "mystery"
    with HookSet.from_pretrained(tmp_path).attached(fresh):
        assert torch.equal(logits_of(fresh, tokenizer), logits_of(editor.model, tokenizer))


@pytest.mark.parametrize(
    "template",
    ["model.layers.{}.mlp.nothing", "model.layers.mlp", "nowhere.{}.mlp.down_proj", "{}.down_proj"],
)
def test_wrong_template_is_named(template: str) -> None:
    config = EditConfig(readout="delta", template=template)
    with pytest.raises(ArchitectureError, match="template"):
        Editor.from_pretrained(tiny_model("llama"), tiny_tokenizer(), config=config)


def test_every_registered_name_is_a_template() -> None:
    assert set(KINDS) <= set(DOWN_PROJECTIONS)
    for kind in KINDS:
        model = tiny_model(kind)
        architecture = Architecture.of(model)
        assert len(architecture.blocks(model)) == LAYERS


class TestStatisticsCache:
    """Cached statistics serve the model and tokenizer they were measured with, and no other."""

    source = StatisticsSource(n_tokens=256)

    def measure(self, model: Any, tokenizer: Any) -> KeyStatistics:
        return key_statistics(
            LanguageModel(model, tokenizer), Architecture.of(model), (1,), self.source
        )

    def test_second_call_reads_the_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, tokenizer = tiny_model("llama", seed=60), tiny_tokenizer()
        first = self.measure(model, tokenizer)
        monkeypatch.setattr(
            "coachhook.statistics.measure._measure", lambda *_: pytest.fail("measured")
        )
        second = self.measure(tiny_model("llama", seed=60), tokenizer)
        assert torch.equal(first[1].moment, second[1].moment)
        assert torch.equal(first[1].background, second[1].background)

    def test_other_weights_below_the_layer_are_another_model(self) -> None:
        model, other = tiny_model("llama", seed=61), tiny_model("llama", seed=61)
        with torch.no_grad():
            other.get_submodule("model.layers.0.self_attn.v_proj").weight.mul_(3)
        first, second = (self.measure(m, tiny_tokenizer())[1] for m in (model, other))
        assert not torch.equal(first.moment, second.moment)

    def test_tokenizer_with_a_bos_is_another_one(self) -> None:
        model = tiny_model("llama", seed=62)
        first, second = (self.measure(model, tiny_tokenizer(bos=bos))[1] for bos in (False, True))
        assert not torch.equal(first.moment, second.moment)
