import pytest

from coachhook.facts.remaining import latest, remaining
from coachhook.facts.request import EditRequest


def request(name: str) -> EditRequest:
    """Fact "a" with target "1" from "a1"."""
    return EditRequest(f"The {name[0]} is", name[0], name[1])


def requests(names: str) -> list[EditRequest]:
    return [request(name) for name in names.split()]


@pytest.mark.parametrize(
    ("done", "wanted", "left"),
    [
        ("", "a1 b1", "a1 b1"),
        ("a1 b1", "a1 b1", ""),
        ("a1", "a1 b1 c1", "b1 c1"),
        ("a1 b1", "a1 b1 a2", "a2"),  # corrected later in the file
        ("a1 b1 a2", "a1 b1 a2", ""),
        ("a1 b1", "a2 b1", "a2"),  # corrected in place
        ("a1 a2", "a1", "a1"),  # and taken back
        ("a1 a2 a1", "a1", ""),
        ("a1 a2 a1", "a1 a2 a1", ""),
        ("a1", "a1 a2 a1", "a2 a1"),
        ("a1 a2", "a1 a2 a1", "a1"),
        ("a3 a1", "a1 a2", "a2"),
        ("b1", "a1 b1 a2", "a1 a2"),
        ("", "a1 b1 a1", "a1 b1"),  # a line twice
        ("a1 b1", "a1 b1 a1", ""),
        ("x1 y1", "a1", "a1"),
    ],
)
def test_remaining(done: str, wanted: str, left: str) -> None:
    journal, file = requests(done), requests(wanted)
    found = remaining(journal, file)
    assert found == requests(left)
    assert remaining(journal + found, file) == []


def test_every_interruption_of_a_run_goes_on_to_the_same_end() -> None:
    file = requests("a1 b1 a2 c1 b2 a1 c2")
    for cut in range(len(file) + 1):
        assert remaining(file[:cut], file) == file[cut:]


def test_latest_keeps_the_last_target_of_each_fact() -> None:
    assert latest(requests("a1 b1 a2")) == requests("a2 b1")
