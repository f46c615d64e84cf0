"""The default configurations of decoding, to be compiled without a GPU."""

from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor

from coachhook_kernels.compilation.case import NEWER, OLDER, CompileCase
from coachhook_kernels.compilation.record import recorded
from coachhook_kernels.delta import Delta
from coachhook_kernels.gate import TokenGate
from coachhook_kernels.hook_linear import decode, tiles
from coachhook_kernels.hook_linear.op import WIDEST_SKETCH

KERNELS = ((decode, "decode_kernel"), (decode, "match_kernel"), (tiles, "open_rows_kernel"))
BRAIN, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
PROCESSORS = 132


def decode_cases() -> list[CompileCase]:
    """Every tile of tokens and of weights in its fullest form, and the forms that differ."""
    cases = [
        replace(case, targets=targets)
        for early, targets in ((False, OLDER), (True, NEWER))
        for d_in, d_out, rows, dtype in (
            (14336, 4096, 1, BRAIN),
            (14336, 4096, 16, BRAIN),
            (14336, 4096, 32, BRAIN),
            (14336, 4096, 64, BRAIN),
            (6400, 1600, 16, BRAIN),
            (14336, 4096, 1, SINGLE),
            (14336, 4096, 16, SINGLE),
        )
        for case in _cases(dtype, rows, d_in, d_out, early=early)
    ]
    cases += [
        replace(case, targets=targets)
        for early, targets in ((False, OLDER), (True, NEWER))
        for rows, dtype in ((16, BRAIN), (32, BRAIN), (64, BRAIN), (16, SINGLE))
        for case in _cases(dtype, rows, 14336, 4096, sketch=WIDEST_SKETCH, early=early)
    ]
    further = [
        *_cases(BRAIN, 1, 14336, 4096, keyed=False, rank=128),
        *_cases(BRAIN, 16, 14336, 4096, keyed=False, rank=128),
        *_cases(BRAIN, 1, 14336, 4096, sketch=WIDEST_SKETCH),
        *_cases(BRAIN, 1, 14336, 4096, base=False, fingerprints=10_000),
        *_cases(BRAIN, 64, 14336, 4096, base=False, fingerprints=10_000),
        *_cases(BRAIN, 16, 14336, 4096, base=False, rank=128),
        *_cases(HALF, 64, 6400, 1600, rank=128),
        *_cases(SINGLE, 16, 6400, 1600, keyed=False, rank=128),
        *_cases(BRAIN, 1, 6400, 1600, by_column=True),
        *_cases(BRAIN, 16, 6400, 1600, by_column=True),
        *_cases(BRAIN, 64, 14336, 4096, by_column=True),
    ]
    # Forms share their smaller kernels: each is compiled once.
    known: list[tuple[object, ...]] = []
    kept = []
    for case in [*cases, *[case.further() for case in further]]:
        form = (case.num_warps, case.num_stages, case.targets)
        code = (case.kernel, case.arguments, case.constants, *form)
        if code not in known:
            known.append(code)
            kept.append(case)
    return kept


def _cases(
    dtype: torch.dtype,
    rows: int,
    d_in: int,
    d_out: int,
    keyed: bool = True,
    rank: int | None = None,
    base: bool = True,
    by_column: bool = False,
    fingerprints: int = 1000,
    early: bool = False,
    sketch: int = 64,
) -> list[CompileCase]:
    """The kernels that one call launches."""

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def matrix(n: int) -> Tensor:
        return tensor(d_in, n).mT if by_column else tensor(n, d_in)

    gate = TokenGate(*[tensor(dtype=SINGLE) for _ in range(3)])
    if keyed:
        enabled = tensor(fingerprints, dtype=torch.bool)
        parts = tensor(sketch, d_in), tensor(sketch), tensor(fingerprints, sketch), enabled
        gate = TokenGate(*gate[:3], *parts)
    delta = Delta(matrix(d_out)) if rank is None else Delta(matrix(rank), tensor(d_out, rank))
    weight, bias = (matrix(d_out), tensor(d_out)) if base else (None, None)
    with (
        recorded(*KERNELS) as launches,
        mock.patch.object(decode, "multiprocessors", return_value=PROCESSORS),
        mock.patch.object(decode, "launches_overlap", return_value=early),
        mock.patch.object(tiles, "launches_overlap", return_value=early),
    ):
        decode.launch(tensor(rows, d_in), weight, bias, delta, gate, tensor(rows, d_out))
    kind = f"{str(dtype)[6:]} {d_in}→{d_out} {rows} {'keyed' if keyed else 'calibrated'}"
    kind += " dense" if rank is None else " factored"
    kind += " by column" * by_column + " correction" * (not base)
    kind += f" of {sketch}" * (sketch != 64)
    cases = []
    for launch in launches:
        products = launch.constants.get("BT", 16) > 1 and dtype != SINGLE
        name = f"hook_linear/decode {launch.kernel.fn.__name__} {kind}"
        name += " lower" * (launch.constants.get("EPILOGUE") is tiles.STORE)
        cases.append(
            CompileCase(
                name,
                launch.kernel,
                launch.arguments,
                launch.constants,
                launch.num_warps,
                launch.num_stages,
                tensor_cores=products,
            )
        )
    return cases
