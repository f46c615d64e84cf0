"""Compaction: the first batches of a journal as one Δ, one set of keys, and their records."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coachhook.journal.factors import MergedFactors
from coachhook.journal.journal import Base, Batch, Journal


def merge(
    journal: Journal, keep: int, shapes: Mapping[int, tuple[int, int]], without: Sequence[int]
) -> None:
    """Merge all batches of `journal` but the last `keep` into its base, in place.

    shapes: `(d_in, d_out)` of each layer; without: ids of edits whose share is not in Δ. Does
    nothing if those batches are already merged.
    """
    through = len(journal.batches) - keep
    if through <= journal.merged:
        return
    # With nothing kept back, the journal's own cached Δ can be used.
    part = journal if keep == 0 else Journal(journal.batches[:through], journal.base)
    tensors: dict[str, Tensor] = {}
    for layer, shape in shapes.items():
        down, up = part.delta(layer, shape, without)
        tensors[f"down.{layer}"] = down
        if up is not None:
            tensors[f"up.{layer}"] = up
        name, earlier = _earlier(part, layer, shape[0])
        tensors[f"{name}.{layer}"] = earlier
    _replace(journal, through, tensors)


def merge_rows(journal: Journal, keep: int, layer: int, n_blocks: int, d: int) -> None:
    """The same under the memory readout, whose base holds the rows of `layer`'s edits. Rows of
    edits that no longer stand become zero: nothing reads them again."""
    through = len(journal.batches) - keep
    if through <= journal.merged:
        return
    part = journal if keep == 0 else Journal(journal.batches[:through], journal.base)
    rows = part.rows(layer, n_blocks, d)
    # Not what later batches replaced: they may yet be rolled back.
    stands = part.stands(through)
    _replace(journal, through, {f"rows.{layer}": torch.where(stands[:, None, None], rows, 0.0)})


def _replace(journal: Journal, through: int, tensors: Mapping[str, Tensor]) -> None:
    """Put a base of `tensors` in place of the first `through` batches' factors."""
    merged = [
        Batch(
            batch.edits,
            {k: MergedFactors(f.fingerprints, f.owner) for k, f in batch.layers.items()},
            batch.thresholds,
        )
        for batch in journal.batches[:through]
    ]
    journal.base = Base(through, tensors)
    journal.batches[:through] = merged


def _earlier(journal: Journal, layer: int, d_in: int) -> tuple[str, Tensor]:
    """("keys", all keys of the journal) or ("gram", their `K'K'ᵀ`), whichever is smaller.

    The Gram matrix is float64: it is added to a second moment whose eigenvalues span many orders of
    magnitude, and float32 would lose the smallest of them.
    """
    gram, rows = journal.gram(layer), torch.zeros(0, d_in)
    for keys in journal.keys(layer):
        rows = torch.cat([rows, keys])
        # Waiting for this many also avoids products of few rows, which are slow.
        if 4 * len(rows) > 8 * d_in:
            gram, rows = _with(gram, rows.double()), rows[:0]
    return ("keys", rows) if gram is None else ("gram", _with(gram, rows.double()))


def _with(gram: Tensor | None, keys: Tensor) -> Tensor:
    return keys.T @ keys if gram is None else torch.addmm(gram, keys.T, keys)
