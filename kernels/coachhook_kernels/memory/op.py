"""`memory_gate` and `memory_add_` as torch operations: validation and dispatch."""

import math
from typing import Any

import torch
from torch import Tensor

from coachhook_kernels.hook_linear.op import WIDEST_SKETCH
from coachhook_kernels.hook_linear.validation import check_own_overlap
from coachhook_kernels.launch import runtime
from coachhook_kernels.launch.boundary import Operation
from coachhook_kernels.memory import reference
from coachhook_kernels.memory.gate import MemoryGate
from coachhook_kernels.memory.validation import check_add, check_gate


def memory_gate(keys: Tensor, gate: MemoryGate) -> tuple[Tensor, Tensor]:
    """The largest cosine of each key to an enabled fingerprint, and that fingerprint's entry.

    keys `(..., d)` of a float dtype. Returns the score, float32 `(...)`: -1 where no fingerprint is
    enabled, NaN for a key that is not finite; and the entry, int64 `(...)`: -1 where there is none.
    No gradient flows. Triton kernels run where the gate's projection has the dtype of the keys,
    plain torch otherwise. Raises KernelInputError where the tensors do not fit together.
    """
    check_gate(keys, gate)
    result: tuple[Tensor, Tensor] = _memory_gate(keys.detach(), *gate[:5])
    return result


def memory_add_(
    output: Tensor, score: Tensor, entry: Tensor, threshold: Tensor, rows: Tensor
) -> Tensor:
    """Add `rows[entry]` to the tokens of output `(..., d)` whose score reaches the threshold.

    score and entry `(...)`: of `memory_gate`; threshold 0-d float32; rows `(e, d)`, of any float
    dtype. Closed tokens keep their output bit for bit. In place, and returns `output`; where its
    gradient is recorded, a new tensor. Raises KernelInputError where the tensors do not fit.
    """
    check_add(output, score, entry, threshold, rows)
    if torch.is_grad_enabled() and output.requires_grad:
        return reference.memory_add(output, score, entry, threshold, rows)
    _memory_add(output, score, entry, threshold, rows)
    return output


def _gate(
    keys: Tensor,
    projection: Tensor,
    offset: Tensor,
    fingerprints: Tensor,
    owner: Tensor,
    enabled: Tensor,
) -> tuple[Tensor, Tensor]:
    # Only the score is wanted here; the threshold is applied where rows are added.
    gate = MemoryGate(projection, offset, fingerprints, owner, enabled, offset)
    given = (keys, projection, offset, fingerprints)
    known = keys.dtype == projection.dtype and runtime.triton_runs(*given)
    known = known and projection.shape[0] <= WIDEST_SKETCH
    if not known or any(tensor.numel() == 0 for tensor in given):
        return reference.memory_gate(keys, gate)

    def launch() -> tuple[Tensor, Tensor]:
        from coachhook_kernels.memory import kernel

        leading = keys.shape[:-1]
        rows = keys.reshape(math.prod(leading), keys.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        parts = (part.contiguous() for part in gate[1:])
        with torch.cuda.device_of(keys):
            score, entry = kernel.gate(rows, MemoryGate(projection, *parts))
        return score.view(leading), entry.view(leading)

    name = runtime.scope("memory_gate", keys, projection.shape[0])
    return runtime.with_fallback(name, launch, lambda: reference.memory_gate(keys, gate))


def _add(output: Tensor, score: Tensor, entry: Tensor, threshold: Tensor, rows: Tensor) -> None:
    if rows.shape[0] == 0 or output.numel() == 0:
        return
    check_own_overlap(output)

    def eager() -> None:
        eager_add_(output, score, entry, threshold, rows)

    if not output.is_contiguous() or not runtime.triton_runs(output, rows):
        eager()
        return

    def launch() -> None:
        from coachhook_kernels.memory import kernel

        flat = output.view(-1, output.shape[-1])
        narrow = rows if rows.stride(-1) == 1 else rows.contiguous()
        with torch.cuda.device_of(output):
            kernel.add(flat, score.contiguous(), entry.contiguous(), threshold, narrow)

    runtime.with_fallback(runtime.scope("memory_add_", output, rows.shape[1]), launch, eager)


def eager_add_(
    output: Tensor, score: Tensor, entry: Tensor, threshold: Tensor, rows: Tensor
) -> None:
    """`memory_add_` in plain torch."""
    if output.device.type != "cpu":
        output.copy_(reference.memory_add(output, score, entry, threshold, rows))
        return
    # A CPU has no queue to wait for: counting open tokens is cheap, and most often finds none.
    at = ((score >= threshold) & (entry >= 0)).nonzero(as_tuple=True)
    if at[0].numel():
        output[at] += rows[entry[at]].to(output.dtype)


def _fake_gate(keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    leading = keys.shape[:-1]
    return keys.new_empty(leading, dtype=torch.float32), keys.new_empty(leading, dtype=torch.long)


def _fake_add(*_: Any) -> None:
    return None


_memory_gate = Operation("memory_gate", _gate, _fake_gate)
_memory_add = Operation("memory_add_", _add, _fake_add, mutates="output")
