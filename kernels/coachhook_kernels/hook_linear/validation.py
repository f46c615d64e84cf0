"""Checks of the arguments of `hook_linear` and `hook_correction_`, which raise KernelInputError."""

import torch
from torch import Tensor

from coachhook_kernels.delta import Delta
from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.launch.overlap import share_memory


def check_linear(
    keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta, gate: TokenGate
) -> None:
    _check_keys(keys)
    if weight.ndim != 2 or weight.shape[1] != keys.shape[-1]:
        raise KernelInputError(
            f"weight has shape {tuple(weight.shape)}; (d_out, {keys.shape[-1]}) was expected. "
            "A Conv1D weight is passed as its transpose"
        )
    if bias is not None and bias.shape != (weight.shape[0],):
        raise KernelInputError(f"bias has shape {tuple(bias.shape)}, not ({weight.shape[0]},)")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != keys.dtype:
            raise KernelInputError(
                f"{name} is {tensor.dtype}, the keys are {keys.dtype}; convert one of them"
            )
    check_delta(delta, keys.shape[-1], weight.shape[0])
    _check_gate(gate, keys.shape[-1])
    _check_devices(keys, delta, gate, weight=weight, bias=bias)


def check_correction(output: Tensor, keys: Tensor, delta: Delta, gate: TokenGate) -> None:
    _check_keys(keys)
    if output.ndim == 0 or not is_real(output):
        raise KernelInputError(
            f"output is {output.dtype} of shape {tuple(output.shape)}; (..., d_out) of floats "
            "was expected"
        )
    if output.shape[:-1] != keys.shape[:-1]:
        raise KernelInputError(
            f"output {tuple(output.shape)} and keys {tuple(keys.shape)} differ before the last "
            "dimension"
        )
    check_delta(delta, keys.shape[-1], output.shape[-1])
    _check_gate(gate, keys.shape[-1])
    _check_devices(keys, delta, gate, output=output)
    if torch.is_grad_enabled() and (output.requires_grad or keys.requires_grad):
        raise KernelInputError(
            "hook_correction_ has no gradient; call it under torch.no_grad(), or use hook_linear"
        )


def check_overlap(output: Tensor, keys: Tensor) -> None:
    """Refuse an output that holds an element twice or shares memory with the keys, where parallel
    programs would read what others have already written."""
    check_own_overlap(output)
    if share_memory(output, keys):
        raise KernelInputError("output and keys share memory; pass a copy of one of them")


def check_own_overlap(output: Tensor) -> None:
    """Refuse an output that holds an element twice."""
    if torch._debug_has_internal_overlap(output) == 1:
        raise KernelInputError(
            f"output of shape {tuple(output.shape)} and strides {output.stride()} holds elements "
            "more than once; pass a copy of it"
        )


def is_real(tensor: Tensor) -> bool:
    """Whether torch computes with this dtype; 8-bit floats are for storage only."""
    return tensor.is_floating_point() and tensor.element_size() > 1


def _check_keys(keys: Tensor) -> None:
    if keys.ndim == 0 or not is_real(keys):
        raise KernelInputError(
            f"keys are {keys.dtype} of shape {tuple(keys.shape)}; (..., d_in) of floats expected"
        )


def check_matrix(name: str, matrix: Tensor, rows: str, columns: int) -> None:
    if matrix.ndim != 2 or matrix.shape[1] != columns or not is_real(matrix):
        raise KernelInputError(
            f"{name} is {matrix.dtype} of shape {tuple(matrix.shape)}; ({rows}, {columns}) of "
            "floats was expected"
        )


def check_delta(delta: Delta, d_in: int, d_out: int) -> None:
    down, up = delta
    check_matrix("delta.down", down, "rank", d_in)
    if up is not None:
        check_matrix("delta.up", up, "d_out", down.shape[0])
    made = down.shape[0] if up is None else up.shape[0]
    if made != d_out:
        raise KernelInputError(f"delta makes {made} outputs, the layer has {d_out}")


def _check_gate(gate: TokenGate, d_in: int) -> None:
    for name, scalar in (("mean", gate.mean), ("std", gate.std), ("alpha", gate.alpha)):
        if scalar.ndim != 0 or scalar.dtype != torch.float32:
            raise KernelInputError(
                f"the gate's {name} is {scalar.dtype} of shape {tuple(scalar.shape)}; mean, std "
                "and alpha are 0-d float32"
            )
    offset, fingerprints, enabled = gate.offset, gate.fingerprints, gate.enabled
    missing = [part is None for part in gate[3:]]
    if all(missing):
        return
    if gate.projection is None or offset is None or fingerprints is None or enabled is None:
        raise KernelInputError(
            "a keyed gate needs projection, offset, fingerprints and enabled; a calibrated one none"
        )
    check_matrix("projection", gate.projection, "s", d_in)
    size = gate.projection.shape[0]
    check_matrix("fingerprints", fingerprints, "e", size)
    if offset.shape != (size,) or not is_real(offset):
        raise KernelInputError(
            f"offset is {offset.dtype} of shape {tuple(offset.shape)}; ({size},) of floats expected"
        )
    if enabled.shape != (fingerprints.shape[0],) or enabled.dtype != torch.bool:
        raise KernelInputError(
            f"enabled is {enabled.dtype} of shape {tuple(enabled.shape)}; bool "
            f"({fingerprints.shape[0]},) was expected"
        )


def _check_devices(keys: Tensor, delta: Delta, gate: TokenGate, **others: Tensor | None) -> None:
    device = keys.device
    names = (*others, *Delta._fields, *TokenGate._fields)
    for name, tensor in zip(names, (*others.values(), *delta, *gate), strict=True):
        if tensor is not None and tensor.device != device:
            raise KernelInputError(f"{name} is on {tensor.device}, the keys are on {device}")
