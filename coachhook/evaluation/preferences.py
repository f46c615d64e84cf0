"""Which of two answers the model finds likelier: CounterFact's scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coachhook.evaluation.metrics import mean_given
from coachhook.facts.request import EditRequest
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_targets
from coachhook.models.tokens import Row, check_length, encode, encode_request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Preferences:
    """Shares of prompts, 0 to 1, behind which one answer is likelier than another by mean
    log-likelihood a token: efficacy and paraphrase, the target than the truth; neighbourhood, the
    locality prompt's own answer than the target. None where a record gives no truth, where its
    truth is its target, or where it has no such prompt."""

    efficacy: float | None
    paraphrase: float | None
    neighbourhood: float | None


def preference_rows(
    tokenizer: PreTrainedTokenizerFast, request: EditRequest
) -> dict[str, list[tuple[Row, Row]]]:
    """For each score, the pairs of rows to compare; the first of a pair should be the likelier."""
    if request.truth is None or request.truth == request.target:
        return {}

    def pair(prompt: str, first: str, second: str) -> tuple[Row, Row]:
        return encode(tokenizer, prompt, first), encode(tokenizer, prompt, second)

    target, truth = request.target, request.truth
    return {
        "efficacy": [
            (encode_request(tokenizer, request), encode(tokenizer, request.prompt, truth))
        ],
        "paraphrase": [pair(prompt, target, truth) for prompt in request.paraphrases],
        "neighbourhood": [
            pair(beside.prompt, beside.answer, target)
            for beside in request.locality
            if beside.answer != target
        ],
    }


def preferences(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[Preferences]:
    """The preferences of each request, with the model as it is now. Raises `ContextLengthError` for
    a prompt that does not fit with one of its answers."""
    wanted = [preference_rows(lm.tokenizer, request) for request in requests]
    pairs = [pair for rows in wanted for some in rows.values() for pair in some]
    for row in (row for pair in pairs for row in pair):
        check_length(row, lm.context_length, "a prompt to evaluate")
    likelihoods = iter(mean_log_likelihoods(lm, [row for p in pairs for row in p]))

    def share(some: Sequence[tuple[Row, Row]]) -> float | None:
        above = [float(next(likelihoods) > next(likelihoods)) for _ in some]
        return mean_given(above)

    preferred = []
    for rows in wanted:
        shares = {name: share(some) for name, some in rows.items()}
        names = ("efficacy", "paraphrase", "neighbourhood")
        preferred.append(Preferences(*(shares.get(name) for name in names)))
    return preferred


def mean_preferences(preferred: Sequence[Preferences]) -> Preferences:
    """Means over the records that have each score."""
    return Preferences(
        mean_given([f.efficacy for f in preferred]),
        mean_given([f.paraphrase for f in preferred]),
        mean_given([f.neighbourhood for f in preferred]),
    )


def mean_log_likelihoods(lm: LanguageModel, rows: Sequence[Row]) -> list[float]:
    """Mean log-likelihood of each row's target tokens, in nats a token."""

    def mean(logits: Tensor, row: Row) -> float:
        target = torch.tensor(row.target, device=logits.device)
        return float(logits.float().log_softmax(-1).gather(-1, target[:, None]).mean())

    return read_targets(lm, rows, mean)
