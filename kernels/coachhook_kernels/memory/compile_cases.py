"""The default configurations of the memory readout, to be compiled without a GPU."""

from unittest import mock

import torch
from torch import Tensor

from coachhook_kernels.compilation.case import CompileCase
from coachhook_kernels.compilation.record import Launch, recorded
from coachhook_kernels.hook_linear.tiles_match import FINGERPRINT_TILE
from coachhook_kernels.memory import kernel
from coachhook_kernels.memory.gate import MemoryGate

KERNELS = ((kernel, "sketch_kernel"), (kernel, "match_kernel"), (kernel, "add_kernel"))
PROCESSORS = 132
# Width of an 8B model, and of its fingerprints.
D, SIZE, ENTRIES = 4096, 64, 1000


def compile_cases() -> list[CompileCase]:
    """Every tile of rows in both widths of numbers; float16 as a variant of bfloat16."""
    cases = [
        case
        for dtype in (torch.bfloat16, torch.float32)
        for rows in (1, 64)
        for case in _cases(dtype, rows)
    ]
    return [*cases, *[case.further() for case in _cases(torch.float16, 64)]]


def _cases(dtype: torch.dtype, rows: int) -> list[CompileCase]:
    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    threshold = tensor(dtype=torch.float32)
    gate = MemoryGate(
        tensor(SIZE, D),
        tensor(SIZE),
        tensor(3 * ENTRIES, SIZE),
        tensor(3 * ENTRIES, dtype=torch.int64),
        tensor(3 * ENTRIES, dtype=torch.bool),
        threshold,
    )
    with (
        recorded(*KERNELS) as launches,
        mock.patch.object(kernel, "multiprocessors", return_value=PROCESSORS),
        mock.patch.object(kernel, "slab_length", return_value=FINGERPRINT_TILE),
    ):
        score, entry = kernel.gate(tensor(rows, D), gate)
        kernel.add(tensor(rows, D), score, entry, threshold, tensor(ENTRIES, D))
    return [_case(launch, dtype, rows) for launch in launches]


def _case(launch: Launch, dtype: torch.dtype, rows: int) -> CompileCase:
    products = launch.kernel is not kernel.add_kernel and dtype != torch.float32
    return CompileCase(
        f"memory/{launch.kernel.fn.__name__} {str(dtype)[6:]} {rows}",
        launch.kernel,
        launch.arguments,
        launch.constants,
        launch.num_warps,
        launch.num_stages,
        tensor_cores=products,
    )
