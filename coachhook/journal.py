"""The journal of batches: every edit ever made, its factors and fingerprints, layer by layer.

Everything a hook needs is derived from the journal, so that going back to an earlier batch means
forgetting the later ones, and nothing is ever subtracted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from coachhook.gates import Threshold
from coachhook.requests import EditRequest
from coachhook_kernels import Delta


class Verdict(StrEnum):
    """How a request ended: in force, in force but not everywhere it should be, or not written."""

    APPLIED = "applied"
    WEAK = "weak"
    REFUSED = "refused"


@dataclass
class EditRecord:
    """One request in the journal. id counts all requests from 0; reason: why it is not applied."""

    id: int
    request: EditRequest
    verdict: Verdict = Verdict.APPLIED
    reason: str = ""
    enabled: bool = True


@dataclass(frozen=True)
class LayerFactors:
    """What one batch of n edits adds to one layer; float32 on the CPU.

    residuals `(n, d_out)` and solutions `(n, d_in)`: row i is edit i's share `r aᵀ` of Δ, zero for
    an edit that does not use the layer. keys `(c, d_in)`: the columns of `K₂` that went into
    `C_accu`. fingerprints `(f, s)` with unit rows, and owner int64 `(f,)`: the row of their edit.
    """

    residuals: Tensor
    solutions: Tensor
    keys: Tensor
    fingerprints: Tensor
    owner: Tensor

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))

    def spread(self, rows: Tensor, n: int) -> "LayerFactors":
        """The same for a batch of `n` edits in which these are rows `rows`; the others are zero."""
        return replace(
            self,
            residuals=self.residuals.new_zeros(n, self.residuals.shape[1]).index_copy(
                0, rows, self.residuals
            ),
            solutions=self.solutions.new_zeros(n, self.solutions.shape[1]).index_copy(
                0, rows, self.solutions
            ),
            owner=rows[self.owner],
        )

    @classmethod
    def nothing(cls, n: int, shape: tuple[int, int], size: int) -> "LayerFactors":
        """Of `n` edits that do not use a layer of `shape` `(d_in, d_out)`; `size`: s."""
        d_in, d_out = shape
        return cls(
            residuals=torch.zeros(n, d_out),
            solutions=torch.zeros(n, d_in),
            keys=torch.zeros(0, d_in),
            fingerprints=torch.zeros(0, size),
            owner=torch.zeros(0, dtype=torch.long),
        )


@dataclass
class Batch:
    """One batch: its edits, what it adds to each layer, and the thresholds after it.

    stored: name and size in bytes of the file it is stored in, once it is.
    """

    edits: list[EditRecord]
    layers: dict[int, LayerFactors]
    thresholds: dict[int, Threshold]
    stored: tuple[str, int] | None = None


@dataclass
class Journal:
    """All batches in order."""

    batches: list[Batch] = field(default_factory=list)

    def edits(self) -> list[EditRecord]:
        return [edit for batch in self.batches for edit in batch.edits]

    def superseded(self) -> dict[int, int]:
        """Ids of edits whose fact was edited again later, and the id of the edit that did it."""
        latest: dict[tuple[str, str], int] = {}
        replaced: dict[int, int] = {}
        for edit in self.edits():
            if edit.verdict is Verdict.REFUSED:
                continue
            earlier = latest.get(edit.request.fact)
            if earlier is not None:
                replaced[earlier] = edit.id
            latest[edit.request.fact] = edit.id
        return replaced

    def standing(self) -> list[EditRecord]:
        """Edits that were written and not superseded, enabled or not."""
        replaced = self.superseded()
        return [
            edit
            for edit in self.edits()
            if edit.verdict is not Verdict.REFUSED and edit.id not in replaced
        ]

    def live(self) -> list[EditRecord]:
        """Edits in force: written, not superseded, and enabled."""
        return [edit for edit in self.standing() if edit.enabled]

    def fingerprints(self, layer: int, size: int) -> tuple[Tensor, Tensor]:
        """All fingerprints of a layer `(e, size)` and the id of the edit each belongs to `(e,)`."""
        rows, owners = [torch.zeros(0, size)], [torch.zeros(0, dtype=torch.long)]
        for batch in self.batches:
            factors = batch.layers[layer]
            rows.append(factors.fingerprints)
            owners.append(factors.owner + batch.edits[0].id)
        return torch.cat(rows), torch.cat(owners)

    def delta(self, layer: int, shape: tuple[int, int], without: Sequence[int] = ()) -> Delta:
        """Δ of a layer of `shape` `(d_in, d_out)`, as orthonormal factors, or dense where that
        takes less memory. `without`: ids of edits whose share is left out."""
        d_in, d_out = shape
        residuals, solutions = [torch.zeros(0, d_out)], [torch.zeros(0, d_in)]
        for batch in self.batches:
            residuals.append(batch.layers[layer].residuals)
            solutions.append(batch.layers[layer].solutions)
        kept = torch.ones(sum(map(len, residuals)), dtype=torch.bool)
        kept[list(without)] = False
        return compact(torch.cat(residuals)[kept], torch.cat(solutions)[kept])


def compact(residuals: Tensor, solutions: Tensor) -> Delta:
    """`Σ rᵢ aᵢᵀ` for rows rᵢ `(n, d_out)` and aᵢ `(n, d_in)`, in the smaller of the two forms."""
    written = (residuals != 0).any(-1)
    residuals, solutions = residuals[written], solutions[written]
    rank, d_out, d_in = len(residuals), residuals.shape[1], solutions.shape[1]
    if rank * (d_in + d_out) >= d_in * d_out:
        return Delta(residuals.T @ solutions)
    up, mix = torch.linalg.qr(residuals.T.double())
    return Delta((mix @ solutions.double()).float().contiguous(), up.float().contiguous())


def edit_to_json(edit: EditRecord) -> dict[str, Any]:
    return {
        "id": edit.id,
        "request": edit.request.to_dict(),
        "verdict": edit.verdict.value,
        "reason": edit.reason,
        "enabled": edit.enabled,
    }


def edit_from_json(data: Mapping[str, Any]) -> EditRecord:
    return EditRecord(
        id=int(data["id"]),
        request=EditRequest.from_dict(data["request"]),
        verdict=Verdict(data["verdict"]),
        reason=str(data["reason"]),
        enabled=bool(data["enabled"]),
    )
