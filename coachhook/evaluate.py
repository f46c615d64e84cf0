"""What the edits do: reliability, generality, locality, gates, perplexity, retention.

Definitions follow EasyEdit where it has them: a teacher-forced score is the share of target tokens
that are the model's first choice, averaged over records; locality is the share of answer tokens
whose first choice is the unedited model's. The same by greedy decoding with a KV cache, which
teacher forcing flatters: `greedy` when the completion starts with the target, `exact` when it is
the target up to its natural stop. What the records do not cover is None, never a number.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from coachhook.errors import ConfigError
from coachhook.forward import eval_mode, final_hidden, logits_of, read_pass
from coachhook.generation import complete, is_exactly, natural_stop, starts_with
from coachhook.hookset import HookSet
from coachhook.progress import track
from coachhook.requests import EditRequest
from coachhook.tokens import Row, check_length, context_length, encode, encode_request, pad

_AT_ONCE = 32
_NEW_TOKENS = 20
_PIECE = 256


@dataclass(frozen=True)
class Scores:
    """Means over records, 0 to 1, of the teacher-forced, greedy and exact forms of one metric."""

    teacher_forced: float | None
    greedy: float | None
    exact: float | None


@dataclass(frozen=True)
class GateScores:
    """Shares of tokens whose gate is open, over all hooked layers.

    recall: layers open at the subject's last token, in prompts and in paraphrases; ordinary: tokens
    of ordinary text open at any layer; locality: the same for locality prompts; precision: of all
    tokens of prompts, paraphrases and locality prompts open at a layer, how many are subjects'.
    """

    recall: float
    paraphrase_recall: float | None
    precision: float | None
    ordinary: float
    locality: float | None


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model with hooks on one list of requests. `before` are the unedited
    model's; perplexities are over the same ordinary text; retention: reliability by batch."""

    n_requests: int
    reliability: Scores
    generality: Scores
    locality: Scores
    before_reliability: float
    already_true: int
    gate: GateScores
    perplexity_before: float
    perplexity_after: float
    retention: dict[int, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    model: Any,
    tokenizer: Any,
    hooks: HookSet,
    requests: Sequence[EditRequest],
    text: str | None = None,
) -> Evaluation:
    """Evaluate `model`, on which `hooks` are attached, on `requests`; `text` is ordinary text for
    perplexity and false alarms (by default a page that comes with the package)."""
    if not requests:
        raise ConfigError("there is nothing to evaluate: the list of requests is empty")
    text = ordinary_text() if text is None else text
    paraphrases = [(i, p) for i, r in enumerate(requests) for p in r.paraphrases]
    local = [(i, p) for i, r in enumerate(requests) for p in r.locality]
    asked = [encode_request(tokenizer, request) for request in requests]
    reworded = [encode(tokenizer, p, requests[i].target) for i, p in paraphrases]
    beside = [encode(tokenizer, p.prompt, p.answer) for _, p in local]
    for row in (*asked, *reworded, *beside):
        check_length(row, context_length(model), "a prompt to evaluate")
    with eval_mode(model), track("evaluating", 10) as advance:

        def step(result: Any) -> Any:
            advance(1)
            return result

        with hooks.off(model):
            before = step(target_hits(model, tokenizer, asked))
            local_before = step(first_choices(model, tokenizer, beside))
            plain_local = step(_answers(model, tokenizer, [p.prompt for _, p in local]))
            perplexity_before = step(perplexity(model, tokenizer, text))
        hits = step(target_hits(model, tokenizer, asked))
        reworded_hits = step(target_hits(model, tokenizer, reworded))
        local_after = step(first_choices(model, tokenizer, beside))
        answers = step(_answers(model, tokenizer, [r.prompt for r in requests]))
        reworded_answers = step(_answers(model, tokenizer, [p for _, p in paraphrases]))
        edited_local = step(_answers(model, tokenizer, [p.prompt for _, p in local]))
        perplexity_after = perplexity(model, tokenizer, text)
        gate = _gates(model, tokenizer, hooks, requests, text)
    targets = [request.target for request in requests]
    agreement = [
        float((a == b).float().mean()) for a, b in zip(local_after, local_before, strict=True)
    ]
    same = [float(a == b) for a, b in zip(edited_local, plain_local, strict=True)]
    same_stop = [
        float(natural_stop(a) == natural_stop(b))
        for a, b in zip(edited_local, plain_local, strict=True)
    ]
    return Evaluation(
        n_requests=len(requests),
        reliability=Scores(fmean(hits), *_greedy(answers, targets)),
        generality=Scores(
            _per_record(reworded_hits, [i for i, _ in paraphrases]),
            *_greedy(reworded_answers, [targets[i] for i, _ in paraphrases]),
        ),
        locality=Scores(
            _per_record(agreement, [i for i, _ in local]),
            _per_record(same, [i for i, _ in local]),
            _per_record(same_stop, [i for i, _ in local]),
        ),
        before_reliability=fmean(before),
        already_true=sum(score == 1 for score in before),
        gate=gate,
        perplexity_before=perplexity_before,
        perplexity_after=perplexity_after,
        retention=_retention(hooks, requests, hits),
    )


