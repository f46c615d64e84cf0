"""Kernels with known faults, for the compile report to find."""

import os

import triton
import triton.language as tl

from coachhook_kernels.compilation.case import CompileCase


@triton.jit
def product_kernel(
    p_left, p_right, p_output, n_rows, n_columns, length,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`left @ right`, all of it in whole tiles."""
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_n = tl.program_id(1) * BN + tl.arange(0, BN)
    b_acc = tl.zeros((BM, BN), tl.float32)
    for i_k in range(0, length, BK):
        o_k = i_k + tl.arange(0, BK)
        b_left = tl.load(p_left + o_m[:, None] * length + o_k[None, :])
        b_right = tl.load(p_right + o_k[:, None] * n_columns + o_n[None, :])
        b_acc = tl.dot(b_left, b_right, b_acc)
    tl.store(p_output + o_m[:, None] * n_columns + o_n[None, :], b_acc)


@triton.jit
def double_kernel(p_values, N: tl.constexpr):
    o = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(p_values + o, tl.load(p_values + o) * 2)


@triton.jit
def of_even(b_values):
    return b_values % "two"


@triton.jit
def type_error_kernel(p_values, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_values + o, of_even(tl.load(p_values + o)))


class CrashesCompiler:
    """Stands for a kernel that takes the compiler's process down."""

    @property
    def arg_names(self):
        os.abort()


def product(name, BM, BN, BK, num_warps=4, num_stages=3, columns="i32:16", **demands):
    return CompileCase(
        name=name,
        kernel=product_kernel,
        arguments={
            "p_left": "*bf16:16",
            "p_right": "*bf16:16",
            "p_output": "*fp32:16",
            "n_rows": "i32:16",
            "n_columns": columns,
            "length": "i32:16",
        },
        constants={"BM": BM, "BN": BN, "BK": BK},
        num_warps=num_warps,
        num_stages=num_stages,
        tensor_cores=True,
        **demands,
    )


def double(name, parameter="p_values", **demands):
    return CompileCase(name, double_kernel, {parameter: "*fp32:16"}, {"N": 1024}, **demands)


def compile_cases():
    return [
        product("sound", 64, 64, 64, wgmma=True),
        product("spills", 128, 256, 64, wgmma=True),
        product("more than all vector registers", 256, 512, 32, num_warps=2),
        product("unaligned columns", 64, 64, 64, columns="i32"),
        product("too few rows for a warp group", 16, 64, 64, wgmma=True),
        product("shared memory", 64, 64, 256, num_stages=5, amd_num_stages=3),
        double("no tensor cores", tensor_cores=True),
        double("unknown parameter", parameter="p_weights"),
        CompileCase("type error", type_error_kernel, {"p_values": "*fp32:16"}, {"N": 1024}),
        CompileCase("crash", CrashesCompiler(), {}),
    ]
