"""The probe facts that come with the package, and what an edit of them does to a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import fmean, harmonic_mean
from typing import Any

from torch import Tensor

from coachhook.errors import ContextLengthError
from coachhook.evaluation.evaluate import first_choices, target_hits
from coachhook.facts.loaders import load_requests
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import complete, starts_with
from coachhook.models.tokens import Row, context_length, encode, encode_request

# Behind the longest target, to see the word end.
_EXTRA_TOKENS = 2


def probe_requests() -> list[EditRequest]:
    """All probe facts; none of them is true, and none is in the demo."""
    path = Path(str(files("coachhook.calibration") / "probes.jsonl"))
    return load_requests(path).requests


@dataclass(frozen=True)
class ProbeScores:
    """Shares, 0 to 1: of targets met, of those met behind reworded prompts, and of neighbours'
    answers unchanged, by greedy decoding; teacher_forced: the same three by tokens."""

    reliability: float
    generality: float
    locality: float
    teacher_forced: tuple[float, float, float]

    @property
    def rank(self) -> tuple[float, float, float]:
        """What settings are compared by: the harmonic mean of the greedy shares; among equals that
        of the teacher-forced ones; and, where a share is zero, their plain mean."""
        greedy = harmonic_mean([self.reliability, self.generality, self.locality])
        return greedy, harmonic_mean(self.teacher_forced), fmean(self.teacher_forced)

    @property
    def perfect(self) -> bool:
        """Whether nothing can be better."""
        return min(self.rank) == 1


@dataclass(frozen=True)
class Probes:
    """Facts to try edits with. rows: tokens of their prompts, of reworded prompts, and of prompts
    about neighbours, with what shall follow; prompts: the texts of all three, in this order.
    answers, choices: what the unedited model says to all, and its first choices for neighbours."""

    requests: list[EditRequest]
    rows: tuple[list[Row], list[Row], list[Row]]
    prompts: list[str]
    answers: list[str]
    choices: list[Tensor]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, contexts: Sequence[str]) -> "Probes":
        """The probes that fit the context of `model`, which is unedited still.

        Raises `ContextLengthError` if none does.
        """
        limit = context_length(model)
        requests = []
        for probe in probe_requests():
            every = [encode_request(tokenizer, probe, text) for text in ("{}", *contexts)]
            every += [row for kind in _rows(tokenizer, [probe])[1:] for row in kind]
            if limit is None or max(len(row.ids) for row in every) + _EXTRA_TOKENS <= limit:
                requests.append(probe)
        if not requests:
            raise ContextLengthError(
                f"the model's context of {limit} tokens is too short for every probe edit; "
                "set layers and λ by hand (EditConfig)"
            )
        rows = _rows(tokenizer, requests)
        prompts = [probe.prompt for probe in requests]
        prompts += [text for probe in requests for text in probe.paraphrases]
        prompts += [item.prompt for probe in requests for item in probe.locality]
        return cls(
            requests,
            rows,
            prompts,
            answers=_answers(model, tokenizer, prompts, rows),
            choices=first_choices(model, tokenizer, rows[2]),
        )

    def scores(self, model: Any, tokenizer: Any) -> ProbeScores:
        """Of `model` with the probes edited into it."""
        targets = [probe.target for probe in self.requests]
        targets += [probe.target for probe in self.requests for _ in probe.paraphrases]
        answers = _answers(model, tokenizer, self.prompts, self.rows)
        met = [starts_with(a, t) for a, t in zip(answers, targets, strict=False)]
        kept = [a == b for a, b in zip(answers, self.answers, strict=True)][len(targets) :]
        choices = first_choices(model, tokenizer, self.rows[2])
        same = [
            float((now == before).float().mean())
            for now, before in zip(choices, self.choices, strict=True)
        ]
        asked, reworded = (target_hits(model, tokenizer, rows) for rows in self.rows[:2])
        n = len(self.requests)
        return ProbeScores(
            reliability=fmean(met[:n]),
            generality=fmean(met[n:]),
            locality=fmean(kept),
            teacher_forced=(fmean(asked), fmean(reworded), fmean(same)),
        )


def _rows(
    tokenizer: Any, requests: Sequence[EditRequest]
) -> tuple[list[Row], list[Row], list[Row]]:
    return (
        [encode_request(tokenizer, probe) for probe in requests],
        [encode(tokenizer, text, p.target) for p in requests for text in p.paraphrases],
        [encode(tokenizer, i.prompt, i.answer) for p in requests for i in p.locality],
    )


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], rows: Sequence[Sequence[Row]]
) -> list[str]:
    longest = max(row.n_target for kind in rows[:2] for row in kind)
    return complete(model, tokenizer, prompts, longest + _EXTRA_TOKENS)
