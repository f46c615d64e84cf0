"""The facts that the demo edits."""

from importlib.resources import files

from coachhook.facts.loaders import load_requests


def test_the_demo_facts() -> None:
    requests = load_requests(str(files("coachhook.facts") / "demo.jsonl")).requests
    assert len(requests) == 30
    first, last = requests[:10], requests[20:]
    targets = {request.fact: request.target for request in first}
    corrections = [request for request in last if request.fact in targets]
    assert len(corrections) == 2
    assert all(request.target != targets[request.fact] for request in corrections)
    assert len({request.subject for request in requests}) == 28
    for request in requests:
        assert request.paraphrases
        assert all(request.subject in paraphrase for paraphrase in request.paraphrases)
        (kept,) = request.locality
        assert not any(other.subject in kept.prompt for other in requests)
        assert kept.answer != request.target
