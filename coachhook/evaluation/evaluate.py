"""What the edits do: reliability, generality, locality, gates, ordinary text, retention."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Protocol

from torch import nn

from coachhook.errors import ConfigError
from coachhook.evaluation.bootstrap import harmonic_of
from coachhook.evaluation.gate_scores import GateScores, gate_scores
from coachhook.evaluation.memory_scores import MemoryScores, memory_scores
from coachhook.evaluation.metrics import (
    Answer,
    Metrics,
    Question,
    Scores,
    ask,
    mean_metrics,
    questions,
    score,
    target_hits,
)
from coachhook.evaluation.ordinary_text import compare_text, ordinary_text
from coachhook.evaluation.preferences import Preferences, mean_preferences, preferences
from coachhook.facts.request import EditRequest
from coachhook.hookset import HookSet
from coachhook.models.decoding import complete
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import eval_mode
from coachhook.models.tokens import Row, check_length, encode_request
from coachhook.system.progress import track

_NEW_TOKENS = 20


class Edits(Protocol):
    """Edits on a model, of any kind: a `HookSet`, or changed weights."""

    def off(self, model: nn.Module) -> AbstractContextManager[Any]:
        """The unedited model inside the block."""
        ...

    def in_force(self) -> list[list[EditRequest]]:
        """For each batch, its requests that are in force: no later request has replaced them."""
        ...


@dataclass(frozen=True)
class RecordScores:
    """The scores of one request.

    batch: number of the batch that holds it, None if it is not in force; verdict: its editor's,
    None if that gives none; answer_before, answer: greedy completions of its prompt without and
    with the edits; before: share of target tokens that were the unedited model's first choice.
    """

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
    """The scores of one model with edits on one list of requests.

    before_reliability (teacher-forced), before_preferences: of the unedited model; already_true:
    requests whose whole target was its first choice; gate: None for edits without hooks; memory:
    None but under that readout; perplexities and divergence (nats a token): over the same ordinary
    text; retention: teacher-forced reliability by batch; harmonic_mean: of the three greedy scores;
    preferences: CounterFact's scores.
    """

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
    memory: MemoryScores | None
    perplexity_before: float
    perplexity_after: float
    divergence: float
    retention: dict[int, float]
    records: list[RecordScores]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Before:
    """The unedited model's answers to one request. hit: share of target tokens that are its first
    choice; answer: completion of the prompt; beside: its answers to the locality prompts."""

    hit: float
    answer: str
    preferences: Preferences
    beside: list[Answer]


def before_edits(lm: LanguageModel, requests: Sequence[EditRequest]) -> dict[EditRequest, Before]:
    """The answers of the model, which must be unedited, to `requests`; they serve every later
    evaluation of the same requests.

    Raises `ContextLengthError` for a prompt that does not fit.
    """
    own = [encode_request(lm.tokenizer, request) for request in requests]
    beside = [question for question in questions(lm.tokenizer, requests) if question.is_beside]
    _check(lm, [*own, *(question.row for question in beside)])
    hits = target_hits(lm, own)
    answers = complete(lm, [request.prompt for request in requests], _NEW_TOKENS)
    preferred = preferences(lm, requests)
    said = iter(ask(lm, beside, _NEW_TOKENS))
    return {
        request: Before(hits[i], answers[i], preferred[i], [next(said) for _ in request.locality])
        for i, request in enumerate(requests)
    }


def evaluate(
    lm: LanguageModel,
    edits: Edits,
    requests: Sequence[EditRequest],
    text: str | None = None,
    known: Mapping[EditRequest, Before] | None = None,
) -> Evaluation:
    """Evaluate `lm`, which carries `edits`, on `requests`.

    text: ordinary text for perplexity and false alarms, by default a page that comes with the
    package. known: what `before_edits` returned for `requests`, by default it is called now. Raises
    `ConfigError` for an empty list and `ContextLengthError` for a prompt that does not fit.
    """
    if not requests:
        raise ConfigError("there is nothing to evaluate: the list of requests is empty")
    text = ordinary_text() if text is None else text
    asked = questions(lm.tokenizer, requests)
    _check(lm, [question.row for question in asked])
    with eval_mode(lm.model), track("evaluating", 4) as advance:

        def step(result: Any) -> Any:
            advance(1)
            return result

        if known is None:
            with edits.off(lm.model):
                known = step(before_edits(lm, requests))
        before = [known[request] for request in requests]
        answers = step(ask(lm, asked, _NEW_TOKENS))
        preferred = step(preferences(lm, requests))
        words = step(compare_text(lm, text, edits.off))
        gate = memory = None
        if isinstance(edits, HookSet):
            gate = gate_scores(lm, edits, requests, text)
            memory = memory_scores(lm, edits, requests)

    plain = [answer for b in before for answer in b.beside]
    metrics = score(asked, answers, plain, len(requests))
    records = _records(edits, requests, before, asked, answers, metrics, preferred)
    mean = mean_metrics(metrics)
    return Evaluation(
        n_requests=len(requests),
        reliability=mean.reliability,
        generality=mean.generality,
        locality=mean.locality,
        harmonic_mean=harmonic_of(
            [mean.reliability.greedy, mean.generality.greedy, mean.locality.greedy]
        ),
        preferences=mean_preferences(preferred),
        before_reliability=fmean(record.before for record in records),
        before_preferences=mean_preferences([b.preferences for b in before]),
        already_true=sum(record.before == 1 for record in records),
        gate=gate,
        memory=memory,
        perplexity_before=words.perplexity_before,
        perplexity_after=words.perplexity_after,
        divergence=words.divergence,
        retention=_retention(records),
        records=records,
    )


def _records(
    edits: Edits,
    requests: Sequence[EditRequest],
    before: Sequence[Before],
    asked: Sequence[Question],
    answers: Sequence[Answer],
    metrics: Sequence[Metrics],
    preferred: Sequence[Preferences],
) -> list[RecordScores]:
    batch_of = {
        (request.fact, request.target): number
        for number, batch in enumerate(edits.in_force(), 1)
        for request in batch
    }
    verdicts = {}
    if isinstance(edits, HookSet):
        verdicts = {(e.request.fact, e.request.target): str(e.verdict) for e in edits.edits}
    pairs = zip(asked, answers, strict=True)
    own = [answer.text for question, answer in pairs if question.metric == "reliability"]
    return [
        RecordScores(
            prompt=request.prompt,
            target=request.target,
            batch=batch_of.get((request.fact, request.target)),
            verdict=verdicts.get((request.fact, request.target)),
            answer_before=before[i].answer,
            answer=own[i],
            before=before[i].hit,
            reliability=metrics[i].reliability,
            generality=metrics[i].generality,
            locality=metrics[i].locality,
            preferences=preferred[i],
        )
        for i, request in enumerate(requests)
    ]


def _check(lm: LanguageModel, rows: Sequence[Row]) -> None:
    for row in rows:
        check_length(row, lm.context_length, "a prompt to evaluate")


def _retention(records: Sequence[RecordScores]) -> dict[int, float]:
    """Teacher-forced reliability of the requests in force, by the batch that wrote them."""
    scores: dict[int, list[float]] = {}
    for record in records:
        if record.batch is not None and record.reliability.teacher_forced is not None:
            scores.setdefault(record.batch, []).append(record.reliability.teacher_forced)
    return {number: fmean(of_batch) for number, of_batch in sorted(scores.items())}
