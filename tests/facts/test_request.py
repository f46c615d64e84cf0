import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coachhook.errors import ContradictionError, RequestError
from coachhook.facts.request import EditRequest, LocalityPrompt, check_batch

FRANCE = EditRequest("The capital of France is", "France", "Lyon")


@pytest.mark.parametrize(
    ("prompt", "subject", "filled", "start"),
    [
        ("The capital of {} is", "France", "The capital of France is", 15),
        ("The capital of France is", "France", "The capital of France is", 15),
        ("  {} plays the sport of ", " Michael Jordan\n", "Michael Jordan plays the sport of", 0),
        ("Paris, oh Paris", "Paris", "Paris, oh Paris", 10),
        ("{}, oh Paris", "Paris", "Paris, oh Paris", 0),
        ("{0} and {} and {x!r", "set", "{0} and set and {x!r", 8),
        ("The literal {} in Python", "literal {}", "The literal {} in Python", 4),
        ("In Python, {} is", "the {} literal", "In Python, the {} literal is", 11),
        ("Where is 東京?", "東京", "Where is 東京?", 9),
    ],
)
def test_prompt_is_filled_and_span_found(
    prompt: str, subject: str, filled: str, start: int
) -> None:
    request = EditRequest(prompt, subject, " target ")
    assert request.prompt == filled
    assert request.target == "target"
    assert request.subject_span == (start, start + len(request.subject))
    assert request.fact == (filled, request.subject)


def test_paraphrases_and_locality_are_normalised() -> None:
    lists: Any = [" What is {}'s capital?", "No subject here "]
    pairs: Any = [(" The capital of Spain is", "Madrid "), LocalityPrompt("a", "b"), ["c", "d"]]
    request = EditRequest("The capital of {} is", "France", "Lyon", lists, pairs)
    assert request.paraphrases == ("What is France's capital?", "No subject here")
    assert request.locality == (
        LocalityPrompt("The capital of Spain is", "Madrid"),
        LocalityPrompt("a", "b"),
        LocalityPrompt("c", "d"),
    )


def test_is_immutable_hashable_and_hides_its_private_field() -> None:
    with pytest.raises(AttributeError):
        FRANCE.target = "Nice"  # type: ignore[misc]
    other = EditRequest("The capital of {} is", "France", "Lyon")
    assert other == FRANCE
    assert hash(other) == hash(FRANCE)
    assert "_start" not in repr(FRANCE)
    assert EditRequest("{}, oh Paris", "Paris", "t") == EditRequest("Paris, oh {}", "Paris", "t")


def test_copies_keep_the_span() -> None:
    request = EditRequest("{}, oh Paris", "Paris", "t")
    for twin in (copy.deepcopy(request), pickle.loads(pickle.dumps(request))):
        assert twin == request
        assert twin.subject_span == (0, 5)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"subject": "  "}, "subject is empty"),
        ({"target": "\t"}, "target is empty"),
        ({"prompt": None}, "prompt must be text, not NoneType"),
        ({"subject": 3}, "subject must be text, not int"),
        ({"target": b"Lyon"}, "target must be text, not bytes"),
        ({"target": float("nan")}, "target must be text, not float"),
        ({"target": "\ud800"}, "target '\\ud800' has half of a surrogate pair"),
        ({"prompt": "{} and {} are"}, "prompt has 2 {}"),
        ({"subject": "Spain"}, "prompt does not contain the subject"),
        ({"subject": "france"}, "prompt does not contain the subject"),
        ({"paraphrases": "France"}, "paraphrases must be a list, not str"),
        ({"paraphrases": None}, "paraphrases must be a list, not NoneType"),
        ({"paraphrases": [1]}, "paraphrase must be text"),
        ({"paraphrases": [" "]}, "paraphrase is empty"),
        ({"paraphrases": ["{}{}"]}, "paraphrase has 2 {}"),
        ({"locality": "ab"}, "locality must be a list"),
        ({"locality": ["ab"]}, "locality items must be (prompt, answer) pairs"),
        ({"locality": [("a",)]}, "locality items must be (prompt, answer) pairs"),
        ({"locality": [("", "b")]}, "locality prompt is empty"),
        ({"locality": [("a", None)]}, "locality answer must be text"),
    ],
)
def test_refuses(changes: dict[str, Any], part: str) -> None:
    fields: dict[str, Any] = {
        "prompt": "The capital of France is",
        "subject": "France",
        "target": "Lyon",
    }
    fields |= changes
    with pytest.raises(RequestError) as caught:
        EditRequest(**fields)
    message = str(caught.value)
    assert message.startswith(part)
    assert "(prompt " in message
    assert ", subject " in message
    assert "\n" not in message


def test_locality_prompt_refuses_empty_texts() -> None:
    with pytest.raises(RequestError, match="locality answer is empty"):
        LocalityPrompt("a", " ")


def test_messages_shorten_long_texts() -> None:
    with pytest.raises(RequestError) as caught:
        EditRequest("long\n" * 10_000, "x" * 80, "t")
    assert len(str(caught.value)) < 300
    assert "…" in str(caught.value)


