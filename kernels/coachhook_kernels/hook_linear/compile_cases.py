"""The shipped configurations of the kernels of `hook_linear`, to be compiled without a GPU."""

from typing import Any

import torch
import triton.language as tl

from coachhook_kernels.compilation.case import CompileCase
from coachhook_kernels.hook_linear import tiles
from coachhook_kernels.hook_linear.decode_cases import decode_cases
from coachhook_kernels.hook_linear.tiles_gate import gate_kernel
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
        cases.append(_open_case("correct", name, tiles.correct_config(dtype), tiles.ADD))
        cases.append(_gate_case(name, True, False, 16))
    config = tiles.correct_config(torch.bfloat16)
    further = [
        _open_case("correct", "fp16", config, tiles.ADD),
        _open_case("lower", "bf16", config, tiles.STORE),
        _open_case("correct", "bf16", config, tiles.ADD, by_column=True),
        _gate_case("bf16", True, False, 32),
        _gate_case("bf16", False, False, 32),
        _gate_case("bf16", False, True, 32),
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


def _open_case(
    step: str, dtype: str, config: Config, epilogue: tl.constexpr, by_column: bool = False
) -> CompileCase:
    arguments, constants = _matrices(dtype, dtype, by_column)
    arguments |= {"p_rows": "*i32:16", "p_counters": "*i32:16"}
    step += " by column" * by_column
    return _tiled(step, dtype, tiles.open_rows_kernel, arguments, constants, config, epilogue)


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


def _gate_case(dtype: str, keyed: bool, summed: bool, block: int) -> CompileCase:
    arguments = {f"p_{name}": f"*{dtype}:16" for name in ("offset", "fingerprints", "lowered")}
    single = ("parts", "mean", "std", "alpha", "score")
    arguments |= {f"p_{name}": "*fp32:16" for name in single}
    arguments |= {"p_enabled": "*i1:16", "p_index": "*i64:16"}
    arguments |= {"p_rows": "*i32:16", "p_counters": "*i32:16", "n_score": "i32:16"}
    arguments |= dict.fromkeys(("n_rows", "n_parts", "n_fingerprints"), "i32")
    absent = () if keyed else ("p_offset", "p_fingerprints", "p_enabled")
    constants: dict[str, Any] = {"KEYED": keyed, "SUMMED": summed, "BM": block}
    constants |= {"S": tiles.SCORE_TILE, "BE": tiles.SCORE_TILE} | dict.fromkeys(absent)
    kind = "keyed" if keyed else "calibrated dense" if summed else "calibrated factored"
    return CompileCase(
        f"hook_linear/gate {dtype} {block} {kind}",
        gate_kernel,
        {name: of for name, of in arguments.items() if name not in constants},
        constants,
        num_warps=4,
        num_stages=3,
        tensor_cores=keyed and dtype != "fp32",
    )
