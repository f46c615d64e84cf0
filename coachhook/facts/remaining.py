"""What of a facts file is still to be edited, given what a journal already holds."""

from collections.abc import Sequence

from coachhook.facts.request import EditRequest


def remaining(done: Sequence[EditRequest], wanted: Sequence[EditRequest]) -> list[EditRequest]:
    """What of a facts file is still to be edited into a journal, in the file's order.

    done: the requests of the journal; wanted: those of the file. Fact by fact, the longest
    beginning of the file's targets that stands at the end of the journal's counts as done. So a
    run that was cut short goes on where it stopped, a finished one does nothing, and a target that
    was added to the file or changed in it is edited.
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
    """The last request of each fact: what holds when a file corrects itself."""
    return list({request.fact: request for request in requests}.values())


def _without_repeats(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests that change what their fact was set to last."""
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
    """The length of the longest beginning of `file` that `journal` ends with."""
    longest = min(len(journal), len(file))
    return next(n for n in range(longest, -1, -1) if journal[len(journal) - n :] == file[:n])
