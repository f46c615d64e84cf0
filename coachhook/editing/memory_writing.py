"""Writing under the memory readout: a row of its own for every subject, and its fingerprints."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from coachhook.editing.forms import Form, forms_of, rivals_of
from coachhook.editing.layer_writer import KeySketches
from coachhook.editing.sinks import refuse_sinks
from coachhook.editing.values import optimise_shifts
from coachhook.editing.writing import Wanted
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import Threshold
from coachhook.hookset import HookSet
from coachhook.journal.journal import Batch, EditRecord, Verdict
from coachhook.journal.memory import MemoryFactors
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.reading import read_rows
from coachhook.models.tokens import Row
from coachhook.statistics.measure import KeyStatistics
from coachhook.system.processes import ALONE, Processes
from coachhook.system.progress import track

# Most edits, the latest, that a threshold is chosen by.
SAMPLE = 1024
# A rival that resembles its subject this much cannot be told from it.
_TWIN = 0.98


class MemoryWriting:
    """See `Writing`."""

    def __init__(
        self, lm: LanguageModel, hooks: HookSet, statistics: KeyStatistics, processes: Processes
    ) -> None:
        self._lm, self._hooks, self._processes = lm, hooks, processes
        (self._gate_block,) = hooks.layers
        sketch = hooks.sketches[self._gate_block]
        self._sketches = KeySketches.of_keys(statistics[self._gate_block], sketch)

    @property
    def _write_blocks(self) -> tuple[int, ...]:
        blocks = self._hooks.config.memory.write_blocks
        assert blocks is not None
        return blocks

    def shape(self, n: int) -> tuple[int, ...]:
        return n, len(self._write_blocks), self._lm.model.config.get_text_config().hidden_size

    def refuse(self, edits: Sequence[EditRecord]) -> None:
        refuse_sinks(self._lm, self._hooks, {self._gate_block: self._sketches}, edits)

    def values(self, requests: Sequence[EditRequest]) -> Wanted:
        return self._optimised(requests, self._processes)

    def _optimised(self, requests: Sequence[EditRequest], processes: Processes) -> Wanted:
        together = [*requests, *[edit.request for edit in self._standing_beside(requests)]]
        numbers: dict[str, int] = {}
        joined = [numbers.setdefault(request.subject, len(numbers)) for request in together]
        # A whole row reaches every open token, in whatever context.
        config = replace(self._hooks.config.values, gain=1.0)
        with (
            self._hooks.off(self._lm.model),
            track("target values", len(together), shown=processes.is_first) as advance,
        ):
            found = optimise_shifts(
                self._lm,
                Architecture(self._hooks.base.template),
                self._write_blocks,
                together,
                joined,
                config,
                advance,
                processes,
            )
        return Wanted(found.shift[: len(requests)], found.loss[: len(requests)])

    def write(self, batch: Batch, wanted: Wanted) -> None:
        accepted = [i for i, edit in enumerate(batch.edits) if edit.verdict is not Verdict.REFUSED]
        # Half the memory; the error is a four-hundredth of a row at most.
        values = dict(zip(accepted, wanted.values.to("cpu", torch.bfloat16), strict=True))
        if wanted.loss is not None:
            self._refuse_unlikely([batch.edits[i] for i in accepted], wanted.loss)
        requests = [batch.edits[i].request for i in accepted]
        forms = forms_of(self._lm, requests, self._hooks.config.memory)
        marks = self._fingerprints([form.rows for form in forms])
        distinct = self._sketches.distinct(marks, self._hooks.config.memory.ordinary).tolist()
        self._refuse_common([batch.edits[i] for i in accepted], forms, marks, distinct)
        if wanted.loss is not None:
            self._say_without_refused(batch, accepted, values)
        kept = [
            place
            for place, form in enumerate(forms)
            if distinct[place]
            and batch.edits[accepted[form.request]].verdict is not Verdict.REFUSED
        ]
        owner = torch.tensor([forms[place].request for place in kept], dtype=torch.long)
        rivals, beside = self._rivals([batch.edits[i] for i in accepted], marks[kept], owner)
        rows = torch.zeros(self.shape(len(batch.edits)), dtype=torch.bfloat16)
        for i in accepted:
            if batch.edits[i].verdict is not Verdict.REFUSED:
                rows[i] = values[i]
        of = torch.tensor(accepted, dtype=torch.long)
        batch.layers[self._gate_block] = MemoryFactors(
            rows=rows,
            fingerprints=torch.cat([marks[kept], rivals]),
            owner=of[torch.cat([owner, beside])],
        )
        self._share_rows(batch)
        batch.thresholds[self._gate_block] = self._threshold()
        self._hooks.refresh()

    def write_nothing(self, batch: Batch) -> None:
        layer, earlier = self._gate_block, self._hooks.journal.batches[:-1]
        size = self._sketches.projection.shape[0]
        batch.layers[layer] = MemoryFactors(
            rows=torch.zeros(self.shape(len(batch.edits)), dtype=torch.bfloat16),
            fingerprints=torch.zeros(0, size),
            owner=torch.zeros(0, dtype=torch.long),
        )
        batch.thresholds[layer] = earlier[-1].thresholds[layer] if earlier else Threshold()

    def absorb(self, batch: Batch) -> None: ...

    def forget(self) -> None: ...

    def _standing_beside(self, requests: Sequence[EditRequest]) -> list[EditRecord]:
        """Edits in force of the same subjects, but other facts."""
        subjects = {request.subject for request in requests}
        facts = {request.fact for request in requests}
        return [
            edit
            for edit in self._hooks.journal.live()
            if edit.request.subject in subjects and edit.request.fact not in facts
        ]

    def _say_without_refused(
        self, batch: Batch, accepted: Sequence[int], values: dict[int, Tensor]
    ) -> None:
        """Optimise again the rows that were to say a refused fact besides others of its subject,
        until none is among them."""
        known: set[int] = set()
        while True:
            refused = {i for i in accepted if batch.edits[i].verdict is Verdict.REFUSED}
            subjects = {batch.edits[i].request.subject for i in refused - known}
            again = [
                i
                for i in accepted
                if i not in refused and batch.edits[i].request.subject in subjects
            ]
            if not again:
                return
            known = refused
            # The first process writes alone.
            wanted = self._optimised([batch.edits[i].request for i in again], ALONE)
            assert wanted.loss is not None
            values.update(zip(again, wanted.values.to("cpu", torch.bfloat16), strict=True))
            self._refuse_unlikely([batch.edits[i] for i in again], wanted.loss)

    def _refuse_unlikely(self, edits: Sequence[EditRecord], loss: Tensor) -> None:
        """Refuse edits whose value did not converge."""
        most = self._hooks.config.memory.unlikely
        for edit, nats in zip(edits, loss.tolist(), strict=True):
            if not nats <= most:
                edit.verdict = Verdict.REFUSED
                edit.reason = (
                    f"no value makes the target likely: {nats:.1f} nats a token are left, more "
                    f"than {most:g}"
                )

    def _refuse_common(
        self,
        edits: Sequence[EditRecord],
        forms: Sequence[Form],
        marks: Tensor,
        distinct: Sequence[bool],
    ) -> None:
        """Refuse edits none of whose fingerprints differs from ordinary tokens, or one of whose
        aliases does not."""
        shares = self._sketches.share_alike(marks).tolist()
        places: list[list[int]] = [[] for _ in edits]
        for place, form in enumerate(forms):
            places[form.request].append(place)
        for edit, own in zip(edits, places, strict=True):
            common = [p for p in own if forms[p].alias is not None and not distinct[p]]
            if edit.verdict is Verdict.REFUSED or (not common and any(distinct[p] for p in own)):
                continue
            worst = max(common or own, key=lambda place: shares[place])
            name = forms[worst].alias or edit.request.subject
            kind = "alias" if common else "subject"
            edit.verdict = Verdict.REFUSED
            edit.reason = (
                f"the {kind} {name!r} cannot be told from ordinary text: it would open on "
                f"{100 * shares[worst]:.2g} % of its tokens"
            )

    def _fingerprints(self, groups: Sequence[Sequence[Row]]) -> Tensor:
        """The mean key of each group of texts at their ends, as unit sketches `(n, s)`."""
        rows = [row for group in groups for row in group]
        if not rows:
            return torch.zeros(0, self._sketches.projection.shape[0])
        hook = self._hooks.modules(self._lm.model)[self._gate_block]
        ((keys,),) = read_rows(self._lm, rows, [hook], lambda _, keys, __: [keys], every=False)
        return self._sketches.of_groups(keys, [len(group) for group in groups])

    def _rivals(
        self, edits: Sequence[EditRecord], marks: Tensor, owner: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fingerprints `(r, s)` of names that `edits` are not to be taken for, and whose they are
        `(r,)`; their names go into the records. marks, owner: the edits' own fingerprints."""
        config = self._hooks.config.memory
        earlier = [edit.request.subject for edit in self._hooks.journal.live()][-SAMPLE:]
        requests = [edit.request for edit in edits]
        others = list(dict.fromkeys([*earlier, *[request.subject for request in requests]]))
        rivals = rivals_of(self._lm, requests, others, config)
        found = self._fingerprints([rival.rows for rival in rivals])
        kept = [
            place
            for place, rival in enumerate(rivals)
            if edits[rival.request].verdict is not Verdict.REFUSED
            and not (marks[owner == rival.request] @ found[place] >= _TWIN).any()
        ]
        for edit in edits:
            edit.rivals = ()
        for rival in (rivals[place] for place in kept):
            edits[rival.request].rivals += (rival.name,)
        whose = torch.tensor([rivals[place].request for place in kept], dtype=torch.long)
        return found[kept], whose

    def _share_rows(self, batch: Batch) -> None:
        """Note for each edit which others its row says."""
        written = [edit for edit in batch.edits if edit.verdict is not Verdict.REFUSED]
        beside = self._standing_beside([edit.request for edit in written])
        for edit in written:
            edit.shares = tuple(
                other.id
                for other in (*beside, *written)
                if other is not edit and other.request.subject == edit.request.subject
            )

    def _threshold(self) -> Threshold:
        """The lowest cosine that at most the stated shares of ordinary tokens and of other subjects
        reach, see `MemoryConfig`."""
        journal, layer, config = self._hooks.journal, self._gate_block, self._hooks.config.memory
        fingerprints, owner = journal.fingerprints(layer, self._sketches.projection.shape[0])
        standing = journal.stands(len(journal.batches))[owner]
        fingerprints, owner = fingerprints[standing], owner[standing]
        least = config.least
        if len(fingerprints):
            ordinary = self._sketches.background_scores.of(journal, layer)
            subjects = [edit.request.subject for edit in journal.edits()]
            others = _between(fingerprints, owner, subjects)
            if others is not None:
                raised = config.least + config.raised
                least = max(least, min(raised, ceiling(others, config.neighbours)))
            if ordinary is not None:
                least = max(least, ceiling(ordinary, config.ordinary))
        return Threshold(0.0, 1.0, least)


def ceiling(scores: Tensor, share: float) -> float:
    """Just above the score that at most this share of `scores` `(n,)` exceeds."""
    ordered = scores.sort(descending=True).values
    return float(ordered[int(share * len(ordered))]) + 1e-4


def _between(fingerprints: Tensor, owner: Tensor, subjects: Sequence[str]) -> Tensor | None:
    """The largest cosine of the first fingerprint of each edit, the latest `SAMPLE` of them, to one
    of another subject, `(n,)`; None for a single subject."""
    numbers: dict[str, int] = {}
    of = torch.tensor([numbers.setdefault(subjects[i], len(numbers)) for i in owner.tolist()])
    if len(numbers) < 2:
        return None
    is_first = torch.ones_like(owner, dtype=torch.bool)
    is_first[1:] = owner[1:] != owner[:-1]
    first = is_first.nonzero().squeeze(-1)[-SAMPLE:]
    cosines = fingerprints[first] @ fingerprints.T
    return cosines.masked_fill(of[first][:, None] == of, -1.0).amax(1)
