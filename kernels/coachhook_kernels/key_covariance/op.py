"""`key_covariance_` and `mirror_`: validation, registration with torch, choice of the kernel."""

import torch
from torch import Tensor

from coachhook_kernels.errors import KernelInputError
from coachhook_kernels.key_covariance import reference
from coachhook_kernels.key_covariance.configs import choose
from coachhook_kernels.launch import runtime
from coachhook_kernels.launch.overlap import share_memory

_MOMENTS = (torch.float32, torch.float64)
_ASYMMETRY = 1e-5
# Up to here the check for symmetry is cheap beside any product.
_CHECKED_D = 512


def key_covariance_(
    moment: Tensor, keys: Tensor, mask: Tensor | None = None, *, mirror: bool = True
) -> Tensor:
    """`moment += Kᵀ diag(mask) K`, in place, summed in the dtype of `moment`; returns `moment`.

    moment `(d, d)` float32 or float64, contiguous and symmetric; keys `(n, d)` of any float dtype;
    mask bool `(n,)`: rows where it is False are left out, whatever they hold. Only the upper
    triangle of `moment` counts, and the Triton kernels read and compute no other; no gradient
    flows. A sum that is infinite may come out as NaN on a GPU.

    With `mirror` the result is exactly symmetric. A series of calls into one moment passes False
    and ends with `mirror_`; until then the lower triangle is meaningless.

    Raises KernelInputError for tensors that do not fit together or share memory. An asymmetric
    `moment` is refused only with `mirror`, on the CPU and up to d = 512: elsewhere the check costs
    too much, and on a GPU the host would have to wait for it. A caller that is not sure of its
    moment calls `require_symmetric` once.
    """
    _validate_moment(moment)
    _validate_keys(moment, keys, mask)
    _key_covariance_(moment.detach(), keys.detach(), mask, mirror)
    return moment


def mirror_(moment: Tensor) -> Tensor:
    """Copy the upper triangle of `moment` `(d, d)` onto the lower one, in place; returns `moment`.

    Raises KernelInputError if `key_covariance_` would not take `moment`.
    """
    _validate_moment(moment)
    _mirror_(moment.detach())
    return moment


def require_symmetric(moment: Tensor) -> None:
    """Raise KernelInputError unless `moment` `(d, d)` is symmetric up to float32 rounding.

    On a GPU this waits for the device.
    """
    _validate_moment(moment)
    if moment.numel() == 0:
        return
    # No element of a second moment is larger than the largest on its diagonal.
    size = moment.diagonal().abs().max().nan_to_num()
    difference = (moment - moment.mT).abs().nan_to_num(nan=0.0).max()
    if difference > _ASYMMETRY * size:
        raise KernelInputError(
            f"moment is not symmetric: elements differ from their mirror images by up to "
            f"{float(difference):.3g}; if its upper triangle is right, call mirror_(moment) first"
        )


def _validate_moment(moment: Tensor) -> None:
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise KernelInputError(f"moment must be (d, d), not {tuple(moment.shape)}")
    if moment.dtype not in _MOMENTS:
        raise KernelInputError(f"moment must be float32 or float64, not {moment.dtype}")
    if not moment.is_contiguous():
        raise KernelInputError(
            f"moment must be contiguous, not of strides {moment.stride()}; it is changed in place"
        )


def _validate_keys(moment: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    d = moment.shape[0]
    if keys.ndim != 2 or keys.shape[1] != d:
        raise KernelInputError(
            f"keys must be (n, {d}) for a moment of {d} rows, not {tuple(keys.shape)}"
        )
    if not keys.is_floating_point():
        raise KernelInputError(f"keys must have a float dtype, not {keys.dtype}")
    if keys.device != moment.device:
        raise KernelInputError(f"keys are on {keys.device} and moment on {moment.device}")
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != keys.shape[:1]:
        raise KernelInputError(
            f"mask must be bool ({keys.shape[0]},), one for each key, "
            f"not {mask.dtype} {tuple(mask.shape)}"
        )
    if mask.device != moment.device:
        raise KernelInputError(f"mask is on {mask.device} and moment on {moment.device}")


@torch.library.custom_op("coachhook::key_covariance_", mutates_args={"moment"})
def _key_covariance_(moment: Tensor, keys: Tensor, mask: Tensor | None, mirror: bool) -> None:
    if share_memory(moment, keys):
        raise KernelInputError("moment and keys share memory; pass a copy of one of them")
    if mirror and moment.device.type == "cpu" and moment.shape[0] <= _CHECKED_D:
        require_symmetric(moment)
    if moment.dtype == torch.float32 and runtime.triton_runs(keys, moment):

        def launch() -> bool:
            config = choose(moment, keys, mask)
            if not config["triangle"]:
                return False
            from coachhook_kernels.key_covariance.kernel import add_triangle

            with torch.cuda.device_of(moment):
                add_triangle(moment, keys, mask, mirror, config)
            return True

        form = "every row" if mask is None else "masked"
        name = runtime.scope("key_covariance_", keys, keys.shape[1], form)
        if runtime.with_fallback(name, launch, lambda: False):
            return
    _library_(moment, keys, mask)
    if mirror:
        _mirror(moment)


@_key_covariance_.register_fake
def _(moment: Tensor, keys: Tensor, mask: Tensor | None, mirror: bool) -> None:
    return None


@torch.library.custom_op("coachhook::mirror_", mutates_args={"moment"})
def _mirror_(moment: Tensor) -> None:
    _mirror(moment)


@_mirror_.register_fake
def _(moment: Tensor) -> None:
    return None


def _library_(moment: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    """Both triangles, by torch's matrix product, with 16-bit keys summed in float32."""
    native = keys.is_cuda and torch.version.hip is None and keys.dtype.itemsize == 2
    if not native or moment.dtype != torch.float32:
        reference.key_covariance_(moment, keys, mask, mirror=False)
        return
    selected = keys if mask is None else keys.masked_fill(~mask.unsqueeze(-1), 0)
    torch.addmm(moment, selected.mT, selected, out_dtype=torch.float32, out=moment)


def _mirror(moment: Tensor) -> None:
    if moment.numel() == 0:
        return

    def eager() -> None:
        reference.mirror_(moment)

    if moment.dtype != torch.float32 or not runtime.triton_runs(moment):
        eager()
        return

    def launch() -> None:
        from coachhook_kernels.key_covariance.kernel import mirror_upper

        with torch.cuda.device_of(moment):
            mirror_upper(moment)

    runtime.with_fallback(f"mirror_ on {moment.device}", launch, eager)
