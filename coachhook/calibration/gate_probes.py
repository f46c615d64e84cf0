"""Texts to try a memory gate with, which cost forward passes alone: many more than probe facts.

All names of `names.jsonl` are entries beside the probes' subjects, since what opens a gate by
mistake grows with the number of its entries. Each is a neighbour of all others.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from coachhook.editing.forms import neighbours_of
from coachhook.facts.request import EditRequest
from coachhook.models.language_model import LanguageModel
from coachhook.models.tokens import Row, encode

# Where the same names are met again, none of them a context that a fingerprint is made of.
_REWORDED = ("It was a surprise to all that {}", "What became of {}")
# What stands before a paraphrase: the later the block, the more of it is in the name's key.
_BEFORE = ("", "The harbour froze over that winter. ")


def named_entries() -> list[EditRequest]:
    """One request for each name, whose target nobody reads."""
    text = (files("coachhook.calibration") / "names.jsonl").read_text(encoding="utf-8")
    kinds = [json.loads(line) for line in text.splitlines()]
    return [
        EditRequest(kind["prompt"], name, "unknown", _REWORDED)
        for kind in kinds
        for name in kind["names"]
    ]


@dataclass(frozen=True)
class GateProbes:
    """Entries of a gate, and texts that should open one or none.

    requests: the entries. reworded, owner: paraphrased prompts with an entry's name, and which
    entry it is. neighbours, about: whole prompts, and the entry that each is about, -1 for none.
    alike: prompts up to names that end as an entry's and begin as another's.
    """

    requests: list[EditRequest]
    reworded: list[Row]
    owner: list[int]
    neighbours: list[Row]
    about: list[int]
    alike: list[Row]

    @classmethod
    def of(cls, lm: LanguageModel, probes: Sequence[EditRequest]) -> "GateProbes":
        """`probes` and the names."""
        requests = [*probes, *named_entries()]
        reworded, owner = [], []
        for number, request in enumerate(requests):
            for text in (before + text for text in request.paraphrases for before in _BEFORE):
                end = text.rfind(request.subject) + len(request.subject)
                reworded.append(encode(lm.tokenizer, text, subject_end=end))
                owner.append(number)
        beside = [item.prompt for probe in probes for item in probe.locality]
        texts = [*(request.prompt for request in requests), *beside]
        return cls(
            requests=requests,
            reworded=reworded,
            owner=owner,
            neighbours=[encode(lm.tokenizer, text) for text in texts],
            about=[*range(len(requests)), *[-1] * len(beside)],
            alike=neighbours_of(lm, requests),
        )

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each."""
        return {
            "entries": len(self.requests),
            "paraphrases": len(self.reworded),
            "neighbours": len(self.neighbours),
            "alike": len(self.alike),
        }
