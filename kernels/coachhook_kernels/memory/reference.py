"""Specification of `memory_gate` and `memory_add_`: plain torch."""

import torch
from torch import Tensor

from coachhook_kernels.memory.gate import MemoryGate
from coachhook_kernels.scores import fingerprint_similarity


def memory_gate(keys: Tensor, gate: MemoryGate) -> tuple[Tensor, Tensor]:
    """The largest cosine of each key `(..., d)` to an enabled fingerprint, float32 `(...)`, and the
    entry that this fingerprint belongs to, int64 `(...)`. -1 and -1 where none is enabled."""
    score, index = fingerprint_similarity(
        keys, gate.projection, gate.offset, gate.fingerprints, gate.enabled
    )
    if gate.owner.numel() == 0:
        return score, index
    return score, gate.owner.take(index).masked_fill(index < 0, -1)


def memory_add(
    output: Tensor, score: Tensor, entry: Tensor, threshold: Tensor, rows: Tensor
) -> Tensor:
    """`output + rows[entry]` where the gate is open, elsewhere `output` itself, bit for bit.

    output `(..., d)`; score and entry `(...)`, of `memory_gate`; rows `(e, d)`. Differentiable in
    output; the gate and the rows are constants.
    """
    if rows.shape[0] == 0:
        return output
    is_open = ((score >= threshold) & (entry >= 0)).unsqueeze(-1)
    return torch.where(is_open, output + rows[entry.clamp_min(0)].to(output.dtype), output)
