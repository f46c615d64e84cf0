"""Verdicts: whether a written edit took effect, judged by greedy decoding and by its gates."""

from coachhook.editing.contexts import Contexts
from coachhook.hookset import HookSet
from coachhook.journal.journal import Batch, EditRecord, Verdict
from coachhook.models.decoding import BEYOND_TARGET, complete, starts_with
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import encode_request


def judge(lm: LanguageModel, hooks: HookSet, batch: Batch) -> None:
    """Set the verdict of every edit of `batch`, the last in the attached hooks' journal."""
    requests = [edit.request for edit in batch.edits]
    longest = max(encode_request(lm.tokenizer, request).n_target for request in requests)
    prompts = [request.prompt for request in requests]
    answers = complete(lm, prompts, longest + BEYOND_TARGET)
    closed, unwritten = _gates_at_subjects(lm, hooks, batch)
    for i, edit in enumerate(batch.edits):
        if edit.verdict is not Verdict.REFUSED:
            everywhere = len(unwritten[i]) == len(hooks.layers)
            edit.verdict, edit.reason = _verdict(edit, answers[i], closed[i], everywhere)


def _gates_at_subjects(
    lm: LanguageModel, hooks: HookSet, batch: Batch
) -> tuple[list[list[int]], list[list[int]]]:
    """For each edit, the layers whose gate stays closed at its subject, and the layers it was not
    written to."""
    requests = [edit.request for edit in batch.edits]
    contexts = Contexts.of(lm, requests, ())
    modules = hooks.modules(lm.model)
    opened, _ = contexts.read(
        lm.model,
        list(modules.values()),
        hooks.config.values.tokens,
        what=lambda hook, keys, _: hook.read(keys).is_open,
    )
    closed: list[list[int]] = [[] for _ in requests]
    unwritten: list[list[int]] = [[] for _ in requests]
    for layer, is_open in zip(modules, opened, strict=True):
        for i in range(len(requests)):
            if not (batch.layers[layer].owner == i).any():
                unwritten[i].append(layer)
            elif not is_open[i]:
                closed[i].append(layer)
    return closed, unwritten


def _verdict(
    edit: EditRecord, answer: str, closed: list[int], unwritten: bool
) -> tuple[Verdict, str]:
    if unwritten:
        return Verdict.REFUSED, (
            "the key of the subject's last token cannot be told from ordinary text; "
            "let the prompt start with other words than the subject"
        )
    if not starts_with(answer, edit.request.target):
        return Verdict.WEAK, f"greedy decoding gives {answer.strip()[:40]!r}"
    if closed:
        layers = ", ".join(map(str, closed))
        return Verdict.WEAK, f"the gate stays closed at layer {layers}"
    return Verdict.APPLIED, ""
