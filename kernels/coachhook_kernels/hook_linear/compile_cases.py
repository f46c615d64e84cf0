"""The shipped configurations of the kernels of `hook_linear`, to be compiled without a GPU."""

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl

from coachhook_kernels.compilation.case import NEWER, OLDER, CompileCase
from coachhook_kernels.hook_linear import tiles, tiles_gate, tiles_match
from coachhook_kernels.hook_linear.decode_cases import decode_cases
from coachhook_kernels.hook_linear.op import WIDEST_SKETCH
from coachhook_kernels.launch.tuning import Config


def compile_cases() -> list[CompileCase]:
    """Every default configuration in its fullest form, and the most used one in all its forms. A
    few of float16, whose code is that of bfloat16 but for the type in its instructions."""
    return [*decode_cases(), *_tiles_cases()]


def _tiles_cases() -> list[CompileCase]:
    cases = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        cases.append(_product_case("score", name, tiles.score_config(dtype), tiles.STORE))
        cases.append(_product_case("squares", name, tiles.squares_config(dtype), tiles.SQUARES))
        cases += _open_cases("correct", name, tiles.correct_config(dtype), tiles.ADD)
        cases.append(_match_case(name, dtype, 64))
        cases.append(_norm_case(name, summed=False))
        cases.append(_match_case(name, dtype, WIDEST_SKETCH))
    cases += [_sketch_case("bf16", size) for size in (64, WIDEST_SKETCH)]
    config = tiles.correct_config(torch.bfloat16)
    further = [
        *_open_cases("correct", "fp16", config, tiles.ADD),
        *_open_cases("lower", "bf16", config, tiles.STORE),
        *_open_cases("correct", "bf16", config, tiles.ADD, by_column=True),
        _norm_case("bf16", summed=True),
    ]
    return [*cases, *[case.further() for case in further]]


def _matrices(dtype: str, output: str, by_column: bool) -> tuple[dict[str, str], dict[str, Any]]:
    arguments = dict.fromkeys(("p_left", "p_right"), f"*{dtype}:16") | {"p_output": f"*{output}:16"}
    arguments |= dict.fromkeys(("n_columns", "length", "stride_lm", "stride_om"), "i32:16")
    arguments |= {"stride_rk" if by_column else "stride_rn": "i32:16", "n_rows": "i32"}
    return arguments, {"stride_rn" if by_column else "stride_rk": 1}


def _product_case(step: str, dtype: str, config: Config, epilogue: tl.constexpr) -> CompileCase:
    arguments, constants = _matrices(dtype, "fp32", by_column=False)
    arguments |= {"n_slices": "i32", "slice_length": "i32:16"}
    return _tiled(step, dtype, tiles.tiles_kernel, arguments, constants, config, epilogue)


def _open_cases(
    step: str, dtype: str, config: Config, epilogue: tl.constexpr, by_column: bool = False
) -> list[CompileCase]:
    arguments, constants = _matrices(dtype, dtype, by_column)
    arguments |= {"p_rows": "*i32:16", "p_counters": "*i32:16"}
    step += " by column" * by_column
    kernel = tiles.open_rows_kernel
    case = _tiled(step, dtype, kernel, arguments, constants, config, epilogue)
    return [
        replace(case, constants=case.constants | {"EARLY": early}, targets=targets)
        for early, targets in ((False, OLDER), (True, NEWER))
    ]


def _tiled(
    step: str,
    dtype: str,
    kernel: Any,
    arguments: dict[str, str],
    constants: dict[str, Any],
    config: Config,
    epilogue: tl.constexpr,
) -> CompileCase:
    blocks = {name: size for name, size in config.items() if not name.startswith("num_")}
    return CompileCase(
        f"hook_linear/{step} {dtype} {config['BM']}x{config['BN']}x{config['BK']}",
        kernel,
        arguments,
        constants | blocks | {"EPILOGUE": epilogue.value},
        config["num_warps"],
        config["num_stages"],
        tensor_cores=dtype != "fp32",
        wgmma=dtype != "fp32",
    )


_DECISIONS = {
    **dict.fromkeys(("p_mean", "p_std", "p_alpha", "p_score"), "*fp32:16"),
    "p_index": "*i64:16",
    **dict.fromkeys(("p_rows", "p_counters"), "*i32:16"),
}
_ADDED = {"p_parts": "*fp32:16", "n_rows": "i32", "n_score": "i32:16", "n_parts": "i32"}


def _sketch_case(dtype: str, size: int) -> CompileCase:
    return CompileCase(
        f"hook_linear/sketch {dtype} of {size}",
        tiles_match.sketch_kernel,
        {**_ADDED, "p_offset": f"*{dtype}:16", "p_units": "*fp32:16", "p_arrived": "*i32:16"},
        {"BM": tiles_gate.ADDED_ROWS, "S": size, "PARTS": tiles_gate.ADDED_PARTS},
    )


def _match_case(dtype: str, torch_dtype: torch.dtype, size: int) -> CompileCase:
    block = tiles_match.match_rows(torch_dtype)
    arguments = {**_DECISIONS, "p_fingerprints": f"*{dtype}:16", "p_enabled": "*i1:16"}
    arguments |= {"p_units": "*fp32:16", "p_best": "*fp32:16", "n_score": "i32:16"}
    arguments |= dict.fromkeys(("p_best_index", "p_arrived"), "*i32:16")
    arguments |= dict.fromkeys(("n_rows", "n_fingerprints", "n_slabs", "slab"), "i32")
    return CompileCase(
        f"hook_linear/match {dtype} {block} of {size}",
        tiles_match.match_kernel,
        arguments,
        {
            "BM": block,
            "S": size,
            "BE": tiles_match.fingerprints_at_once(torch_dtype, size),
            "BL": tiles_match.SLAB_TILE,
        },
        tensor_cores=dtype != "fp32",
        wgmma=block == 64,
    )


def _norm_case(dtype: str, summed: bool) -> CompileCase:
    kind = "calibrated dense" if summed else "calibrated factored"
    return CompileCase(
        f"hook_linear/norm {dtype} {kind}",
        tiles_gate.norm_kernel,
        {**_DECISIONS, **_ADDED, "p_lowered": f"*{dtype}:16"},
        {
            "SUMMED": summed,
            "BM": tiles_gate.SUMMED_ROWS if summed else tiles_gate.ADDED_ROWS,
            "S": tiles_gate.SCORE_TILE,
            "PARTS": tiles_gate.ADDED_PARTS,
        },
    )
