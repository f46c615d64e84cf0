"""`hook_linear_sequence`: argument checks, dispatch and gradient."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from coachhook_kernels.delta import Delta
from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.hook_linear.validation import check_delta, is_real
from coachhook_kernels.hook_linear_sequence import reference
from coachhook_kernels.launch.autocast import autocast_dtype
from coachhook_kernels.launch.boundary import Operation
from coachhook_kernels.launch.runtime import scope, triton_runs, with_fallback
from coachhook_kernels.scores import difference_norm, sequence_zscore

NAME = "hook_linear_sequence"


def hook_linear_sequence(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    mask: Tensor | None,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`W_fc k + b`, plus `Δ k` where the z-score of `‖Δ k‖` is at least alpha (paper Eq. 15-20).

    keys `(b, l, d_in)`; weight `(d_out, d_in)`, of any strides; bias `(d_out,)` or None: all of one
    floating dtype. delta: dense or factored; Triton kernels run where it has that dtype too, plain
    torch otherwise. mask bool `(b, l)`, true for real tokens, or None: all are. alpha: 0-d float32.
    Differentiable in keys, weight and bias; delta and the gate are constants.

    Returns the output `(b, l, d_out)`, and score `‖Δ k‖` and z-score over the real tokens of each
    sequence, both float32 `(b, l)`; z is NaN for padding and where a sequence has a single real
    token, and a NaN opens no gate. Under autocast keys (unless float64), weight, bias and delta are
    first cast to its dtype.

    Raises KernelInputError where shapes, dtypes or devices do not fit together.
    """
    _validate(keys, weight, bias, delta, mask, alpha)
    down, up = delta
    dtype = autocast_dtype(keys)
    if dtype is not None:
        keys, weight, down = keys.to(dtype), weight.to(dtype), down.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        up = None if up is None else up.to(dtype)
    found: tuple[Tensor, Tensor, Tensor] = _op(keys, weight, bias, down, up, mask, alpha)
    return found


def _validate(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    mask: Tensor | None,
    alpha: Tensor,
) -> None:
    down, up = delta
    if keys.ndim != 3 or not is_real(keys):
        raise KernelInputError(
            f"keys are {keys.dtype} of shape {tuple(keys.shape)}; (b, l, d_in) of floats expected"
        )
    d_in = keys.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != d_in:
        raise KernelInputError(
            f"weight has shape {tuple(weight.shape)}; (d_out, {d_in}) was expected. "
            "A Conv1D weight is passed as its transpose"
        )
    d_out = weight.shape[0]
    if bias is not None and bias.shape != (d_out,):
        raise KernelInputError(f"bias has shape {tuple(bias.shape)}, not ({d_out},)")
    check_delta(delta, d_in, d_out)
    if mask is not None and (mask.dtype != torch.bool or mask.shape != keys.shape[:-1]):
        raise KernelInputError(
            f"mask is {mask.dtype} of shape {tuple(mask.shape)}; bool "
            f"{tuple(keys.shape[:-1])} was expected"
        )
    if alpha.ndim != 0 or alpha.dtype != torch.float32:
        raise KernelInputError(
            f"alpha is {alpha.dtype} of shape {tuple(alpha.shape)}; a 0-d float32 was expected"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != keys.dtype:
            raise KernelInputError(
                f"{name} is {tensor.dtype}, the keys are {keys.dtype}; convert one of them"
            )
    others = {"weight": weight, "bias": bias, "down": down, "up": up, "mask": mask, "alpha": alpha}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != keys.device:
            raise KernelInputError(f"{name} is on {tensor.device}, the keys are on {keys.device}")


def _run(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    delta = Delta(down, up)

    def eager() -> tuple[Tensor, Tensor, Tensor]:
        forward = _row_sparse if keys.device.type == "cpu" else reference.hook_linear_sequence
        return forward(keys, weight, bias, delta, mask, alpha)

    def launch() -> tuple[Tensor, Tensor, Tensor]:
        from coachhook_kernels.dual_path.kernel import linear_sequence

        return linear_sequence(keys, weight, bias, delta, mask, alpha)

    one_dtype = down.dtype == keys.dtype and (up is None or up.dtype == keys.dtype)
    filled = keys.numel() > 0 and weight.numel() > 0 and down.shape[0] > 0
    with torch.autocast(keys.device.type, enabled=False), torch.cuda.device_of(keys):
        if one_dtype and filled and triton_runs(keys, weight, down):
            name = scope(
                NAME,
                keys,
                weight.shape[0],
                "dense" if up is None else "factored",
                "" if weight.is_contiguous() else "strided weight",
                "" if down.is_contiguous() else "strided down",
                "" if up is None or up.is_contiguous() else "strided up",
            )
            return with_fallback(name, launch, eager)
        return eager()


def _row_sparse(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    delta: Delta,
    mask: Tensor | None,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The reference, with `U (A k)` for open tokens only: on a CPU, finding them costs no wait."""
    output = linear(keys, weight, bias)
    projected = delta.project(keys)
    score = difference_norm(projected)
    z = sequence_zscore(score, torch.ones_like(score, dtype=torch.bool) if mask is None else mask)
    is_open = z >= alpha
    output[is_open] += delta.expand(projected[is_open]).to(output.dtype)
    return output, score, z


def _fake(
    keys: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor | None,
    mask: Tensor | None,
    alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    score = keys.new_empty(keys.shape[:-1], dtype=torch.float32)
    output = keys.new_empty((*keys.shape[:-1], weight.shape[0]))
    return output, score, torch.empty_like(score)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    keys, weight, _, down, up, _, alpha = inputs
    _, score, z = output
    ctx.mark_non_differentiable(score, z)
    ctx.save_for_backward(
        keys if ctx.needs_input_grad[1] else None,
        weight,
        down,
        up,
        z >= alpha,
    )


def _backward(ctx: Any, d_output: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    """`Wᵀ dY + Δᵀ dY` at open tokens, `Wᵀ dY` elsewhere; Δ and the gate are constants."""
    keys, weight, down, up, is_open = ctx.saved_tensors
    needs_keys, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    d_keys = d_weight = d_bias = None
    if needs_keys:
        d_open = torch.where(is_open.unsqueeze(-1), d_output, 0).to(down.dtype)
        d_projected = d_open if up is None else d_open @ up.to(down.dtype)
        d_keys = d_output @ weight + (d_projected @ down).to(d_output.dtype)
    if needs_weight:
        d_weight = d_output.flatten(0, 1).T @ keys.flatten(0, 1)
    if needs_bias:
        d_bias = d_output.flatten(0, 1).sum(0)
    return d_keys, d_weight, d_bias, None, None, None, None


_op = Operation(NAME, _run, _fake, _save, _backward)
