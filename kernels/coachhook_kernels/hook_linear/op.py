"""`hook_linear` and `hook_correction_` as torch operations: validation, dispatch, autograd.

One op boundary per hooked layer. The gate is a constant in the backward.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels.delta import Delta, hook_correction
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear.validation import check_correction, check_linear, check_overlap
from coachhook_kernels.launch import runtime
from coachhook_kernels.launch.autocast import autocast_dtype
from coachhook_kernels.launch.boundary import Operation


def hook_linear(
    keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta, gate: TokenGate
) -> tuple[Tensor, Tensor, Tensor]:
    """`W_fc k + b`, plus `Δ k` for the tokens whose gate is open (paper Eq. 15-20, per token).

    keys `(..., d_in)`; weight `(d_out, d_in)` of any strides (`Conv1D`: its transposed view); bias
    `(d_out,)` or None: all of one float dtype. Triton kernels run where delta and the gate's
    projection have that dtype too and fingerprints at most 128 numbers, plain torch otherwise.
    Differentiable in keys, weight and bias;
    delta and gate are constants.

    Returns the output `(..., d_out)`, the score float32 `(...)` and the nearest fingerprint int64
    `(...)`, -1 where there is none. Under autocast keys (unless float64), weight, bias and delta
    are first cast to its dtype; the gate is not. Raises KernelInputError where shapes, dtypes or
    devices do not fit together.
    """
    check_linear(keys, weight, bias, delta, gate)
    dtype = autocast_dtype(keys)
    if dtype is not None:
        keys, weight, delta = keys.to(dtype), weight.to(dtype), delta.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    result: tuple[Tensor, Tensor, Tensor] = _hook_linear(keys, weight, bias, *delta, *gate)
    return result


def hook_correction_(
    output: Tensor, keys: Tensor, delta: Delta, gate: TokenGate
) -> tuple[Tensor, Tensor]:
    """Add `Δ k` in place to the output `(..., d_out)` that any engine computed for `keys`.

    Tokens whose gate stays closed keep their output bit for bit and cost only the score. Returns
    the score and the nearest fingerprint, as `hook_linear` does; under autocast keys (unless
    float64) and delta are first cast to its dtype as there, so that both open the same gates.
    Raises KernelInputError where the tensors do not fit together, share memory or would need a
    gradient.
    """
    check_correction(output, keys, delta, gate)
    dtype = autocast_dtype(keys)
    if dtype is not None:
        keys, delta = keys.to(dtype), delta.to(dtype)
    result: tuple[Tensor, Tensor] = _hook_correction(output, keys, *delta, *gate)
    return result


WIDEST_SKETCH = 128
"""Numbers of a fingerprint; kernels that hold wider ones in registers spill them."""


def _kernels_take(keys: Tensor, delta: Delta, gate: TokenGate, *others: Tensor | None) -> bool:
    same = (delta.down, delta.up, gate.projection, *others)
    if any(tensor is not None and tensor.dtype != keys.dtype for tensor in same):
        return False
    if gate.offset is not None and len(gate.offset) > WIDEST_SKETCH:
        return False
    if not runtime.triton_runs(keys, gate.offset, gate.fingerprints):
        return False
    return all(tensor is None or tensor.numel() > 0 for tensor in (keys, *same))


def _scope(
    operation: str, keys: Tensor, weight: Tensor | None, d_out: int, delta: Delta, gate: TokenGate
) -> str:
    """What a failed compilation disables: other rows, gates, forms of Δ and layouts may still
    compile."""
    (down, up), projection = delta, gate.projection
    return runtime.scope(
        operation,
        keys,
        d_out,
        "keyed" if gate.keyed else "calibrated",
        "dense" if up is None else "factored",
        "" if weight is None or weight.is_contiguous() else "strided weight",
        "" if down.is_contiguous() else "strided down",
        "" if up is None or up.is_contiguous() else "strided up",
        "" if projection is None or projection.is_contiguous() else "strided projection",
    )


def eager_correction_(
    output: Tensor, keys: Tensor, delta: Delta, gate: TokenGate
) -> tuple[Tensor, Tensor]:
    """`hook_correction_` in plain torch, for `(t, d_out)` and `(t, d_in)`."""
    score, index = gate.read(keys, delta)
    is_open = gate.is_open(score)
    if keys.device.type == "cpu":
        # A CPU has no queue to wait for: counting open rows is cheap, and most often finds none.
        rows = is_open.nonzero().squeeze(-1)
        if rows.numel():
            corrected = delta.expand(delta.project(keys[rows]))
            output.index_add_(0, rows, corrected.to(output.dtype))
    else:
        output.copy_(hook_correction(output, delta.expand(delta.project(keys)), is_open))
    return score, index


def _correct_(output: Tensor, keys: Tensor, delta: Delta, gate: TokenGate) -> tuple[Tensor, Tensor]:
    if not _kernels_take(keys, delta, gate, output):
        return eager_correction_(output, keys, delta, gate)
    from coachhook_kernels.hook_linear import decode, tiles

    def launch() -> tuple[Tensor, Tensor]:
        if decode.takes(keys, delta, gate):
            return decode.launch(keys, None, None, delta, gate.contiguous(), output)
        return tiles.launch(keys, delta, gate.contiguous(), output)

    return runtime.with_fallback(
        _scope("hook_correction_", keys, None, output.shape[1], delta, gate),
        launch,
        lambda: eager_correction_(output, keys, delta, gate),
    )


def _linear(
    keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta, gate: TokenGate
) -> tuple[Tensor, Tensor, Tensor]:
    def compose() -> tuple[Tensor, Tensor, Tensor]:
        output = linear(keys, weight, bias)
        return (output, *_correct_(output, keys, delta, gate))

    if not _kernels_take(keys, delta, gate, weight, bias):
        return compose()
    from coachhook_kernels.dual_path.kernel import dual_path_calibrated
    from coachhook_kernels.hook_linear import decode

    name = _scope("hook_linear", keys, weight, weight.shape[0], delta, gate)
    unit_bias = None if bias is None else bias.contiguous()

    def while_decoding() -> tuple[Tensor, Tensor, Tensor]:
        output = keys.new_empty(keys.shape[0], weight.shape[0])
        return (output, *decode.launch(keys, weight, unit_bias, delta, gate.contiguous(), output))

    def on_both_paths() -> tuple[Tensor, Tensor, Tensor]:
        scalars = (gate.mean, gate.std, gate.alpha)
        return dual_path_calibrated(keys, weight, bias, delta.down, *scalars)

    if decode.takes(keys, delta, gate):
        return runtime.with_fallback(name, while_decoding, compose)
    if not gate.keyed and delta.up is None:
        return runtime.with_fallback(name, on_both_paths, compose)
    return compose()


def _as_rows(keys: Tensor) -> Tensor:
    rows = keys.reshape(math.prod(keys.shape[:-1]), keys.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _run(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor | None,
    mean: Tensor,
    std: Tensor,
    alpha: Tensor,
    projection: Tensor | None,
    offset: Tensor | None,
    fingerprints: Tensor | None,
    enabled: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    gate = TokenGate(mean, std, alpha, projection, offset, fingerprints, enabled)
    leading = keys.shape[:-1]
    with torch.cuda.device_of(keys):
        output, score, index = _linear(_as_rows(keys), weight, bias, Delta(down, up), gate)
    return output.view(*leading, weight.shape[0]), score.view(leading), index.view(leading)


def _fake(keys: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    leading = keys.shape[:-1]
    return (
        keys.new_empty(*leading, weight.shape[0]),
        keys.new_empty(leading, dtype=torch.float32),
        keys.new_empty(leading, dtype=torch.int64),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, weight, _, down, up, mean, std, alpha, *_ = inputs
    is_open = TokenGate(mean, std, alpha).is_open(output[1])
    ctx.save_for_backward(
        keys if ctx.needs_input_grad[1] else None,
        weight if ctx.needs_input_grad[0] else None,
        down,
        up,
        is_open,
    )
    ctx.mark_non_differentiable(output[1], output[2])


def _backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    keys, weight, down, up, is_open = ctx.saved_tensors
    grad_keys = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        through = torch.where(is_open.unsqueeze(-1), grad, 0).to(down.dtype)
        through = through if up is None else through @ up.to(down.dtype)
        grad_keys = grad @ weight + (through @ down).to(grad.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    if ctx.needs_input_grad[1]:
        grad_weight = rows.mT @ keys.reshape(-1, keys.shape[-1])
    if ctx.needs_input_grad[2]:
        grad_bias = rows.sum(0)
    return grad_keys, grad_weight, grad_bias, *[None] * 9


_hook_linear = Operation("hook_linear", _run, _fake, _save, _backward)


@torch.library.custom_op("coachhook::hook_correction_", mutates_args={"output"})
def _hook_correction(
    output: Tensor,
    keys: Tensor,
    down: Tensor,
    up: Tensor | None,
    mean: Tensor,
    std: Tensor,
    alpha: Tensor,
    projection: Tensor | None,
    offset: Tensor | None,
    fingerprints: Tensor | None,
    enabled: Tensor | None,
) -> tuple[Tensor, Tensor]:
    gate = TokenGate(mean, std, alpha, projection, offset, fingerprints, enabled)
    leading = keys.shape[:-1]
    check_overlap(output, keys)
    rows = _as_rows(output)
    with torch.cuda.device_of(keys):
        score, index = _correct_(rows, _as_rows(keys), Delta(down, up), gate)
    if rows.data_ptr() != output.data_ptr():
        output.copy_(rows.view(output.shape))
    return score.view(leading), index.view(leading)


@_hook_correction.register_fake
def _(output: Tensor, keys: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    leading = keys.shape[:-1]
    return (
        keys.new_empty(leading, dtype=torch.float32),
        keys.new_empty(leading, dtype=torch.int64),
    )
