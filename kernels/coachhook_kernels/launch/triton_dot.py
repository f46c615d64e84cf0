"""The `tl.dot` of all kernels: products in the operands' own type, summed in float32."""

import triton
import triton.language as tl

from coachhook_kernels.launch.runtime import interpreting

# The interpreter stores bfloat16 as raw bits and would multiply these. A product of two bfloat16
# numbers is exact in float32, so widening first gives the same result.
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
    """`b_acc + b_left @ b_wide` with b_wide float32, which is not rounded.

    A float32 number is the sum of three 16-bit numbers, so a 16-bit b_left takes three products on
    the matrix units; a float32 b_left takes one on the float32 units.
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
