"""Checks of the arguments of `memory_gate` and `memory_add_`, which raise KernelInputError."""

import torch
from torch import Tensor

from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.hook_linear.validation import check_matrix, is_real
from coachhook_kernels.memory.gate import MemoryGate


def check_gate(keys: Tensor, gate: MemoryGate) -> None:
    if keys.ndim == 0 or not is_real(keys):
        raise KernelInputError(
            f"keys are {keys.dtype} of shape {tuple(keys.shape)}; (..., d) of floats was expected"
        )
    projection, offset, fingerprints, owner, enabled, threshold = gate
    check_matrix("projection", projection, "s", keys.shape[-1])
    size = projection.shape[0]
    check_matrix("fingerprints", fingerprints, "f", size)
    if offset.shape != (size,) or not is_real(offset):
        raise KernelInputError(
            f"offset is {offset.dtype} of shape {tuple(offset.shape)}; ({size},) of floats was "
            "expected"
        )
    number = fingerprints.shape[0]
    for name, part, dtype in (("owner", owner, torch.int64), ("enabled", enabled, torch.bool)):
        if part.shape != (number,) or part.dtype != dtype:
            raise KernelInputError(
                f"{name} is {part.dtype} of shape {tuple(part.shape)}; {dtype} ({number},), one "
                "for each fingerprint, was expected"
            )
    _check_threshold(threshold)
    _check_devices(keys, **gate._asdict())


def check_add(
    output: Tensor, score: Tensor, entry: Tensor, threshold: Tensor, rows: Tensor
) -> None:
    if output.ndim == 0 or not is_real(output):
        raise KernelInputError(
            f"output is {output.dtype} of shape {tuple(output.shape)}; (..., d) of floats was "
            "expected"
        )
    leading = output.shape[:-1]
    for name, part, dtype in (("score", score, torch.float32), ("entry", entry, torch.int64)):
        if part.shape != leading or part.dtype != dtype:
            raise KernelInputError(
                f"{name} is {part.dtype} of shape {tuple(part.shape)}; {dtype} {tuple(leading)}, "
                "one for each token of the output, was expected"
            )
    _check_threshold(threshold)
    check_matrix("rows", rows, "e", output.shape[-1])
    _check_devices(output, score=score, entry=entry, threshold=threshold, rows=rows)


def _check_threshold(threshold: Tensor) -> None:
    if threshold.ndim != 0 or threshold.dtype != torch.float32:
        raise KernelInputError(
            f"threshold is {threshold.dtype} of shape {tuple(threshold.shape)}; a 0-d float32 was "
            "expected"
        )


def _check_devices(first: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.device != first.device:
            raise KernelInputError(
                f"{name} is on {tensor.device}, what it is for on {first.device}; move one of them"
            )
