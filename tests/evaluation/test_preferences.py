"""Which of two answers a model finds likelier, against one pass a sequence."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from coachhook import EditRequest
from coachhook.errors import ContextLengthError
from coachhook.evaluation.preferences import Preferences, mean_preferences, preferences
from coachhook.models.tokens import encode
from tests.support.tiny import TARGETS, tiny_lm, tiny_model, tiny_tokenizer

REQUEST = EditRequest(
    "They moved to {}",
    "France",
    TARGETS[0],
    ("Once {}", "All of us like {}"),
    (("It rained", TARGETS[2]), ("Yes", TARGETS[0]), ("We know", TARGETS[1])),
    truth=TARGETS[1],
)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def likelihood(model: Any, prompt: str, answer: str) -> float:
    row = encode(tiny_tokenizer(), prompt, answer)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
    start = len(row.ids) - row.n_target
    return sum(float(log_p[i - 1, row.ids[i]]) for i in range(start, len(row.ids))) / row.n_target


def test_shares_of_prompts(model: Any) -> None:
    target, truth = REQUEST.target, REQUEST.truth
    assert truth is not None

    def above(prompt: str, first: str, second: str) -> float:
        return float(likelihood(model, prompt, first) > likelihood(model, prompt, second))

    # The reverse too, so that a fixed answer passes at most once.
    turned = replace(REQUEST, target=truth, truth=target)
    for request in (REQUEST, turned):
        wanted, former = request.target, request.truth
        assert former is not None
        # An answer that is the target says nothing.
        beside = [p for p in request.locality if p.answer != wanted]
        (found,) = preferences(tiny_lm(model), [request])
        assert found.efficacy == above(request.prompt, wanted, former)
        assert found.paraphrase == pytest.approx(
            sum(above(prompt, wanted, former) for prompt in request.paraphrases) / 2
        )
        assert found.neighbourhood == pytest.approx(
            sum(above(p.prompt, p.answer, wanted) for p in beside) / len(beside)
        )


@pytest.mark.parametrize("truth", [None, TARGETS[0]])
def test_nothing_to_compare_is_absent(model: Any, truth: str | None) -> None:
    without = replace(REQUEST, truth=truth)
    alone = EditRequest("They moved to {}", "France", TARGETS[0], truth=TARGETS[1])
    found = preferences(tiny_lm(model), [without, alone])
    assert found[0] == Preferences(None, None, None)
    assert (found[1].paraphrase, found[1].neighbourhood) == (None, None)
    assert mean_preferences(found) == found[1]
    assert mean_preferences(found[:1]) == found[0]


def test_an_answer_that_does_not_fit(model: Any) -> None:
    long = replace(REQUEST, truth="word " * 3000)
    with pytest.raises(ContextLengthError):
        preferences(tiny_lm(model), [long])
