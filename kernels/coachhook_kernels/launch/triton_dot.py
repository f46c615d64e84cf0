"""`tl.dot` as every kernel here means it: products of the operands' own type, summed in float32."""

import triton
import triton.language as tl

from coachhook_kernels.launch.runtime import interpreting

# The interpreter keeps bfloat16 as bare bits and would multiply those; a product of two bfloat16
# is exact in float32, so widening first means the same.
WIDEN = tl.constexpr(interpreting())


@triton.jit
def dot(b_left, b_right, b_acc):
    """`b_acc + b_left @ b_right`, b_acc float32. float32 operands are not rounded to tf32."""
    if WIDEN:
        return tl.dot(b_left.to(tl.float32), b_right.to(tl.float32), b_acc, input_precision="ieee")
    else:
        return tl.dot(b_left, b_right, b_acc, input_precision="ieee")


@triton.jit
def dot_wide(b_left, b_wide, b_acc):
    """`b_acc + b_left @ b_wide` with b_wide float32 and nothing of it rounded away.

    A float32 is the sum of three 16-bit numbers, so for a 16-bit b_left three products on the
    matrix units do it; a float32 b_left takes the float32 units.
    """
    if b_left.dtype == tl.float32:
        b_acc = dot(b_left, b_wide, b_acc)
    else:
        b_high = b_wide.to(b_left.dtype)
        b_rest = b_wide - b_high.to(tl.float32)
        b_middle = b_rest.to(b_left.dtype)
        b_low = (b_rest - b_middle.to(tl.float32)).to(b_left.dtype)
        b_acc = dot(b_left, b_low, b_acc)
        b_acc = dot(b_left, b_middle, b_acc)
        b_acc = dot(b_left, b_high, b_acc)
    return b_acc
