"""How near background keys come to the fingerprints of edits, kept from batch to batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from coachhook.journal.journal import Batch, Journal


@dataclass(frozen=True)
class _Nearest:
    """Per background key the largest cosine to a fingerprint, float32 `(m,)`, and the id of its
    edit, int64 `(m,)`; -inf and -1 without any. counted: by id, the edits compared, bool `(e,)`."""

    score: Tensor
    edit: Tensor
    counted: Tensor


class BackgroundScores:
    """The score of each background key of one layer under the keyed gate, with every edit enabled.

    sketched: the background's unit-norm sketches, float32 `(m, s)`. A batch costs the comparison
    with its own fingerprints; where it supersedes earlier edits, the background keys nearest to
    those are compared with all others again.
    """

    def __init__(self, sketched: Tensor) -> None:
        self._sketched = sketched
        self._batches: list[Batch] = []
        self._settled = self._none()

    def of(self, journal: Journal, layer: int) -> Tensor | None:
        """Scores `(m,)` after the last batch of `journal`; None if no fingerprint stands.

        The last batch is compared anew each time: it may yet fail, or be refused in parts. Those
        before it are final.
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
        """The same for the first `n_batches`, from `before` for fewer of them."""
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
    """Of each row of `sketched` the largest cosine to any of the fingerprints, and its owner."""
    best = sketched.new_full((len(sketched),), -torch.inf)
    whose = torch.full((len(sketched),), -1)
    # In blocks: the whole product need not fit in memory.
    for rows, ids in zip(fingerprints.split(1024), owner.split(1024), strict=True):
        if len(rows):
            cosine, index = (sketched @ rows.T).max(-1)
            whose = torch.where(cosine > best, ids[index], whose)
            best = torch.maximum(cosine, best)
    return best, whose
