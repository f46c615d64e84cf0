"""Reliability, generality and locality of edits: what is asked, and how the answers are scored.

Definitions follow EasyEdit where it has them: a teacher-forced score is the share of target tokens
that are the model's first choice; locality is the share of answer tokens whose first choice is the
unedited model's. Teacher forcing flatters, so completions by greedy decoding with a KV cache are
scored too: `greedy` is 1 if the completion starts with the target, `exact` if it is the target up
to its natural stop; for locality both compare it with the unedited model's. A metric that the
records do not cover is None, never a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coachhook.evaluation.bootstrap import METRICS
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import complete, is_exactly, natural_stop, starts_with
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_targets
from coachhook.models.tokens import Row, encode, encode_request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Scores:
    """The teacher-forced, greedy and exact forms of one metric, 0 to 1: of one record, or means
    over the records that have it."""

    teacher_forced: float | None
    greedy: float | None
    exact: float | None


@dataclass(frozen=True)
class Metrics:
    """The three metrics of one request, or their means over several."""

    reliability: Scores
    generality: Scores
    locality: Scores


@dataclass(frozen=True)
class Question:
    """A prompt that is put to a model. metric: the field of `Metrics` that its answer counts for;
    owner: the number of its request; target: for a locality prompt, its own answer; row: the tokens
    of prompt and target."""

    metric: str
    owner: int
    prompt: str
    target: str
    row: Row

    @property
    def is_beside(self) -> bool:
        """Whether it is a locality prompt, which is scored against the unedited model's answer."""
        return self.metric == "locality"


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question. choice: its first choice at each token of the question's
    target (teacher forcing), int64 `(n_target,)` on the CPU; text: its greedy completion."""

    choice: Tensor
    text: str


def questions(
    tokenizer: PreTrainedTokenizerFast, requests: Sequence[EditRequest]
) -> list[Question]:
    """The questions of each request: its prompt, its paraphrases, its locality prompts."""
    asked = []
    for owner, request in enumerate(requests):
        row = encode_request(tokenizer, request)
        asked.append(Question("reliability", owner, request.prompt, request.target, row))
        for prompt in request.paraphrases:
            row = encode(tokenizer, prompt, request.target)
            asked.append(Question("generality", owner, prompt, request.target, row))
        for beside in request.locality:
            row = encode(tokenizer, beside.prompt, beside.answer)
            asked.append(Question("locality", owner, beside.prompt, beside.answer, row))
    return asked


def ask(lm: LanguageModel, asked: Sequence[Question], new_tokens: int) -> list[Answer]:
    """The answer of the model, as it is now, to each question. new_tokens: most tokens to decode.

    Raises `ContextLengthError` for a prompt that fills the context.
    """
    answers: dict[int, Answer] = {}
    beside = [i for i, question in enumerate(asked) if question.is_beside]
    others = [i for i, question in enumerate(asked) if not question.is_beside]
    # Locality prompts get batches of their own, as they do before the edits: rounding depends on
    # the rest of a batch, and an answer that hangs on it would count as changed.
    for places in (beside, others):
        choices = first_choices(lm, [asked[i].row for i in places])
        texts = complete(lm, [asked[i].prompt for i in places], new_tokens)
        answers.update(zip(places, map(Answer, choices, texts), strict=True))
    return [answers[i] for i in range(len(asked))]


def score(
    asked: Sequence[Question], answers: Sequence[Answer], before: Sequence[Answer], n: int
) -> list[Metrics]:
    """The metrics of each of `n` requests, as means over the request's questions. before: the
    unedited model's answers to the locality questions, in the order of `asked`."""
    plain = iter(before)
    by_request: list[dict[str, list[Scores]]] = [{name: [] for name in METRICS} for _ in range(n)]
    for question, answer in zip(asked, answers, strict=True):
        scores = _same(answer, next(plain)) if question.is_beside else _met(question, answer)
        by_request[question.owner][question.metric].append(scores)
    return [
        Metrics(**{name: mean_scores(scores) for name, scores in by_name.items()})
        for by_name in by_request
    ]


def mean_metrics(metrics: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over the records that have it."""
    return Metrics(
        reliability=mean_scores([one.reliability for one in metrics]),
        generality=mean_scores([one.generality for one in metrics]),
        locality=mean_scores([one.locality for one in metrics]),
    )


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The mean of each form over the scores that have it."""
    return Scores(
        mean_given([s.teacher_forced for s in scores]),
        mean_given([s.greedy for s in scores]),
        mean_given([s.exact for s in scores]),
    )


def mean_given(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are not None, or None if all are."""
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def first_choices(lm: LanguageModel, rows: Sequence[Row]) -> list[Tensor]:
    """The model's first choice at each target token of each row, int64 `(n_target,)`."""
    return read_targets(lm, rows, lambda logits, _: logits.argmax(-1).cpu())


def target_hits(lm: LanguageModel, rows: Sequence[Row]) -> list[float]:
    """Share of each row's target tokens that are the model's first choice."""
    choices = first_choices(lm, rows)
    return [_hit(choice, row) for choice, row in zip(choices, rows, strict=True)]


def _hit(choice: Tensor, row: Row) -> float:
    return float((choice == torch.tensor(row.target)).float().mean())


def _met(question: Question, answer: Answer) -> Scores:
    """How well an answer agrees with the target."""
    return Scores(
        _hit(answer.choice, question.row),
        float(starts_with(answer.text, question.target)),
        float(is_exactly(answer.text, question.target)),
    )


def _same(answer: Answer, plain: Answer) -> Scores:
    """How well an answer agrees with the unedited model's."""
    return Scores(
        float((answer.choice == plain.choice).float().mean()),
        float(answer.text == plain.text),
        float(natural_stop(answer.text) == natural_stop(plain.text)),
    )
