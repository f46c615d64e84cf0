"""How close background keys come to the edits' fingerprints, kept up to date batch by batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.journal.journal import Batch, Journal


@dataclass(frozen=True)
class _Nearest:
    """Nearest fingerprint of each background key.

    score float32 `(m,)`: its cosine, -inf if there is none; edit int64 `(m,)`: the id of its edit,
    or -1. counted bool `(e,)`: by id, whether the edit's fingerprints are included.
    """

    score: Tensor
    edit: Tensor
    counted: Tensor


class BackgroundScores:
    """The score of each background key of one layer under the keyed gate, with every edit enabled.

    sketched: the background's unit-norm sketches, float32 `(m, s)`. A new batch is compared only
    through its own fingerprints; where it supersedes earlier edits, the background keys that were
    nearest to those edits are compared with all remaining fingerprints again.
    """

    def __init__(self, sketched: Tensor) -> None:
        self._sketched = sketched
        self._batches: list[Batch] = []
        self._settled = self._none()

    def of(self, journal: Journal, layer: int) -> Tensor | None:
        """Scores `(m,)` after the last batch of `journal`; None if no edit has a fingerprint.

        The last batch is compared anew each time, because it may still fail or be refused in part;
        earlier batches are final.
        """
        settled = journal.batches[:-1]
        known = len(self._batches)
        if self._batches != settled[:known]:
            self._batches, self._settled = [], self._none()
        if len(settled) > len(self._batches):
            self._settled = self._after(self._settled, journal, layer, len(settled))
            self._batches = settled
        found = self._after(self._settled, journal, layer, len(journal.batches))
        return None if (found.edit < 0).all() else found.score

    def _none(self) -> _Nearest:
        no_rows = self._sketched[:0]
        no_ids = torch.zeros(0, dtype=torch.long)
        return _Nearest(*_nearest(self._sketched, no_rows, no_ids), no_ids.bool())

    def _after(self, before: _Nearest, journal: Journal, layer: int, n_batches: int) -> _Nearest:
        """The nearest fingerprints over the first `n_batches`; `before` covers fewer batches."""
        stands = journal.stands(n_batches)
        fingerprints, owner = journal.fingerprints(layer, self._sketched.shape[1], n_batches)
        counted = torch.zeros_like(stands)
        counted[: len(before.counted)] = before.counted
        score, edit = before.score, before.edit
        lost = counted & ~stands
        if lost.any():
            rows = lost[edit] & (edit >= 0)
            left = (counted & stands)[owner]
            again = _nearest(self._sketched[rows], fingerprints[left], owner[left])
            score = score.masked_scatter(rows, again[0])
            edit = edit.masked_scatter(rows, again[1])
        new = (stands & ~counted)[owner]
        nearest, whose = _nearest(self._sketched, fingerprints[new], owner[new])
        closer = nearest > score
        return _Nearest(
            torch.where(closer, nearest, score), torch.where(closer, whose, edit), stands
        )


def _nearest(sketched: Tensor, fingerprints: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Per row of `sketched`: the largest cosine to any fingerprint, and that one's owner."""
    best = sketched.new_full((len(sketched),), -torch.inf)
    whose = torch.full((len(sketched),), -1)
    # In blocks, because the whole product may not fit in memory.
    for rows, ids in zip(fingerprints.split(1024), owner.split(1024), strict=True):
        if len(rows):
            cosine, index = (sketched @ rows.T).max(-1)
            whose = torch.where(cosine > best, ids[index], whose)
            best = torch.maximum(cosine, best)
    return best, whose
