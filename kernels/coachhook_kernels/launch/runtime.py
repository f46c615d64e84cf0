"""Where a Triton kernel can run, and what happens where it cannot.

A fall-back to plain torch gives the same numbers more slowly, so it is logged once, not raised.
"""

import functools
import logging
import os
import re
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from coachhook_kernels.launch.counters import discard

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
    if given[0].device.type != "cuda":
        return False
    if any(tensor.dtype not in HALF_AND_SINGLE for tensor in given):
        return False
    refusal = _device_refusal(given[0].device)
    if refusal is not None:
        _log_once(f"coachhook_kernels uses plain torch: {refusal}")
    return refusal is None


def with_fallback(name: str, launch: Callable[[], T], eager: Callable[[], T]) -> T:
    """`launch()`; once that fails to compile, `eager()` in this and every later call with `name`.

    Errors other than those of compilation are raised.
    """
    if name in _broken:
        return eager()
    import triton
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    try:
        return launch()
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        if type(error) is RuntimeError and not re.search(COMPILER_TROUBLE, str(error)):
            raise
        _broken.add(name)
        discard()
        log.warning(
            "coachhook_kernels uses plain torch for %s: Triton %s could not compile it: %s",
            name,
            triton.__version__,
            error,
        )
        return eager()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 for the interpreter, which has none."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
