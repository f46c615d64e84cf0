"""The shipped configurations of the kernels of `hook_linear`, to be compiled without a GPU."""

from typing import Any

import torch
import triton.language as tl

from coachhook_kernels.compilation.case import CompileCase
from coachhook_kernels.hook_linear import rows, tiles, tiles_gate, tiles_match
from coachhook_kernels.hook_linear.rows_kernel import rows_kernel
from coachhook_kernels.launch.tuning import Config


def compile_cases() -> list[CompileCase]:
    """Every default configuration in its fullest form, and the most used one in all its forms. A
    few of float16, whose code is that of bfloat16 but for the type in its instructions."""
    return [*_rows_cases(), *_tiles_cases()]


def _rows_cases() -> list[CompileCase]:
    shapes = ((4096, 16), (4096, 32), (4096, 64), (576, 16), (576, 32), (576, 64), (8192, 16))
    cases = [_rows_case("bf16", d_out, n, "keyed", "dense") for d_out, n in (*shapes, (8192, 32))]
    cases.append(_rows_case("fp32", 4096, 16, "keyed", "dense"))
    further = [
        _rows_case("bf16", 4096, 16, "keyed", "factored"),
        _rows_case("bf16", 4096, 16, "calibrated", "factored"),
        _rows_case("bf16", 4096, 16, "keyed", "dense", base=False),
        _rows_case("fp16", 4096, 64, "keyed", "factored"),
        _rows_case("fp32", 4096, 16, "calibrated", "factored"),
        *[_rows_case("bf16", 4096, n, "keyed", "dense", by_column=True) for n in rows.TOKEN_TILES],
    ]
    return [*cases, *[case.further() for case in further]]


def _rows_case(
    dtype: str,
    d_out: int,
    tokens: int,
    gate: str,
    form: str,
    base: bool = True,
    by_column: bool = False,
) -> CompileCase:
    keyed, factored = gate == "keyed", form == "factored"
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    config = rows.default_config(d_out, tokens, torch_dtype, by_column)
    of_dtype = "keys weight bias down up projection offset fingerprints output"
    of_single = "mean std alpha score partials lowered best"
    arguments = {f"p_{name}": f"*{dtype}:16" for name in of_dtype.split()}
    arguments |= {f"p_{name}": "*fp32:16" for name in of_single.split()}
    arguments |= {"p_enabled": "*i1:16", "p_index": "*i64:16"}
    arguments |= {"p_best_index": "*i32:16", "p_counters": "*i32:16"}
    sizes = "d_in d_out n_score stride_kt stride_ot stride_wn stride_wk stride_dn stride_dk"
    arguments |= dict.fromkeys((*sizes.split(), "stride_un", "stride_pn"), "i32:16")
    counts = "n_tokens rank n_fingerprints n_slices n_project n_match n_down"
    arguments |= dict.fromkeys(counts.split(), "i32")
    ones = ("stride_wn", "stride_dn") if by_column else ("stride_wk", "stride_dk")
    constants: dict[str, Any] = dict.fromkeys((*ones, "stride_ur", "stride_pk"), 1)
    absent = [] if base else ["p_weight", "p_bias"]
    absent += [] if keyed else ["p_offset", "p_fingerprints", "p_enabled"]
    absent += [] if factored else ["p_up"]
    constants |= dict.fromkeys(absent)
    constants |= {
        "BASE": base,
        "KEYED": keyed,
        "FACTORED": factored,
        "BT": tokens,
        "BN": config["BN"],
        "BK": config["BK"],
        "SLICE": config["SLICE"],
        "BS": 64 if keyed else rows.CALIBRATED_TILE,
        "BE": rows.FINGERPRINT_TILE,
        "MATCHES": rows.match_table(rows.MOST_MATCHES // tokens) if keyed else 16,
        "BR": rows.RANK_TILE,
        "PK": rows.PROJECT_STEP,
    }
    layout = " by column" if by_column else ""
    op = "hook_linear" if base else "hook_correction_"
    return CompileCase(
        f"{op}/rows {dtype} {config['BN']}x{tokens}x{config['BK']} {gate} {form}{layout}",
        rows_kernel,
        {name: kind for name, kind in arguments.items() if name not in constants},
        constants,
        config["num_warps"],
        config["num_stages"],
        tensor_cores=dtype != "fp32",
    )


def _tiles_cases() -> list[CompileCase]:
    cases = []
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        cases.append(_product_case("score", name, tiles.score_config(dtype), tiles.STORE))
        cases.append(_product_case("squares", name, tiles.squares_config(dtype), tiles.SQUARES))
        cases.append(_open_case("correct", name, tiles.correct_config(dtype), tiles.ADD))
        cases.append(_match_case(name, dtype))
        cases.append(_norm_case(name, summed=False))
    cases.append(_sketch_case("bf16"))
    config = tiles.correct_config(torch.bfloat16)
    further = [
        _open_case("correct", "fp16", config, tiles.ADD),
        _open_case("lower", "bf16", config, tiles.STORE),
        _open_case("correct", "bf16", config, tiles.ADD, by_column=True),
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


_DECISIONS = {
    **dict.fromkeys(("p_mean", "p_std", "p_alpha", "p_score"), "*fp32:16"),
    "p_index": "*i64:16",
    **dict.fromkeys(("p_rows", "p_counters"), "*i32:16"),
}
_ADDED = {"p_parts": "*fp32:16", "n_rows": "i32", "n_score": "i32:16", "n_parts": "i32"}


def _sketch_case(dtype: str) -> CompileCase:
    return CompileCase(
        f"hook_linear/sketch {dtype}",
        tiles_match.sketch_kernel,
        {**_ADDED, "p_offset": f"*{dtype}:16", "p_units": "*fp32:16", "p_arrived": "*i32:16"},
        {"BM": tiles_gate.ADDED_ROWS, "S": 64, "PARTS": tiles_gate.ADDED_PARTS},
    )


def _match_case(dtype: str, torch_dtype: torch.dtype) -> CompileCase:
    block = tiles_match.match_rows(torch_dtype)
    arguments = {**_DECISIONS, "p_fingerprints": f"*{dtype}:16", "p_enabled": "*i1:16"}
    arguments |= {"p_units": "*fp32:16", "p_best": "*fp32:16", "n_score": "i32:16"}
    arguments |= dict.fromkeys(("p_best_index", "p_arrived"), "*i32:16")
    arguments |= dict.fromkeys(("n_rows", "n_fingerprints", "n_slabs", "slab"), "i32")
    return CompileCase(
        f"hook_linear/match {dtype} {block}",
        tiles_match.match_kernel,
        arguments,
        {
            "BM": block,
            "S": 64,
            "BE": tiles_match.FINGERPRINT_TILE,
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
