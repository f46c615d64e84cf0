"""Compaction: the first batches of a journal as one Δ, one set of keys, and their records."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from coachhook.journal import Base, Batch, Journal, MergedFactors


def merge(
    journal: Journal, keep: int, shapes: Mapping[int, tuple[int, int]], without: Sequence[int]
) -> None:
    """Merge all batches of `journal` but the last `keep` into its base, in place.

    shapes: `(d_in, d_out)` of each layer; without: ids of edits whose share is not in Δ. Nothing
    happens where nothing is left to merge.
    """
    through = len(journal.batches) - keep
    if through <= journal.merged:
        return
    # Of the whole journal Δ is at hand.
    part = journal if keep == 0 else Journal(journal.batches[:through], journal.base)
    tensors: dict[str, Tensor] = {}
    for layer, shape in shapes.items():
        down, up = part.delta(layer, shape, without)
        tensors[f"down.{layer}"] = down
        if up is not None:
            tensors[f"up.{layer}"] = up
        name, earlier = _earlier(part, layer, shape[0])
        tensors[f"{name}.{layer}"] = earlier
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
    """All keys of the journal, or their `K'K'ᵀ`, whichever is smaller, after "keys" or "gram".

    The Gram matrix is float64: added to a second moment whose eigenvalues span many orders of
    magnitude, float32 would lose the least of them.
    """
    gram, pieces, rows = journal.gram(layer), [torch.zeros(0, d_in)], 0
    for keys in journal.keys(layer):
        pieces.append(keys)
        rows += len(keys)
        if gram is not None or 4 * rows > 8 * d_in:
            several = torch.cat(pieces).double()
            gram = several.T @ several if gram is None else gram.addmm(several.T, several)
            pieces, rows = [torch.zeros(0, d_in)], 0
    return ("keys", torch.cat(pieces)) if gram is None else ("gram", gram)
