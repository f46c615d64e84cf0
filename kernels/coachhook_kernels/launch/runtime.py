"""Where a Triton kernel can run, and what happens where it cannot.

A fall-back to plain torch gives the same numbers more slowly, so it is logged once, not raised.
"""

import functools
import logging
import math
import os
import re
from collections.abc import Callable
from subprocess import CalledProcessError
from typing import TypeVar

import torch
from torch import Tensor

from coachhook_kernels.launch import tuning
from coachhook_kernels.launch.counters import begin_series, discard

log = logging.getLogger(__name__)
T = TypeVar("T")

HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_CAPABILITY = (8, 0)

# In the message of Triton's bare RuntimeError when a pass fails or the launcher cannot be built.
COMPILER_TROUBLE = r"PassManager|C compiler"

_broken: set[str] = set()


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU, to check results, not speed."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _log_once(message: str) -> None:
    log.warning(message)


@functools.cache
def _device_refusal(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_CAPABILITY:
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def triton_runs(*tensors: Tensor | None) -> bool:
    """Whether the Triton kernels take these tensors: the first is on a recent GPU, and each is
    float32, float16 or bfloat16."""
    given = [tensor for tensor in tensors if tensor is not None]
    if any(tensor.dtype not in HALF_AND_SINGLE for tensor in given):
        return False
    return _runs_on(given[0].device)


def _runs_on(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    refusal = _device_refusal(device)
    if refusal is not None:
        _log_once(f"coachhook_kernels uses plain torch: {refusal}")
    return refusal is None


def with_fallback(name: str, launch: Callable[[], T], eager: Callable[[], T]) -> T:
    """`launch()`; once that fails to compile, `eager()` in this and every later call with `name`.

    name: what is compiled, so that a failure disables nothing else. Where a configuration wants
    more shared memory than there is, `launch` is run again without it, so what it changes in place
    it must change in its last kernel. Errors other than those of compilation are raised: lack of
    memory and errors of the device come and go, or say that results are lost.
    """
    if name in _broken:
        return eager()
    series = tuning.Series(name)
    begin_series()
    while True:
        try:
            with series:
                result = launch()
        except BaseException as error:
            # Whatever it was, the counters that its launches share may not be at zero.
            discard()
            if not _failed_to_compile(error):
                raise
            if _refuse(series, error):
                continue
            _broken.add(name)
            _log_broken(name, error)
            break
        for use in series.refused:
            _log_refused(use)
        return result
    return eager()


def scope(operation: str, keys: Tensor, d_out: int, *forms: str) -> str:
    """A name for `with_fallback`: the operation on keys `(..., d_in)` of this dtype, width and
    device, with the number of rows rounded up to a power of two, in these forms (of the gate, of Δ,
    of what is laid out in an unusual way)."""
    *leading, d_in = keys.shape
    return _scope(operation, keys.device, keys.dtype, math.prod(leading), d_in, d_out, forms)


@functools.lru_cache(maxsize=4096)
def _scope(
    operation: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    d_in: int,
    d_out: int,
    forms: tuple[str, ...],
) -> str:
    layer = f"{dtype} {d_in}→{d_out}, {1 << (rows - 1).bit_length()} rows on {device}"
    return " ".join((operation, layer, *filter(None, forms)))


def failures() -> list[str]:
    """What does not run as it should: launches in plain torch, and configurations passed over."""
    return sorted([*_broken, *map(str, list(tuning.refused))])


def forget_failures() -> None:
    """Try everything again."""
    _broken.clear()
    tuning.refused.clear()


def _failed_to_compile(error: BaseException) -> bool:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # CalledProcessError: of the C compiler, which builds the launcher. Lack of memory and errors of
    # the device are kinds of RuntimeError, too.
    if isinstance(error, (CompilationError, OutOfResources, PTXASError, CalledProcessError)):
        return True
    return type(error) is RuntimeError and bool(re.search(COMPILER_TROUBLE, str(error)))


def _refuse(series: tuning.Series, error: BaseException) -> bool:
    from triton.runtime.errors import OutOfResources

    return isinstance(error, OutOfResources) and series.refuse(error.required)


def _log_broken(name: str, error: BaseException) -> None:
    import triton

    log.warning(
        "coachhook_kernels uses plain torch for %s: Triton %s could not compile it: %s",
        name,
        triton.__version__,
        error,
    )


def _log_refused(use: tuning.Use) -> None:
    log.warning(
        "coachhook_kernels passes over the configuration %s of %s, which does not fit on this GPU, "
        "for %s",
        dict(use.config),
        use.kernel,
        use.series,
    )


@functools.cache
def launches_overlap(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one before it still runs, and wait for it inside
    (programmatic dependent launch)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, which has none."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
