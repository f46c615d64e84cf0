"""Scores of answers, and what is asked to get them."""

import pytest
import torch

from coachhook import EditRequest
from coachhook.evaluation.metrics import (
    Answer,
    Metrics,
    Question,
    Scores,
    ask,
    mean_metrics,
    questions,
    score,
)
from coachhook.models.language_model import LanguageModel
from tests.support.tiny import TARGETS, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
FULL = EditRequest(
    "They moved to {}",
    "France",
    TARGETS[0],
    paraphrases=("We heard of {}", "So, {}"),
    locality=(("They drove to Spain", TARGETS[2]),),
)
BARE = EditRequest("I was told of {}", "Rome", TARGETS[1])
NOTHING = Scores(None, None, None)


def answer(question: Question, text: str, right: float = 1.0) -> Answer:
    """An answer whose first choice is the target's for a share of its tokens."""
    choice = torch.tensor(question.row.target)
    choice[round(right * len(choice)) :] = -1
    return Answer(choice, text)


def test_each_metric_is_the_mean_over_a_requests_own_prompts() -> None:
    asked = questions(TOKENIZER, [FULL, BARE])
    assert [(q.metric, q.owner) for q in asked] == [
        ("reliability", 0),
        ("generality", 0),
        ("generality", 0),
        ("locality", 0),
        ("reliability", 1),
    ]
    texts = ("Lyon. It", "Lyon, it", "Paris", "Bern is. A", "Oslo")
    answers = [answer(q, text) for q, text in zip(asked, texts, strict=True)]
    answers[2] = answer(asked[2], "Paris", right=0.0)
    before = [answer(asked[3], "Bern is. The")]
    full, bare = score(asked, answers, before, 2)
    assert full == Metrics(
        reliability=Scores(1.0, 1.0, 1.0),
        generality=Scores(0.5, 0.5, 0.0),
        locality=Scores(1.0, 0.0, 1.0),
    )
    assert bare == Metrics(Scores(1.0, 1.0, 1.0), NOTHING, NOTHING)
    assert mean_metrics([full, bare]) == Metrics(
        Scores(1.0, 1.0, 1.0), full.generality, full.locality
    )


def test_answers_come_in_the_order_of_the_questions() -> None:
    lm = LanguageModel(tiny_model("llama"), TOKENIZER)
    asked = questions(TOKENIZER, [FULL, BARE])
    for question, found in zip(asked, ask(lm, asked, 4), strict=True):
        (alone,) = ask(lm, [question], 4)
        assert torch.equal(found.choice, alone.choice)
        assert found.text == alone.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_locality_of_an_unedited_model_is_one(dtype: torch.dtype) -> None:
    """In whatever company its prompts are read: what rounds otherwise would count as changed."""
    lm = LanguageModel(tiny_model("llama").to(dtype), TOKENIZER)
    beside = tuple((f"They drove to Spain {'again ' * n}", TARGETS[2]) for n in range(9))
    request = EditRequest("They moved to {}", "France " * 8, TARGETS[0], locality=beside)
    asked = questions(TOKENIZER, [request])
    before = ask(lm, [q for q in asked if q.is_beside], 8)
    (found,) = score(asked, ask(lm, asked, 8), before, 1)
    assert found.locality == Scores(1.0, 1.0, 1.0)
