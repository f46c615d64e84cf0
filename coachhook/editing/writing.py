"""The interface of writing: what an editor asks of a readout, batch by batch."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from coachhook.facts.request import EditRequest
from coachhook.journal.journal import Batch, EditRecord


class Wanted(NamedTuple):
    """What n requests are to receive. values float32: of the shape that `Writing.shape` says; loss
    `(n,)`: mean negative log-likelihood (nats) of their targets then, None if not known."""

    values: Tensor
    loss: Tensor | None = None


class Writing(Protocol):
    """Writes batches into the hooks of one set. All but `values` and `shape` is called on the first
    process of a job alone."""

    def shape(self, n: int) -> tuple[int, ...]:
        """The shape of the values of n requests."""

    def refuse(self, edits: Sequence[EditRecord]) -> None:
        """Set the verdict of edits that are refused before any work."""

    def values(self, requests: Sequence[EditRequest]) -> Wanted:
        """Optimise what the requests are to receive; a collective of the job's processes."""

    def write(self, batch: Batch, wanted: Wanted) -> None:
        """Fill `batch`, already the last in the attached hooks' journal; wanted: of the edits that
        are not refused. More of them may be refused here."""

    def write_nothing(self, batch: Batch) -> None:
        """The same for a batch of refused edits."""

    def absorb(self, batch: Batch) -> None:
        """Take a batch that has been written into account for the next."""

    def forget(self) -> None:
        """Work out what earlier batches left anew: some are gone."""