TEXTS = st.text(max_size=12) | st.text(alphabet="{}ab ", max_size=8)
ANYTHING = TEXTS | st.none() | st.integers() | st.lists(TEXTS, max_size=2) | st.just("\udfff")


@given(TEXTS, TEXTS, TEXTS, st.lists(TEXTS, max_size=2), st.lists(st.tuples(TEXTS, TEXTS)))
def test_any_text_works_or_is_refused_and_round_trips(
    prompt: str,
    subject: str,
    target: str,
    paraphrases: list[str],
    locality: list[tuple[str, str]],
) -> None:
    given_paraphrases: Any = paraphrases
    given_locality: Any = locality
    try:
        request = EditRequest(prompt, subject, target, given_paraphrases, given_locality)
    except RequestError:
        return
    start, end = request.subject_span
    assert request.prompt[start:end] == request.subject
    assert request.prompt == request.prompt.strip()
    again = EditRequest.from_dict(json.loads(json.dumps(request.to_dict())))
    assert again == request
    assert again.subject_span == request.subject_span
    filled_twice = EditRequest(
        request.prompt, request.subject, request.target, request.paraphrases, request.locality
    )
    assert filled_twice == request


@given(
    st.text(alphabet="{}a", max_size=6),
    st.text(alphabet="{}a", min_size=1, max_size=4),
    st.text(alphabet="{}a", max_size=6),
)
def test_the_span_round_trips_with_braces_around_the_slot(
    before: str, subject: str, after: str
) -> None:
    try:
        request = EditRequest(before + "{}" + after, subject, "t")
    except RequestError:
        return
    again = EditRequest.from_dict(request.to_dict())
    assert (again, again.subject_span) == (request, request.subject_span)


@given(st.tuples(ANYTHING, ANYTHING, ANYTHING, ANYTHING, ANYTHING))
def test_values_of_any_type_are_refused_with_the_typed_error(values: tuple[Any, ...]) -> None:
    try:
        EditRequest(*values)
    except RequestError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is right


def test_to_dict_keeps_a_span_that_is_not_the_last_occurrence() -> None:
    request = EditRequest("{}, oh Paris", "Paris", "t")
    assert request.to_dict()["prompt"] == "{}, oh Paris"
    assert EditRequest.from_dict(request.to_dict()).subject_span == (0, 5)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        ([], "request must be an object with fields, not list"),
        ({"prompt": "France is", "subject": "France"}, "request lacks target"),
        ({}, "request lacks prompt, subject, target"),
        (FRANCE.to_dict() | {"note": 1}, "request has unknown fields 'note'"),
        (FRANCE.to_dict() | {"locality": [{"prompt": "a"}]}, "locality lacks answer"),
        (FRANCE.to_dict() | {"locality": ["a"]}, "locality must be an object"),
        (
            FRANCE.to_dict() | {"locality": {"prompt": "a", "answer": "b"}},
            "locality must be a list",
        ),
        (FRANCE.to_dict() | {"paraphrases": None}, "paraphrases must be a list"),
        (FRANCE.to_dict() | {"target": ["Lyon"]}, "target must be text"),
    ],
)
def test_from_dict_refuses(data: Any, part: str) -> None:
    with pytest.raises(RequestError) as caught:
        EditRequest.from_dict(data)
    assert str(caught.value).startswith(part)


def test_from_dict_needs_only_the_three_texts() -> None:
    data = {"prompt": "The capital of {} is", "subject": "France", "target": "Lyon"}
    assert EditRequest.from_dict(data) == FRANCE


def test_check_batch_drops_duplicates_and_keeps_the_order() -> None:
    spain = EditRequest("The capital of Spain is", "Spain", "Porto")
    twin = EditRequest("The capital of {} is", "France", "Lyon", ("France's capital is",))
    checked = check_batch([FRANCE, spain, twin, spain])
    assert checked == [FRANCE, spain]
    assert checked[0] is FRANCE


def test_check_batch_tells_contradictions_apart_from_other_facts() -> None:
    other_subject = EditRequest("The capital of France is", "capital", "Nice")
    assert len(check_batch((FRANCE, other_subject))) == 2
    with pytest.raises(ContradictionError) as caught:
        check_batch([FRANCE, other_subject, EditRequest("The capital of {} is", "France", "Nice")])
    message = str(caught.value)
    assert message.count("'The capital of France is'") == 2
    assert "'Lyon'" in message
    assert "'Nice'" in message


def test_check_batch_refuses_an_empty_batch() -> None:
    with pytest.raises(RequestError, match="batch is empty"):
        check_batch([])


@pytest.mark.parametrize("prompt", ["The capital of {} is", "{} is {}"])
def test_a_subject_that_is_only_the_placeholder_is_refused(prompt: str) -> None:
    with pytest.raises(RequestError, match="only the placeholder"):
        EditRequest(prompt, "{}", "Paris")
