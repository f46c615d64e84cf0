"""What the edits do: reliability, generality, locality, gates, ordinary text, retention.

Definitions follow EasyEdit where it has them: a teacher-forced score is the share of target tokens
that are the model's first choice, averaged over records; locality is the share of answer tokens
whose first choice is the unedited model's. The same by greedy decoding with a KV cache, which
teacher forcing flatters: `greedy` when the completion starts with the target, `exact` when it is
the target up to its natural stop. What the records do not cover is None, never a number.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import fmean, harmonic_mean
from typing import Any, Protocol

import torch
from torch import Tensor

from coachhook.errors import ConfigError
from coachhook.evaluation.gate_scores import GateScores, gate_scores
from coachhook.evaluation.ordinary_text import compare_text, ordinary_text
from coachhook.evaluation.preferences import Preferences, mean_preferences, preferences
from coachhook.facts.request import EditRequest
from coachhook.hookset import HookSet
from coachhook.models.decoding import complete, is_exactly, natural_stop, starts_with
from coachhook.models.passes import eval_mode
from coachhook.models.reading import read_targets
from coachhook.models.tokens import Row, check_length, context_length, encode, encode_request
from coachhook.system.progress import track

_NEW_TOKENS = 20


class Edits(Protocol):
    """Edits on a model, of whatever kind: a `HookSet`, or weights that were changed."""

    def off(self, model: Any) -> AbstractContextManager[Any]:
        """The unedited model inside the block."""
        ...

    def in_force(self) -> list[list[EditRequest]]:
        """Per batch, those of its requests that no later one has replaced."""
        ...


@dataclass(frozen=True)
class Scores:
    """The teacher-forced, greedy and exact forms of one metric, 0 to 1: of one record, or means
    over the records that have it."""

    teacher_forced: float | None
    greedy: float | None
    exact: float | None


@dataclass(frozen=True)
class RecordScores:
    """One request, the batch that holds it (None: not in force) and what its editor said of it
    (None: nothing), what greedy decoding makes of its prompt without the edits and with them, and
    its scores; before: the share of its target that was the unedited model's first choice."""

    prompt: str
    target: str
    batch: int | None
    verdict: str | None
    answer_before: str
    answer: str
    before: float
    reliability: Scores
    generality: Scores
    locality: Scores
    preferences: Preferences


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model with edits on one list of requests. `before` are the unedited
    model's; gate: of hooks alone; perplexities and divergence (nats a token) are over the same
    ordinary text; retention: reliability by batch; harmonic_mean: of the three greedy scores;
    preferences: CounterFact's scores."""

    n_requests: int
    reliability: Scores
    generality: Scores
    locality: Scores
    harmonic_mean: float | None
    preferences: Preferences
    before_reliability: float
    before_preferences: Preferences
    already_true: int
    gate: GateScores | None
    perplexity_before: float
    perplexity_after: float
    divergence: float
    retention: dict[int, float]
    records: list[RecordScores]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Before:
    """What the unedited model says of one request: share of the target that is its first choice,
    completion of the prompt, preferences; of the locality prompts, first choices for the answers,
    completions."""

    hit: float
    answer: str
    preferences: Preferences
    choices: list[Tensor]
    answers: list[str]


def before_edits(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest]
) -> dict[EditRequest, Before]:
    """What `model`, without edits, says of `requests`: the same for every state of the edits.

    Raises `ContextLengthError` for a prompt that does not fit.
    """
    local = [p for request in requests for p in request.locality]
    asked = [encode_request(tokenizer, request) for request in requests]
    beside = [encode(tokenizer, p.prompt, p.answer) for p in local]
    _check(model, [*asked, *beside])
    hits = target_hits(model, tokenizer, asked)
    answers = _answers(model, tokenizer, [request.prompt for request in requests])
    preferred = preferences(model, tokenizer, requests)
    choices = iter(first_choices(model, tokenizer, beside))
    local_answers = iter(_answers(model, tokenizer, [p.prompt for p in local]))
    found = {}
    for i, request in enumerate(requests):
        n = range(len(request.locality))
        own, said = [next(choices) for _ in n], [next(local_answers) for _ in n]
        found[request] = Before(hits[i], answers[i], preferred[i], own, said)
    return found


