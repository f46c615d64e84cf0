"""The main job on the real small model: what the README promises, on the facts that ship."""

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

import coachhook as ch
from coachhook.evaluation.evaluate import Evaluation, evaluate
from coachhook.evaluation.metrics import first_choices, target_hits
from coachhook.evaluation.ordinary_text import ordinary_text, perplexity
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import complete, greedy, starts_with
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model
from coachhook.models.tokens import encode, encode_request
from tests.support.command_line import environment, run_json, write_facts
from tests.support.model_facts import BATCH, FACTS, MORE, answers, open_in_background

pytestmark = pytest.mark.slow
# Half of the page: the whole of it, and more, is read by bench.editing.consecutive.
PAGE = ordinary_text()[:6000]


@pytest.fixture(scope="module")
def editor() -> Iterator[ch.Editor]:
    """An editor after the demo's three consecutive batches; tests leave it as it was."""
    editor = ch.Editor.from_pretrained("smollm2")
    for first in range(0, len(FACTS), BATCH):
        editor.edit(FACTS[first : first + BATCH])
    yield editor
    editor.close()


@pytest.fixture(scope="module")
def live(editor: ch.Editor) -> list[EditRequest]:
    return [edit.request for edit in editor.hooks.journal.live()]


@pytest.fixture(scope="module")
def saved(editor: ch.Editor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hooks") / "edits"
    editor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def scores(editor: ch.Editor, live: list[EditRequest]) -> Evaluation:
    with pytest.MonkeyPatch.context() as patch:
        # As many as a target and an answer have; nothing here asks for the natural stop.
        patch.setattr("coachhook.evaluation.evaluate._NEW_TOKENS", 8)
        return evaluate(LanguageModel(editor.model, editor.tokenizer), editor.hooks, live, PAGE)


class TestMetrics:
    def test_reliability(self, scores: Evaluation) -> None:
        assert scores.reliability.teacher_forced is not None
        assert scores.reliability.greedy is not None
        assert scores.reliability.teacher_forced >= 0.98
        assert scores.reliability.greedy >= 0.95
        assert scores.before_reliability < 0.3

    def test_first_batch_is_retained(self, scores: Evaluation) -> None:
        assert scores.retention[1] >= 0.98

    def test_generality(self, scores: Evaluation) -> None:
        assert scores.generality.teacher_forced is not None
        assert scores.generality.teacher_forced >= 0.40

    def test_locality(self, scores: Evaluation) -> None:
        assert scores.locality.teacher_forced is not None
        assert scores.locality.teacher_forced >= 0.98

    def test_ordinary_text_is_left_alone(self, scores: Evaluation) -> None:
        assert scores.perplexity_after == pytest.approx(scores.perplexity_before, rel=0.005)
        assert scores.divergence == pytest.approx(0, abs=0.005)
        assert scores.gate is not None
        assert scores.gate.ordinary <= 0.0005

    def test_gates_know_the_subjects(self, scores: Evaluation) -> None:
        assert scores.gate is not None
        assert scores.gate.recall >= 0.99
        assert scores.gate.precision is not None
        assert scores.gate.precision >= 0.9


class TestGeneration:
    def test_with_a_cache_as_without(self, editor: ch.Editor, live: list[EditRequest]) -> None:
        for request in live[:2]:
            inputs = editor.tokenizer(request.prompt, return_tensors="pt")
            args = {"max_new_tokens": 12, "do_sample": False}
            cached = editor.model.generate(**inputs, **args)
            plain = editor.model.generate(**inputs, **args, use_cache=False)
            assert torch.equal(cached, plain)

    def test_padded_in_a_batch_as_alone(self, editor: ch.Editor, live: list[EditRequest]) -> None:
        prompts = [request.prompt for request in live[:4]]
        lm = LanguageModel(editor.model, editor.tokenizer)
        together = complete(lm, prompts, 12)
        alone = [complete(lm, [p], 12)[0] for p in prompts]
        assert together == alone

    def test_in_a_bfloat16_copy(self, saved: Path, live: list[EditRequest]) -> None:
        model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
        with ch.HookSet.from_pretrained(saved).attached(model):
            assert sum(answers(model, tokenizer, live)) >= 0.9 * len(live)

    def test_in_a_deep_copy(self, editor: ch.Editor, live: list[EditRequest]) -> None:
        twin = copy.deepcopy(editor.model)
        assert all(answers(twin, editor.tokenizer, live[:3]))

    def test_under_autocast(self, editor: ch.Editor, live: list[EditRequest]) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert sum(answers(editor.model, editor.tokenizer, live[:5])) >= 4

    def test_compiled(self, editor: ch.Editor, live: list[EditRequest]) -> None:
        ids = editor.tokenizer(live[0].prompt, return_tensors="pt")
        compiled = torch.compile(editor.model, backend="eager", fullgraph=True)
        with torch.no_grad():
            # Not through the KV cache: whether that compiles is not ours to test.
            want = editor.model(**ids, use_cache=False).logits
            got = compiled(**ids, use_cache=False).logits
        torch.testing.assert_close(got, want)


class TestHooks:
    def test_off_the_model_nothing_is_left(self, editor: ch.Editor) -> None:
        fresh, _ = load_model("smollm2")
        hooked = dict(editor.model.state_dict())
        editor.hooks.detach(editor.model)
        try:
            state = editor.model.state_dict()
            assert list(state) == list(fresh.state_dict()) == list(hooked)
            assert all(torch.equal(state[k], v) for k, v in fresh.state_dict().items())
            assert not any(isinstance(m, ch.HookLinear) for m in editor.model.modules())
            ids = editor.tokenizer(FACTS[0].prompt, return_tensors="pt")
            with torch.no_grad():
                assert torch.equal(editor.model(**ids).logits, fresh(**ids).logits)
        finally:
            editor.hooks.attach(editor.model)

    def test_one_edit_switched_off_and_on(self, editor: ch.Editor) -> None:
        edit = editor.hooks.journal.live()[3]
        others = [e.request for e in editor.hooks.journal.live() if e.id != edit.id]
        before = answers(editor.model, editor.tokenizer, others)
        editor.hooks.disable(edit.id)
        try:
            assert answers(editor.model, editor.tokenizer, [edit.request]) == [False]
            assert answers(editor.model, editor.tokenizer, others) == before
        finally:
            editor.hooks.enable(edit.id)
        assert answers(editor.model, editor.tokenizer, [edit.request]) == [True]

    def test_trace_names_the_edit(self, editor: ch.Editor) -> None:
        edit = editor.hooks.journal.live()[0]
        trace = editor.hooks.trace(editor.model, editor.tokenizer, edit.request.prompt)
        named = trace.edit[trace.is_open]
        assert len(named) >= len(trace.layers)
        assert (named == edit.id).all()
        last = trace.is_open.any(0).nonzero().max().item()
        assert edit.request.subject.endswith(trace.tokens[int(last)].strip())

    def test_loaded_on_a_fresh_model(self, editor: ch.Editor, saved: Path) -> None:
        model, tokenizer = load_model("smollm2")
        inputs = tokenizer(FACTS[2].prompt, return_tensors="pt")
        with torch.no_grad(), ch.HookSet.from_pretrained(saved).attached(model):
            assert torch.equal(model(**inputs).logits, editor.model(**inputs).logits)

    def test_resume_and_rollback_then_the_command_line(self, saved: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(saved, tmp_path / "edits"))
        editor = ch.Editor.resume(folder)
        assert all(answers(editor.model, editor.tokenizer, FACTS[10:20]))
        editor.rollback(1)
        assert all(answers(editor.model, editor.tokenizer, FACTS[:10]))
        assert not any(answers(editor.model, editor.tokenizer, FACTS[10:20]))
        editor.close()
        editor.hooks.save_pretrained(folder)
        # What was edited before the rollback can be edited again.
        again = [(fact.prompt, fact.subject, fact.target) for fact in FACTS[10:12]]
        write_facts(tmp_path / "facts.jsonl", again)
        facts = str(tmp_path / "facts.jsonl")
        document = run_json("edit", "smollm2", facts, "--hooks", str(folder))
        assert [batch["batch"] for batch in document["batches"]] == [2]
        assert [edit["verdict"] for edit in document["batches"][0]["edits"]] == ["applied"] * 2
        prompt, _, target = again[0]
        command = [sys.executable, "-m", "coachhook", "generate", "smollm2", prompt]
        command += ["--hooks", str(folder), "--json"]
        done = subprocess.run(
            command, env=environment(), capture_output=True, text=True, check=True
        )
        assert starts_with(json.loads(done.stdout)["edited"], target)
        assert done.stderr == ""


def test_sixty_consecutive_edits(editor: ch.Editor, scores: Evaluation) -> None:
    for first in range(0, len(MORE), BATCH):
        editor.edit(MORE[first : first + BATCH])
    try:
        journal, lm = editor.hooks.journal, LanguageModel(editor.model, editor.tokenizer)
        in_force = [edit.request for edit in journal.live()]
        assert len(in_force) >= 56
        rows = [encode_request(lm.tokenizer, request) for request in in_force]
        hits = target_hits(lm, rows)
        assert fmean(hits) >= 0.98
        first_ids = {id(edit.request) for edit in journal.batches[0].edits}
        kept = [h for h, request in zip(hits, in_force, strict=True) if id(request) in first_ids]
        assert fmean(kept) >= 0.98
        after = perplexity(lm, PAGE)
        assert after == pytest.approx(scores.perplexity_before, rel=0.005)
        assert open_in_background(editor) <= 0.0005
        # Asked of near neighbours of what is edited, as csrc_notes/editing-gates.md has it.
        beside = [encode(lm.tokenizer, p.prompt, p.answer) for r in in_force for p in r.locality]
        edited = first_choices(lm, beside)
        with editor.hooks.off(lm.model):
            plain = first_choices(lm, beside)
        same = [float((a == b).float().mean()) for a, b in zip(edited, plain, strict=True)]
        assert fmean(same) >= 0.85
    finally:
        editor.rollback(len(FACTS) // BATCH)


def test_background_tokens_stay_closed(editor: ch.Editor) -> None:
    assert open_in_background(editor) <= 0.0005


def test_unusable_edits_leave_no_trace(editor: ch.Editor) -> None:
    before = len(editor.hooks.edits)
    long = "word " * 9000
    with pytest.raises(ch.CoachhookError, match="context"):
        editor.edit([ch.EditRequest(f"{long} The capital of Peru is", "Peru", "Bonn")])
    with pytest.raises(ch.CoachhookError, match="Bonn"):
        editor.edit(
            [
                ch.EditRequest("The capital of Peru is", "Peru", "Bonn"),
                ch.EditRequest("The capital of Peru is", "Peru", "Kyoto"),
            ]
        )
    assert len(editor.hooks.edits) == before
    assert all(answers(editor.model, editor.tokenizer, FACTS[10:12]))


def greedy_tokens(editor: ch.Editor, prompt: str) -> list[int]:
    ids = editor.tokenizer(prompt, return_tensors="pt")
    lm = LanguageModel(editor.model, editor.tokenizer)
    new = greedy(lm, ids["input_ids"], ids["attention_mask"], 8)
    return [int(token) for token in new[0]]


def test_an_interrupted_batch_leaves_no_trace(
    editor: ch.Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = greedy_tokens(editor, FACTS[0].prompt)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("coachhook.editor.judge", stop)
        with pytest.raises(KeyboardInterrupt):
            editor.edit([ch.EditRequest("The capital of Kenya is", "Kenya", "Bonn")])
    assert len(editor.hooks.journal.batches) == len(FACTS) // BATCH
    assert greedy_tokens(editor, FACTS[0].prompt) == before
    hooks = editor.hooks.modules(editor.model).values()
    assert all(hook.state is ch.HookState.VALIDATED for hook in hooks)
