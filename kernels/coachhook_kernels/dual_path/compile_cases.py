"""Every shipped configuration of the dual path, to be compiled without a GPU."""

from typing import Any

import torch

from coachhook_kernels.compilation.case import CompileCase
from coachhook_kernels.dual_path import configs
from coachhook_kernels.dual_path.finish import finish_sequences_kernel, finish_tokens_kernel
from coachhook_kernels.dual_path.meeting import meeting_kernel
from coachhook_kernels.dual_path.products import (
    dense_kernel,
    factored_kernel,
    row_squares_kernel,
)
from coachhook_kernels.launch.tuning import Config

ALIGNED = "i32:16"
NUMBERS = "*fp32:16"


def _product(dtype: str, config: Config, layout: str, factored: bool, bias: bool) -> CompileCase:
    pointer = f"*{dtype}:16"
    arguments = dict.fromkeys(["p_keys", "p_weight", "p_output"], pointer)
    arguments |= {"p_squares": NUMBERS, "n_tokens": "i32"}
    arguments |= dict.fromkeys(["d_in", "d_out", "stride_kt"], ALIGNED)
    constants: dict[str, Any] = {
        key: size for key, size in config.items() if not key.startswith("num_")
    }
    constants |= {"GROUP": configs.GROUP, "FEW_ROWS": config["BT"] == configs.FEW}
    inner, outer = ("k", "n") if layout == "linear" else ("n", "k")
    constants[f"stride_w{inner}"] = 1
    arguments[f"stride_w{outer}"] = ALIGNED
    if factored:
        arguments |= {"p_down": pointer, "p_projected": NUMBERS}
        arguments |= {"rank": ALIGNED, "stride_an": ALIGNED}
        constants["stride_ak"] = 1
    else:
        arguments |= {"p_delta": pointer, "p_delta_keys": pointer, f"stride_d{outer}": ALIGNED}
        constants[f"stride_d{inner}"] = 1
    if bias:
        arguments["p_bias"] = pointer
    else:
        constants["p_bias"] = None
    half = dtype != "fp32"
    shape = "x".join(str(config[side]) for side in ("BT", "BN", "BK"))
    kind = "factored" if factored else "dense"
    return CompileCase(
        name=f"dual_path/{kind} {dtype} {layout} {shape}{' bias' if bias else ''}",
        kernel=factored_kernel if factored else dense_kernel,
        arguments=arguments,
        constants=constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tensor_cores=half,
        # A warp group multiplies 64 rows at a time.
        wgmma=half and config["BT"] >= 64,
    )


def _meeting(dtype: str, config: Config, layout: str, sequences: bool) -> CompileCase:
    """With a mask where the gate is that of sequences, and with a bias where it is per token."""
    pointer = f"*{dtype}:16"
    arguments = dict.fromkeys(["p_keys", "p_weight", "p_delta", "p_output"], pointer)
    arguments |= dict.fromkeys(["p_alpha", "p_squares", "p_score"], NUMBERS)
    arguments |= {"p_counters": "*i32:16", "n_tokens": "i32", "length": "i32"}
    arguments |= dict.fromkeys(["d_in", "d_out", "stride_kt"], ALIGNED)
    constants: dict[str, Any] = {side: config[side] for side in ("BT", "BN", "BK")}
    constants["TILES"] = configs.FINISH_BLOCK // config["BT"]
    inner, outer = ("k", "n") if layout == "linear" else ("n", "k")
    for matrix in ("w", "d"):
        constants[f"stride_{matrix}{inner}"] = 1
        arguments[f"stride_{matrix}{outer}"] = ALIGNED
    if sequences:
        arguments |= {"p_mask": "*i1:16", "p_z": NUMBERS}
        constants |= dict.fromkeys(["p_mean", "p_std", "p_bias", "p_index"])
    else:
        arguments |= dict.fromkeys(["p_mean", "p_std"], NUMBERS)
        arguments |= {"p_bias": pointer, "p_index": "*i64:16"}
        constants |= dict.fromkeys(["p_mask", "p_z"])
    shape = "x".join(str(config[side]) for side in ("BT", "BN", "BK"))
    gate = "sequences" if sequences else "tokens"
    return CompileCase(
        name=f"dual_path/one launch {dtype} {layout} {shape} {gate}",
        kernel=meeting_kernel,
        arguments=arguments,
        constants=constants,
        num_warps=config["num_warps"],
        num_stages=config["num_stages"],
        tensor_cores=True,
        # The columns take the side of which a warp group multiplies 64 at a time.
        wgmma=config["BN"] >= 64,
    )


