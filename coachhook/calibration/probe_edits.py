"""The probe facts that come with the package, and how well a model takes an edit of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, harmonic_mean

from coachhook.errors import ContextLengthError
from coachhook.evaluation.metrics import (
    Answer,
    Metrics,
    Question,
    ask,
    mean_metrics,
    questions,
    score,
)
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import BEYOND_TARGET
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import encode_request


def probe_requests() -> list[EditRequest]:
    """All probe facts; none of them is true, and none is in the demo."""
    path = Path(str(files("coachhook.calibration") / "probes.jsonl"))
    return load_requests(path).requests


@dataclass(frozen=True)
class ProbeScores:
    """Shares, 0 to 1, by greedy decoding: targets met, targets met behind reworded prompts, and
    locality answers unchanged. teacher_forced: the same three by tokens."""

    reliability: float
    generality: float
    locality: float
    teacher_forced: tuple[float, float, float]

    @classmethod
    def of(cls, means: Metrics) -> "ProbeScores":
        """From the means over probes, each of which has all three metrics."""
        three = means.reliability, means.generality, means.locality
        forced = _three([scores.teacher_forced for scores in three])
        return cls(*_three([scores.greedy for scores in three]), forced)

    @property
    def rank(self) -> tuple[float, float, float]:
        """The order of settings: harmonic mean of the greedy shares; among equals, harmonic mean of
        the teacher-forced shares; then their arithmetic mean, for where one of them is zero."""
        greedy = harmonic_mean([self.reliability, self.generality, self.locality])
        return greedy, harmonic_mean(self.teacher_forced), fmean(self.teacher_forced)

    @property
    def perfect(self) -> bool:
        """Whether every share is 1."""
        return min(self.rank) == 1


@dataclass(frozen=True)
class Probes:
    """Facts to try edits with. asked: the questions about them; before: the unedited model's
    answers to the locality prompts; new_tokens: tokens decoded for an answer."""

    requests: list[EditRequest]
    asked: list[Question]
    before: list[Answer]
    new_tokens: int

    @classmethod
    def of(cls, lm: LanguageModel, contexts: Sequence[str]) -> "Probes":
        """The probes that fit the context of the model, which must still be unedited.

        Raises `ContextLengthError` if none does.
        """
        limit = lm.context_length
        requests = []
        for probe in probe_requests():
            rows = [encode_request(lm.tokenizer, probe, text) for text in contexts]
            rows += [question.row for question in questions(lm.tokenizer, [probe])]
            if limit is None or max(len(row.ids) for row in rows) + BEYOND_TARGET <= limit:
                requests.append(probe)
        if not requests:
            raise ContextLengthError(
                f"the model's context of {limit} tokens is too short for every probe edit; "
                "set layers and λ by hand (EditConfig)"
            )
        asked = questions(lm.tokenizer, requests)
        beside = [question for question in asked if question.is_beside]
        longest = max(question.row.n_target for question in asked if not question.is_beside)
        new_tokens = longest + BEYOND_TARGET
        return cls(requests, asked, ask(lm, beside, new_tokens), new_tokens)

    def scores(self, lm: LanguageModel) -> ProbeScores:
        """The scores of `lm`, into which the probes have been edited."""
        answers = ask(lm, self.asked, self.new_tokens)
        means = mean_metrics(score(self.asked, answers, self.before, len(self.requests)))
        return ProbeScores.of(means)


def _three(shares: Sequence[float | None]) -> tuple[float, float, float]:
    first, second, third = (share for share in shares if share is not None)
    return first, second, third
