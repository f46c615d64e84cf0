"""What the gate of the memory readout reads (csrc_notes/method.md, "Memory")."""

from typing import NamedTuple

from torch import Tensor


class MemoryGate(NamedTuple):
    """Entries by their fingerprints; a token is open where its largest cosine reaches `threshold`.

    projection `F` `(s, d)`; offset `(s,)`, the mean of `F k` over ordinary tokens; fingerprints
    `(f, s)` with rows of unit length; owner int64 `(f,)`: the entry of each; enabled bool `(f,)`;
    threshold 0-d float32, a cosine.
    """

    projection: Tensor
    offset: Tensor
    fingerprints: Tensor
    owner: Tensor
    enabled: Tensor
    threshold: Tensor
