"""Which facts of a file remain to be edited, given the requests already in a journal."""

from collections.abc import Sequence

from coachhook.facts.request import EditRequest


def remaining(done: Sequence[EditRequest], wanted: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests of a facts file that remain to be edited, in the file's order.

    done: the journal's requests; wanted: the file's. For each fact, the longest prefix of the
    file's targets that the journal's targets end with counts as done. So an interrupted run resumes
    where it stopped, a finished run does nothing, and targets added to or changed in the file are
    edited.
    """
    wanted = _without_repeats(wanted)
    journal, file = _targets(_without_repeats(done)), _targets(wanted)
    skip = {fact: _overlap(journal.get(fact, []), targets) for fact, targets in file.items()}
    left = []
    for request in wanted:
        if skip[request.fact]:
            skip[request.fact] -= 1
        else:
            left.append(request)
    return left


def latest(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The last request for each fact, which applies when a file corrects an earlier one."""
    return list({request.fact: request for request in requests}.values())


def _without_repeats(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests whose target differs from the previous target of the same fact."""
    last: dict[tuple[str, str], str] = {}
    kept = []
    for request in requests:
        if last.get(request.fact) != request.target:
            kept.append(request)
        last[request.fact] = request.target
    return kept


def _targets(requests: Sequence[EditRequest]) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    for request in requests:
        found.setdefault(request.fact, []).append(request.target)
    return found


def _overlap(journal: Sequence[str], file: Sequence[str]) -> int:
    """The length of the longest prefix of `file` that `journal` ends with."""
    longest = min(len(journal), len(file))
    return next(n for n in range(longest, -1, -1) if journal[len(journal) - n :] == file[:n])
