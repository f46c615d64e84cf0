"""Under the memory readout: which forms of a subject open its edit, and what else comes close."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from coachhook.evaluation.gate_scores import spread
from coachhook.evaluation.memory_forms import (
    BESIDE,
    LOCALITY,
    OWN,
    Text,
    own_texts,
    texts_beside,
)
from coachhook.facts.request import EditRequest
from coachhook.hooks.memory import MemoryHook
from coachhook.hookset import HookSet
from coachhook.journal.journal import EditRecord
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_rows
from coachhook_kernels import fingerprint_sketch

# Cosines that are in memory at a time, 64 MB.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class FormScore:
    """A text that names an edit's subject. kind: of `memory_forms.OWN`; cosine: the largest to a
    fingerprint of the subject, in force or not; opens: whether the subject's row is received."""

    kind: str
    text: str
    cosine: float
    opens: bool


@dataclass(frozen=True)
class Neighbour:
    """The text beside an edit that comes closest. kind: of `memory_forms.BESIDE`; cosine: the
    largest of its tokens' to a fingerprint of the edit's subject; opens: whether that token
    receives the subject's row."""

    kind: str
    text: str
    cosine: float
    opens: bool


@dataclass(frozen=True)
class EntryScores:
    """One edit that is written and not superseded. edit: its id; nearest: None where there is no
    text beside it."""

    edit: int
    prompt: str
    subject: str
    enabled: bool
    forms: list[FormScore]
    nearest: Neighbour | None


@dataclass(frozen=True)
class Population:
    """All n texts of one kind. cosines: the `QUANTILES` of their largest cosine, of kinds in
    `memory_forms.OWN` to their own subject, of those beside to any other edit in force; opens: the
    share of texts, 0 to 1, that open it."""

    kind: str
    n: int
    cosines: list[float]
    opens: float


@dataclass(frozen=True)
class MemoryScores:
    """block: the gate's; threshold: the least cosine that opens it."""

    block: int
    threshold: float
    own: list[Population]
    beside: list[Population]
    entries: list[EntryScores]


@dataclass(frozen=True)
class _Marks:
    """The fingerprints of edits that stand. unit float32 `(f, s)`; subject int64 `(f,)`: its
    number; in_force bool `(f,)`: whether it can open."""

    unit: Tensor
    subject: Tensor
    in_force: Tensor


@dataclass(frozen=True)
class _Tokens:
    """Tokens that were read. sketch float32 `(t, s)`, of unit length; opens int64 `(t,)`: the
    number of the subject whose row each receives, -1 for none; text int64 `(t,)`: its text's place
    in the list that was read."""

    sketch: Tensor
    opens: Tensor
    text: Tensor


def memory_scores(
    lm: LanguageModel, hooks: HookSet, requests: Sequence[EditRequest]
) -> MemoryScores | None:
    """Read the gate of `hooks`, attached to the model, where the edits of `requests` are met and
    beside them. Refused and superseded requests are left out; None where none is left, and under
    another readout."""
    edits = _standing(hooks, requests) if hooks.config.readout == "memory" else []
    if not edits:
        return None
    numbers: dict[str, int] = {}
    subjects = [edit.request.subject for edit in hooks.edits]
    of_edit = torch.tensor([numbers.setdefault(name, len(numbers)) for name in subjects])
    ((block, hook),) = hooks.modules(lm.model).items()
    marks = _marks(hooks, block, of_edit)
    asked = [request for _, request in edits]
    # The last stands for no request.
    subject = torch.tensor([*[numbers[request.subject] for request in asked], -1])

    own = own_texts(lm, asked)
    met = _read(lm, hook, own, of_edit)
    to_open = subject[[text.request for text in own]]
    cosines, opened = _to_own(met.sketch, to_open, marks), met.opens == to_open
    forms: list[list[FormScore]] = [[] for _ in edits]
    for text, cosine, opens in zip(own, cosines.tolist(), opened.tolist(), strict=True):
        forms[text.request].append(FormScore(text.kind, text.text, cosine, opens))

    beside = texts_beside(lm, asked, [edit.request for edit in hooks.journal.standing()])
    others = _read(lm, hook, beside, of_edit)
    named = subject[[text.request for text in beside]][others.text]
    reach, closest = _to_others(others.sketch, named, marks)
    wrong = (others.opens >= 0) & (others.opens != named)
    most = partial(_largest, others.text, len(beside))
    entries = [
        EntryScores(
            edit.id,
            request.prompt,
            request.subject,
            edit.enabled,
            forms[i],
            _nearest(int(subject[i]), marks, closest, others, beside),
        )
        for i, (edit, request) in enumerate(edits)
    ]
    return MemoryScores(
        block=block,
        threshold=hook.alpha,
        own=_populations(OWN, own, cosines, opened.float()),
        beside=_populations(BESIDE, beside, most(reach), most(wrong.float())),
        entries=entries,
    )


