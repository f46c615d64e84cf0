"""The journal of batches: every edit ever made, its factors and fingerprints, layer by layer.

Everything a hook needs is derived from the journal, so going back to an earlier batch means
forgetting the later ones; nothing is ever subtracted. Derived values are cached, so the cost of one
more batch depends on that batch alone and not on all before it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any, NotRequired

import torch
from torch import Tensor
from typing_extensions import TypedDict

from coachhook.errors import CompactedError
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import Threshold
from coachhook.journal.delta import add, no_delta
from coachhook.journal.prefix_cache import Running
from coachhook.system.json_shapes import Count
from coachhook.system.progress import each
from coachhook.system.tensor_file import TensorFile
from coachhook_kernels import Delta


class Verdict(StrEnum):
    """How a request ended: in force, in force but not everywhere it should be, or not written."""

    APPLIED = "applied"
    WEAK = "weak"
    REFUSED = "refused"


@dataclass
class EditRecord:
    """One request in the journal. id: its number over all batches, from 0; reason: why the verdict
    is not "applied". Under the memory readout, shares: ids of the other edits of its subject that
    its row says as well; rivals: names that its subject is not to be taken for.
    """

    id: int
    request: EditRequest
    verdict: Verdict = Verdict.APPLIED
    reason: str = ""
    enabled: bool = True
    shares: tuple[int, ...] = ()
    rivals: tuple[str, ...] = ()


@dataclass(eq=False)
class Batch:
    """One batch: its edits, what it adds to each layer (`Factors`, `MemoryFactors`, or what is left
    of them), and the thresholds after it.

    stored: the file that holds it, once there is one. Until then the whole batch is in memory,
    afterwards only its fingerprints, edits and thresholds are.
    """

    edits: list[EditRecord]
    layers: dict[int, Any]
    thresholds: dict[int, Threshold]
    stored: TensorFile | None = None

    @property
    def n_rivals(self) -> int:
        return sum(len(edit.rivals) for edit in self.edits)

    def move_to(self, file: TensorFile) -> None:
        """Read the factors from `file`, which holds them, from now on."""
        self.layers = {k: factors.stored(file, k) for k, factors in self.layers.items()}
        self.stored = file


@dataclass(eq=False)
class Base:
    """The first `through` batches merged into one, on the CPU.

    tensors, for each layer L: Δ as `down.L` and, unless it is dense, `up.L`, float32; and the keys
    `K'` of those batches as `keys.L` float32 `(c, d_in)` or, where that is smaller, as
    `gram.L = K'K'ᵀ` float64 `(d_in, d_in)`. Under the memory readout instead the rows of their
    edits, `rows.L` bfloat16 `(e, w, d)`. Either a mapping in memory or the file that holds it.
    """

    through: int
    tensors: Mapping[str, Tensor]

    def delta(self, layer: int) -> Delta:
        return Delta(self.tensors[f"down.{layer}"], self.tensors.get(f"up.{layer}"))

    def keys(self, layer: int) -> Tensor | None:
        return self.tensors.get(f"keys.{layer}")

    def gram(self, layer: int) -> Tensor | None:
        return self.tensors.get(f"gram.{layer}")

    def rows(self, layer: int) -> Tensor:
        return self.tensors[f"rows.{layer}"]


@dataclass(frozen=True)
class _Facts:
    """Edit ids. latest: by fact, the last edit written; replaced: by edit, the one replacing it;
    refused: edits not written."""

    latest: dict[tuple[str, str], int]
    replaced: dict[int, int]
    refused: list[int]

    @classmethod
    def none(cls) -> "_Facts":
        return cls({}, {}, [])

    def after(self, batches: Sequence[Batch]) -> "_Facts":
        new = _Facts(dict(self.latest), dict(self.replaced), list(self.refused))
        for edit in (edit for batch in batches for edit in batch.edits):
            if edit.verdict is Verdict.REFUSED:
                new.refused.append(edit.id)
                continue
            earlier = new.latest.get(edit.request.fact)
            if earlier is not None:
                new.replaced[earlier] = edit.id
            new.latest[edit.request.fact] = edit.id
        return new


@dataclass
class Journal:
    """All batches in order. base: what the first of them were merged into, if they were."""

    batches: list[Batch] = field(default_factory=list)
    base: Base | None = None
    _deltas: dict[int, tuple[Base | None, frozenset[int], Running[Batch, Delta]]] = field(
        default_factory=dict, repr=False
    )
    _marks: dict[int, Running[Batch, tuple[Tensor, Tensor]]] = field(
        default_factory=dict, repr=False
    )
    _rows: dict[int, tuple[Base | None, Running[Batch, Tensor]]] = field(
        default_factory=dict, repr=False
    )
    _rivals: dict[int, Running[Batch, tuple[Tensor, Tensor]]] = field(
        default_factory=dict, repr=False
    )
    _facts: Running[Batch, _Facts] = field(
        default_factory=lambda: Running(_Facts.none, _Facts.after), repr=False
    )

    @property
    def merged(self) -> int:
        """How many batches, from the first, `compact` has merged."""
        return 0 if self.base is None else self.base.through

    @property
    def n_merged_edits(self) -> int:
        """How many edits, from the first, are in the merged batches."""
        return self._count(self.merged)

    def edits(self) -> list[EditRecord]:
        return [edit for batch in self.batches for edit in batch.edits]

    def forget_after(self, batch: int) -> None:
        """Keep only the first `batch` batches. Raises `CompactedError` if more are merged."""
        if batch < self.merged:
            raise CompactedError(
                f"batches 1 to {self.merged} were merged into one by compact, and there is no way "
                f"back to batch {batch}; the earliest to go back to is {self.merged}"
            )
        del self.batches[batch:]

    def superseded(self) -> dict[int, int]:
        """For each edit whose fact was edited again: its id, and that of the edit replacing it."""
        return dict(self._told(len(self.batches)).replaced)

    def standing(self) -> list[EditRecord]:
        """Edits that are written and not superseded, enabled or not."""
        stands = self.stands(len(self.batches)).tolist()
        return [edit for edit in self.edits() if stands[edit.id]]

    def live(self) -> list[EditRecord]:
        """Edits in force: written, not superseded, and enabled."""
        return [edit for edit in self.standing() if edit.enabled]

    def stands(self, n_batches: int) -> Tensor:
        """By id, which edits of the first `n_batches` are written, not superseded, bool `(e,)`."""
        told = self._told(n_batches)
        stands = torch.ones(self._count(n_batches), dtype=torch.bool)
        stands[[*told.replaced, *told.refused]] = False
        return stands

    def in_force(self) -> Tensor:
        """By id, which edits are written, not superseded and enabled, bool `(e,)`."""
        enabled = torch.tensor([edit.enabled for edit in self.edits()], dtype=torch.bool)
        return self.stands(len(self.batches)) & enabled

    def fingerprints(
        self, layer: int, size: int, n_batches: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The fingerprints `(f, size)` of a layer in the first `n_batches` (None: all), and `(f,)`
        the id of the edit that each belongs to."""
        return _running(self._marks, layer, size, _own).over(self.batches[:n_batches])

    def rivals(self, layer: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """The fingerprints `(r, size)` of all edits' rivals, `(r,)` the id of the edit that each
        belongs to, and bool `(r,)` which of their names no edit in force has, as its subject or
        another name."""
        marks, owner = _running(self._rivals, layer, size, _of_rivals).over(self.batches)
        taken = {
            name.casefold()
            for edit in self.live()
            for name in (edit.request.subject, *edit.request.aliases)
        }
        names = [name for edit in self.edits() for name in edit.rivals]
        free = torch.tensor([name.casefold() not in taken for name in names], dtype=torch.bool)
        return marks, owner, free

    def delta(self, layer: int, shape: tuple[int, int], without: Sequence[int] = ()) -> Delta:
        """Δ of a layer of `shape` `(d_in, d_out)`: `U A` with orthonormal columns of `U`, or dense
        where that takes less memory. without: ids of edits to leave out; an edit merged into the
        base cannot be left out and is included regardless.

        The result is cached: do not modify it.
        """
        if len(self.batches) < self.merged:
            raise CompactedError(f"batches were taken from the {self.merged} that compact merged")
        base, left_out = self.base, frozenset(without)
        of_base, of_ids, running = self._deltas.get(layer, (None, None, None))
        if running is None or of_base is not base or of_ids != left_out:
            running = Running(
                partial(no_delta, shape) if base is None else partial(base.delta, layer),
                partial(_more_delta, layer=layer, left_out=left_out),
            )
            self._deltas[layer] = base, left_out, running
        return running.over(self.batches[self.merged :])

    def rows(self, layer: int, n_blocks: int, d: int) -> Tensor:
        """Under the memory readout, the rows of all edits by id, bfloat16 `(e, n_blocks, d)`."""
        known, running = self._rows.get(layer, (None, None))
        if running is None or known is not self.base:
            base = self.base
            no_rows = torch.zeros(0, n_blocks, d, dtype=torch.bfloat16)
            running = Running(
                lambda: no_rows if base is None else base.rows(layer),
                partial(_more_rows, layer=layer),
            )
            self._rows[layer] = base, running
        return running.over(self.batches[self.merged :])

    def served(self) -> Tensor:
        """Under the memory readout, by id int64 `(e,)`: the edit whose row a token receives that
        resembles this one's key, -1 for none. Of a subject's rows the latest is in force of which
        all edits are whose facts it says; two at once would vie for the same tokens."""
        edits, in_force = self.edits(), self.in_force().tolist()
        rows: dict[str, EditRecord] = {}
        for edit in edits:
            if all(in_force[i] for i in (edit.id, *edit.shares)):
                rows[edit.request.subject] = edit
        served = torch.full((len(edits),), -1)
        for edit in rows.values():
            served[[edit.id, *edit.shares]] = edit.id
        return served

    def unsaid(self) -> list[EditRecord]:
        """Under the memory readout, edits in force that no row in force says: the only ones that do
        say another fact of their subject as well, which is not in force; or, with that enabled
        again, a later row of the subject was written without it."""
        served = self.served().tolist()
        return [edit for edit in self.live() if served[edit.id] < 0]

    def keys(self, layer: int) -> Iterator[Tensor]:
        """The keys `K'` of all batches, in pieces `(c, d_in)`, except those summed up in `gram`. A
        batch being written counts once it has been written to the layer.

        Keys on disk are read piece by piece.
        """
        merged = None if self.base is None else self.base.keys(layer)
        if merged is not None:
            yield merged
        for batch in self.batches[self.merged :]:
            if layer in batch.layers:
                yield batch.layers[layer].keys

    def gram(self, layer: int) -> Tensor | None:
        """`K'K'ᵀ` float64 `(d_in, d_in)` of the merged batches; None if their keys are kept or
        nothing is merged."""
        return None if self.base is None else self.base.gram(layer)

    def _count(self, n_batches: int) -> int:
        # Ids count from 0, without gaps.
        return self.batches[n_batches - 1].edits[-1].id + 1 if n_batches else 0

    def _told(self, n_batches: int) -> _Facts:
        # The verdicts of the last batch may still change; those before it are final.
        settled = self.batches[: max(n_batches - 1, 0)]
        return self._facts.over(settled).after(self.batches[len(settled) : n_batches])


def _running(
    known: dict[int, Running[Batch, tuple[Tensor, Tensor]]],
    layer: int,
    size: int,
    part: Callable[[Batch], slice],
) -> Running[Batch, tuple[Tensor, Tensor]]:
    """Fingerprints and owners of a layer, of which each batch adds a part."""
    if layer not in known:
        nothing = torch.zeros(0, size), torch.zeros(0, dtype=torch.long)
        known[layer] = Running(lambda: nothing, partial(_more_marks, layer=layer, part=part))
    return known[layer]


def _own(batch: Batch) -> slice:
    return slice(None, -batch.n_rivals or None)


def _of_rivals(batch: Batch) -> slice:
    return slice(-batch.n_rivals, None) if batch.n_rivals else slice(0)


def _more_marks(
    found: tuple[Tensor, Tensor],
    batches: Sequence[Batch],
    *,
    layer: int,
    part: Callable[[Batch], slice],
) -> tuple[Tensor, Tensor]:
    rows, owners = [found[0]], [found[1]]
    for batch in batches:
        rows.append(batch.layers[layer].fingerprints[part(batch)])
        owners.append(batch.layers[layer].owner[part(batch)] + batch.edits[0].id)
    return torch.cat(rows), torch.cat(owners)


def _more_rows(found: Tensor, batches: Sequence[Batch], *, layer: int) -> Tensor:
    return torch.cat([found, *[batch.layers[layer].rows for batch in batches]])


def _more_delta(
    delta: Delta, batches: Sequence[Batch], *, layer: int, left_out: frozenset[int]
) -> Delta:
    known = delta
    for batch in each(f"edits of layer {layer}", batches):
        factors = batch.layers[layer]
        kept = torch.tensor([edit.id not in left_out for edit in batch.edits])
        share = factors.residuals[kept], factors.solutions[kept]
        delta = add(delta, *share, in_place=delta is not known)
    return delta


class EditEntry(TypedDict):
    """An edit in JSON."""

    id: Count
    request: dict[str, Any]
    verdict: Verdict
    reason: str
    shares: NotRequired[list[Count]]
    rivals: NotRequired[list[str]]


def edit_to_json(edit: EditRecord) -> dict[str, Any]:
    """An edit in JSON, without `enabled`: that can change later and is stored elsewhere."""
    return {
        "id": edit.id,
        "request": edit.request.to_dict(),
        "verdict": edit.verdict.value,
        "reason": edit.reason,
        **({"shares": list(edit.shares)} if edit.shares else {}),
        **({"rivals": list(edit.rivals)} if edit.rivals else {}),
    }


def edit_from_json(data: EditEntry) -> EditRecord:
    """Reads what `edit_to_json` wrote. Raises `RequestError` for an invalid request."""
    return EditRecord(
        id=data["id"],
        request=EditRequest.from_dict(data["request"]),
        verdict=Verdict(data["verdict"]),
        reason=data["reason"],
        shares=tuple(data.get("shares", ())),
        rivals=tuple(data.get("rivals", ())),
    )
