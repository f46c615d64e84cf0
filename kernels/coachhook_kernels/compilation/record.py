"""Compile cases from launches: what a launcher passes to its kernel is what gets compiled.

The launcher runs on meta tensors, with the kernel replaced by something that only looks.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton.language as tl
from torch import Tensor

TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16",
    torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch as `CompileCase` describes it."""

    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


def _described(value: Any, specialized: bool) -> Any:
    """A type, or the value itself where Triton compiles it in. Tensors are taken for aligned."""
    if isinstance(value, tuple):
        return type(value)(*[_described(member, True) for member in value])
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}:16"
    if value is None or (specialized and value == 1):
        return value
    return "i32:16" if specialized and value % 16 == 0 else "i32"


class _Recorder:
    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self._launch

    def _launch(self, num_warps: int = 4, num_stages: int = 3, **given: Any) -> None:
        arguments: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        # Defined for the interpreter, a kernel keeps what `triton.jit` was given apart.
        options = vars(self.kernel).get("kwargs", vars(self.kernel))
        counts = options["do_not_specialize"] or ()
        for name, parameter in inspect.signature(self.kernel.fn).parameters.items():
            value = given[name]
            is_constant = parameter.annotation is tl.constexpr
            if not is_constant:
                value = _described(value, name not in counts)
            compiled_in = is_constant or not isinstance(value, str | tuple)
            (constants if compiled_in else arguments)[name] = value
        launch = Launch(self.kernel, arguments, constants, num_warps, num_stages)
        self.launches.append(launch)


@contextmanager
def recorded(*kernels: tuple[ModuleType, str]) -> Iterator[list[Launch]]:
    """Inside the block the kernels, each a module and a name in it, do not run: their launches are
    added to the list."""
    launches: list[Launch] = []
    with ExitStack() as stack:
        for module, name in kernels:
            recorder = _Recorder(getattr(module, name), launches)
            stack.enter_context(mock.patch.object(module, name, recorder))
        yield launches