def _standing(
    hooks: HookSet, requests: Sequence[EditRequest]
) -> list[tuple[EditRecord, EditRequest]]:
    """The edits of `requests` that are written and not superseded."""
    known = {(edit.request.fact, edit.request.target): edit for edit in hooks.journal.standing()}
    pairs = ((known.get((request.fact, request.target)), request) for request in requests)
    return [(edit, request) for edit, request in pairs if edit is not None]


def _marks(hooks: HookSet, block: int, of_edit: Tensor) -> _Marks:
    journal = hooks.journal
    unit, owner = journal.fingerprints(block, len(hooks.sketches[block][1]))
    stands = journal.stands(len(journal.batches))[owner]
    unit, owner = unit[stands], owner[stands]
    return _Marks(unit, of_edit[owner], journal.served()[owner] >= 0)


def _read(lm: LanguageModel, hook: MemoryHook, texts: Sequence[Text], of_edit: Tensor) -> _Tokens:
    """Every token of locality prompts, of other texts the last token of the name. of_edit int64
    `(e,)`: the number of each edit's subject."""

    def make(hook: MemoryHook, keys: Tensor, _: slice) -> Sequence[Tensor]:
        reading = hook.read(keys)
        sketch = fingerprint_sketch(keys, hook.projection).float() - hook.offset.float()
        opens = of_edit.to(reading.edit.device)[reading.edit.clamp_min(0)]
        return normalize(sketch, dim=-1), opens.where(reading.is_open, -1)

    parts = []
    for every in (False, True):
        places = [i for i, text in enumerate(texts) if (text.kind == LOCALITY) is every]
        if not places:
            continue
        rows = [texts[i].row for i in places]
        ((sketch, opens),) = read_rows(lm, rows, [hook], make, every=every)
        counts = torch.tensor([len(row.ids) if every else 1 for row in rows])
        parts.append((sketch, opens, torch.tensor(places).repeat_interleave(counts)))
    sketch, opens, text = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return _Tokens(sketch, opens, text)


def _to_own(sketch: Tensor, subject: Tensor, marks: _Marks) -> Tensor:
    """The largest cosine of each of the sketches `(n, s)` to a fingerprint of its subject, whose
    number is in `subject` `(n,)`; `(n,)`."""
    found = torch.empty(len(sketch))
    for number in subject.unique():
        its = subject == number
        found[its] = (sketch[its] @ marks.unit[marks.subject == number].T).amax(1)
    return found


def _to_others(
    sketch: Tensor, subject: Tensor, marks: _Marks
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Of the sketches `(t, s)` of tokens that name `subject` `(t,)`, -1 for none: the largest
    cosine of each to another subject's fingerprint in force, `(t,)`; and for each fingerprint, in
    force or not, the largest cosine of a token that does not name its subject, and that token,
    `(f,)` both. The cosine is -inf where there is nothing to compare."""
    reach = []
    best = torch.full((len(marks.unit),), -torch.inf)
    token = torch.zeros(len(marks.unit), dtype=torch.long)
    size = max(1, _AT_ONCE // len(marks.unit))
    for first in range(0, len(sketch), size):
        some = slice(first, first + size)
        cosines = sketch[some] @ marks.unit.T
        cosines.masked_fill_(subject[some, None] == marks.subject, -torch.inf)
        largest, place = cosines.max(0)
        token = torch.where(largest > best, place + first, token)
        best = torch.maximum(best, largest)
        reach.append(cosines.masked_fill_(~marks.in_force, -torch.inf).amax(1))
    return torch.cat(reach), (best, token)


def _largest(text: Tensor, n: int, values: Tensor) -> Tensor:
    """The largest of the tokens' `values` `(t,)` in each of n texts, `(n,)`; text `(t,)`: see
    `_Tokens`."""
    return torch.full((n,), -torch.inf).scatter_reduce(0, text, values, "amax")


def _populations(
    kinds: Sequence[str], texts: Sequence[Text], cosines: Tensor, opens: Tensor
) -> list[Population]:
    """Of the kinds of which there are texts with a cosine. cosines, opens `(n,)`."""
    found = []
    for kind in kinds:
        its = torch.tensor([text.kind == kind for text in texts]) & cosines.isfinite()
        told = spread(cosines[its])
        if told is not None:
            found.append(Population(kind, int(its.sum()), told, float(opens[its].double().mean())))
    return found


def _nearest(
    subject: int,
    marks: _Marks,
    closest: tuple[Tensor, Tensor],
    tokens: _Tokens,
    texts: Sequence[Text],
) -> Neighbour | None:
    """The text whose token comes closest to a fingerprint of `subject`, a number. closest: see
    `_to_others`."""
    best, token = (tensor[marks.subject == subject] for tensor in closest)
    mark = best.argmax()
    if not best[mark].isfinite():
        return None
    text = texts[int(tokens.text[token[mark]])]
    opens = int(tokens.opens[token[mark]]) == subject
    return Neighbour(text.kind, text.text, float(best[mark]), opens)