def ordinary_text() -> str:
    """The page of ordinary English that comes with the package."""
    return files("coachhook").joinpath("data", "ordinary.txt").read_text(encoding="utf-8")


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Perplexity of `text`, read in pieces of at most `_PIECE` tokens.

    Raises `ConfigError` if it has fewer than two tokens.
    """
    total, count = 0.0, 0
    for ids in _pieces(model, tokenizer, text):
        piece = torch.tensor([ids], device=model.device)
        with torch.no_grad():
            final = final_hidden(model, input_ids=piece, use_cache=False).last_hidden_state
            log_p = logits_of(model, final[0, :-1]).log_softmax(-1)
        total -= float(log_p.gather(-1, piece[0, 1:, None]).sum())
        count += piece.shape[1] - 1
    return math.exp(total / count)


def _pieces(model: Any, tokenizer: Any, text: str) -> list[list[int]]:
    ids = tokenizer(text)["input_ids"]
    size = min(_PIECE, context_length(model) or _PIECE)
    pieces = [ids[i : i + size] for i in range(0, len(ids), size)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise ConfigError("the ordinary text has fewer than two tokens; give a page or more")
    return pieces


def first_choices(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[Tensor]:
    """First choice of the model for each target token of each row, int64 `(n_target,)`."""
    found: list[Tensor] = []
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        padded = pad(some, tokenizer.pad_token_id, model.device)
        with torch.no_grad():
            final = final_hidden(model, **padded.inputs(), use_cache=False).last_hidden_state
        for states, row in zip(final, some, strict=True):
            end = len(row.ids) - 1
            found.append(logits_of(model, states[end - row.n_target : end]).argmax(-1).cpu())
    return found


def target_hits(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[float]:
    """Share of each row's target tokens that are the model's first choice."""
    return [
        float((choice == torch.tensor(row.target)).float().mean())
        for choice, row in zip(first_choices(model, tokenizer, rows), rows, strict=True)
    ]


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    return complete(model, tokenizer, prompts, _NEW_TOKENS)


def _greedy(answers: Sequence[str], targets: Sequence[str]) -> tuple[float | None, float | None]:
    if not answers:
        return None, None
    pairs = list(zip(answers, targets, strict=True))
    return (
        fmean(starts_with(answer, target) for answer, target in pairs),
        fmean(is_exactly(answer, target) for answer, target in pairs),
    )


def _per_record(scores: Sequence[float], owners: Sequence[int]) -> float | None:
    """Mean over records of the mean over each record's scores."""
    by_record: dict[int, list[float]] = {}
    for score, owner in zip(scores, owners, strict=True):
        by_record.setdefault(owner, []).append(score)
    return fmean(map(fmean, by_record.values())) if by_record else None


def _retention(
    hooks: HookSet, requests: Sequence[EditRequest], hits: Sequence[float]
) -> dict[int, float]:
    """Teacher-forced reliability of the requests in force, by the batch that wrote them."""
    batch_of = {
        (edit.request.fact, edit.request.target): number
        for number, batch in enumerate(hooks.journal.batches, 1)
        for edit in batch.edits
    }
    live = {(edit.request.fact, edit.request.target) for edit in hooks.journal.live()}
    scores: dict[int, list[float]] = {}
    for request, hit in zip(requests, hits, strict=True):
        edit = (request.fact, request.target)
        if edit in live:
            scores.setdefault(batch_of[edit], []).append(hit)
    return {number: fmean(found) for number, found in sorted(scores.items())}


def _open(
    model: Any, tokenizer: Any, hooks: HookSet, rows: Sequence[Row]
) -> list[tuple[Tensor, Row]]:
    """Per row, whether the gate of each layer is open at each token: bool `(layers, t)`."""
    modules = list(hooks.modules(model).values())
    found = []
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        padded = pad(some, tokenizer.pad_token_id, model.device)
        keys, _ = read_pass(model, padded.inputs(), modules)
        opened = torch.stack([m.read(k).is_open for m, k in zip(modules, keys, strict=True)])
        for i, row in enumerate(some):
            found.append((opened[:, i, : len(row.ids)].cpu(), row))
    return found


def _gates(
    model: Any, tokenizer: Any, hooks: HookSet, requests: Sequence[EditRequest], text: str
) -> GateScores:
    prompts, reworded = [], []
    for request in requests:
        end = request.subject_span[1]
        prompts.append(encode(tokenizer, request.prompt, subject_end=end))
        for paraphrase in request.paraphrases:
            if request.subject in paraphrase:
                end = paraphrase.rfind(request.subject) + len(request.subject)
                reworded.append(encode(tokenizer, paraphrase, subject_end=end))
    pieces = _pieces(model, tokenizer, text)
    ordinary = [Row(tuple(piece), len(piece) - 1) for piece in pieces]
    local = [encode(tokenizer, p.prompt) for r in requests for p in r.locality]
    at_prompts = _open(model, tokenizer, hooks, prompts)
    at_reworded = _open(model, tokenizer, hooks, reworded)
    at_local = _open(model, tokenizer, hooks, local)
    at_ordinary = _open(model, tokenizer, hooks, ordinary)

    def subjects(found: list[tuple[Tensor, Row]]) -> Tensor:
        return torch.cat([opened[:, row.subject] for opened, row in found] or [torch.zeros(0)])

    def anywhere(found: list[tuple[Tensor, Row]]) -> float | None:
        return float(torch.cat([o.any(0) for o, _ in found]).float().mean()) if found else None

    right = float(subjects(at_prompts).sum() + subjects(at_reworded).sum())
    total = float(sum(opened.sum() for opened, _ in at_prompts + at_reworded + at_local))
    return GateScores(
        recall=float(subjects(at_prompts).float().mean()),
        paraphrase_recall=float(subjects(at_reworded).float().mean()) if at_reworded else None,
        precision=right / total if total else None,
        ordinary=anywhere(at_ordinary) or 0.0,
        locality=anywhere(at_local),
    )