def _swap_arguments(dtype: str) -> dict[str, str]:
    arguments = dict.fromkeys(["p_squares", "p_alpha", "p_score"], NUMBERS)
    arguments |= {"p_output": f"*{dtype}:16", "p_delta_keys": f"*{dtype}:16"}
    return arguments | {"n_tokens": "i32", "d_out": ALIGNED, "n_tiles": "i32", "slab": ALIGNED}


def _swap_constants(dtype: str, BT: int) -> dict[str, Any]:
    return {
        "BT": BT,
        "BLOCK_TILES": configs.FINISH_BLOCK // BT,
        "BN": configs.finish_columns(torch.float32 if dtype == "fp32" else torch.bfloat16),
    }


def _finish_sequences(dtype: str, BL: int, masked: bool, scratch: str | None) -> CompileCase:
    """scratch: the type of `A k` where Δ is factored."""
    arguments = _swap_arguments(dtype) | {"p_z": NUMBERS, "length": "i32", "rank": ALIGNED}
    constants = _swap_constants(dtype, configs.swap_block(BL))
    constants |= {"BL": BL, "TILES": configs.FINISH_BLOCK // BL, "BR": configs.FINISH_RANKS}
    if masked:
        arguments["p_mask"] = "*i1:16"
    else:
        constants["p_mask"] = None
    if scratch is None:
        arguments |= dict.fromkeys(["stride_un", "stride_ur"], ALIGNED)
        constants["p_up"] = None
    else:
        arguments |= {"p_up": f"*{dtype}:16", "p_delta_keys": f"*{scratch}:16"}
        arguments["stride_un"] = ALIGNED
        constants["stride_ur"] = 1
    form = "dense" if scratch is None else f"factored, {scratch} A k"
    return CompileCase(
        name=f"dual_path/finish_sequences {dtype} {BL} {'masked ' if masked else ''}{form}",
        kernel=finish_sequences_kernel,
        arguments=arguments,
        constants=constants,
        num_warps=configs.FINISH_WARPS,
        tensor_cores=scratch is not None and dtype != "fp32",
    )


def _finish_tokens(dtype: str, BT: int) -> CompileCase:
    return CompileCase(
        name=f"dual_path/finish_tokens {dtype} {BT}",
        kernel=finish_tokens_kernel,
        arguments=_swap_arguments(dtype)
        | dict.fromkeys(["p_mean", "p_std"], NUMBERS)
        | {"p_index": "*i64:16"},
        constants=_swap_constants(dtype, BT),
        num_warps=configs.FINISH_WARPS,
    )


def _row_squares(dtype: str) -> CompileCase:
    return CompileCase(
        name=f"dual_path/row_squares {dtype}",
        kernel=row_squares_kernel,
        arguments={"p_rows": f"*{dtype}:16", "p_squares": NUMBERS, "n_columns": ALIGNED},
        constants={"BN": configs.ROW_BLOCK},
    )


def compile_cases() -> list[CompileCase]:
    """Products in every configuration, of bfloat16 with both layouts and forms of Δ, of float32 in
    the fullest form; then the finishes. Float16, whose code is that of bfloat16 but for the type in
    its instructions, has one case."""
    cases = []
    for config in configs.FEW_ROWS["half"] + configs.MANY_ROWS["half"]:
        cases += [_product("bf16", config, "linear", False, False)]
        cases += [_product("bf16", config, "linear", True, False).further()]
        if config["BT"] * config["BN"] <= configs.COLUMN_MAJOR_TILE:
            cases += [_product("bf16", config, "conv1d", False, True).further()]
    for config in configs.MEETING:
        cases += [_meeting("bf16", config, "linear", True)]
        cases += [_meeting("bf16", config, "linear", False).further()]
        cases += [_meeting("bf16", config, "conv1d", True).further()]
    cases += [_product("fp16", configs.MANY_ROWS["half"][0], "linear", False, False).further()]
    for config in configs.FEW_ROWS["single"] + configs.MANY_ROWS["single"]:
        cases += [_product("fp32", config, "conv1d", False, True)]
    cases += [_finish_sequences("bf16", BL, True, "fp32") for BL in configs.FINISH_LENGTHS]
    cases += [_finish_sequences("bf16", configs.FINISH_LENGTHS[-1], True, None)]
    cases += [_finish_sequences("bf16", configs.FINISH_LENGTHS[-1], False, "bf16")]
    cases += [_finish_sequences("fp32", configs.FINISH_LENGTHS[-1], True, "fp32").further()]
    cases += [_finish_tokens("bf16", BT) for BT in (16, 32)]
    return [*cases, _finish_tokens("fp32", 32), _row_squares("bf16")]