def evaluate(
    model: Any,
    tokenizer: Any,
    edits: Edits,
    requests: Sequence[EditRequest],
    text: str | None = None,
    known: Mapping[EditRequest, Before] | None = None,
) -> Evaluation:
    """Evaluate `model`, on which `edits` are, on `requests`; `text` is ordinary text for perplexity
    and false alarms (by default a page that comes with the package). known: what `before_edits`
    says of them, if it was asked before."""
    if not requests:
        raise ConfigError("there is nothing to evaluate: the list of requests is empty")
    text = ordinary_text() if text is None else text
    paraphrases = [(i, p) for i, r in enumerate(requests) for p in r.paraphrases]
    local = [(i, p) for i, r in enumerate(requests) for p in r.locality]
    asked = [encode_request(tokenizer, request) for request in requests]
    reworded = [encode(tokenizer, p, requests[i].target) for i, p in paraphrases]
    beside = [encode(tokenizer, p.prompt, p.answer) for _, p in local]
    _check(model, [*asked, *reworded, *beside])
    with eval_mode(model), track("evaluating", 9) as advance:

        def step(result: Any) -> Any:
            advance(1)
            return result

        if known is None:
            with edits.off(model):
                known = step(before_edits(model, tokenizer, requests))
        before = [known[request] for request in requests]
        hits = step(target_hits(model, tokenizer, asked))
        reworded_hits = step(target_hits(model, tokenizer, reworded))
        choices = step(first_choices(model, tokenizer, beside))
        answers = step(_answers(model, tokenizer, [r.prompt for r in requests]))
        reworded_answers = step(_answers(model, tokenizer, [p for _, p in paraphrases]))
        beside_answers = step(_answers(model, tokenizer, [p.prompt for _, p in local]))
        preferred = step(preferences(model, tokenizer, requests))
        words = step(compare_text(model, tokenizer, text, edits.off))
        gate = None
        if isinstance(edits, HookSet):
            gate = gate_scores(model, tokenizer, edits, requests, text)

    batch_of = {
        (request.fact, request.target): number
        for number, batch in enumerate(edits.in_force(), 1)
        for request in batch
    }
    verdicts = {}
    if isinstance(edits, HookSet):
        verdicts = {(e.request.fact, e.request.target): str(e.verdict) for e in edits.edits}
    targets = [requests[i].target for i, _ in paraphrases]
    reached = map(_met, reworded_hits, reworded_answers, targets)
    general = _by_record([i for i, _ in paraphrases], reached)
    plain = [choice for b in before for choice in b.choices]
    said = [answer for b in before for answer in b.answers]
    same = _by_record([i for i, _ in local], map(_same, choices, plain, beside_answers, said))
    records = [
        RecordScores(
            prompt=request.prompt,
            target=request.target,
            batch=batch_of.get((request.fact, request.target)),
            verdict=verdicts.get((request.fact, request.target)),
            answer_before=before[i].answer,
            answer=answers[i],
            before=before[i].hit,
            reliability=_met(hits[i], answers[i], request.target),
            generality=general.get(i, _ABSENT),
            locality=same.get(i, _ABSENT),
            preferences=preferred[i],
        )
        for i, request in enumerate(requests)
    ]
    reliability = mean_scores([record.reliability for record in records])
    generality = mean_scores([record.generality for record in records])
    locality = mean_scores([record.locality for record in records])
    return Evaluation(
        n_requests=len(requests),
        reliability=reliability,
        generality=generality,
        locality=locality,
        harmonic_mean=_harmonic(reliability.greedy, generality.greedy, locality.greedy),
        preferences=mean_preferences(preferred),
        before_reliability=fmean(record.before for record in records),
        before_preferences=mean_preferences([b.preferences for b in before]),
        already_true=sum(record.before == 1 for record in records),
        gate=gate,
        perplexity_before=words.perplexity_before,
        perplexity_after=words.perplexity_after,
        divergence=words.divergence,
        retention=_retention(records),
        records=records,
    )


def first_choices(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[Tensor]:
    """First choice of the model for each target token of each row, int64 `(n_target,)`."""
    return read_targets(model, tokenizer, rows, lambda logits, _: logits.argmax(-1).cpu())


def target_hits(model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[float]:
    """Share of each row's target tokens that are the model's first choice."""
    return [
        float((choice == torch.tensor(row.target)).float().mean())
        for choice, row in zip(first_choices(model, tokenizer, rows), rows, strict=True)
    ]


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Means of the three forms over those that have them."""
    return Scores(
        _mean([s.teacher_forced for s in scores]),
        _mean([s.greedy for s in scores]),
        _mean([s.exact for s in scores]),
    )


_ABSENT = Scores(None, None, None)


def _mean(values: Sequence[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def _harmonic(*values: float | None) -> float | None:
    given = [value for value in values if value is not None]
    return harmonic_mean(given) if len(given) == len(values) else None


def _check(model: Any, rows: Sequence[Row]) -> None:
    for row in rows:
        check_length(row, context_length(model), "a prompt to evaluate")


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    return complete(model, tokenizer, prompts, _NEW_TOKENS)


def _met(hit: float, answer: str, target: str) -> Scores:
    return Scores(hit, float(starts_with(answer, target)), float(is_exactly(answer, target)))


def _same(choice: Tensor, plain: Tensor, answer: str, said: str) -> Scores:
    """How far an answer is that of the unedited model."""
    return Scores(
        float((choice == plain).float().mean()),
        float(answer == said),
        float(natural_stop(answer) == natural_stop(said)),
    )


def _by_record(owners: Sequence[int], scores: Iterable[Scores]) -> dict[int, Scores]:
    """Per record the means over its own scores."""
    by_record: dict[int, list[Scores]] = {}
    for owner, score in zip(owners, scores, strict=True):
        by_record.setdefault(owner, []).append(score)
    return {owner: mean_scores(found) for owner, found in by_record.items()}


def _retention(records: Sequence[RecordScores]) -> dict[int, float]:
    """Teacher-forced reliability of the requests in force, by the batch that wrote them."""
    scores: dict[int, list[float]] = {}
    for record in records:
        if record.batch is not None and record.reliability.teacher_forced is not None:
            scores.setdefault(record.batch, []).append(record.reliability.teacher_forced)
    return {number: fmean(found) for number, found in sorted(scores.items())}
