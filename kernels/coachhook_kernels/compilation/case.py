"""Everything needed to compile a kernel without the GPU that it is for."""

from dataclasses import dataclass, field, replace
from typing import Any

OLDER, NEWER = ("sm_80", "gfx942"), ("sm_90", "sm_100")
"""GPUs where a launch waits for the end of the one before it, and those where it may begin earlier:
a kernel that does is other code there."""


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of one kernel.

    name: `op/kernel dtype configuration`. kernel: a `@triton.jit` function. arguments: parameter to
    type, such as `*bf16:16` or `i32`; `:16` says divisible by 16; a parameter that is a tuple, to a
    tuple of types and of the values that are compiled in. constants: constexpr parameters,
    integers specialised to 1 and absent pointers. tensor_cores: NVIDIA code must hold matrix
    instructions; wgmma: on sm_90 those of a warp group (HGMMA). targets: the GPUs to compile for.
    amd_num_stages: pipelining depth on gfx942, whose local memory is about a quarter of an H200's.
    """

    name: str
    kernel: Any
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    wgmma: bool = False
    amd_num_stages: int = 2
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")

    def further(self) -> "CompileCase":
        """A variant of a configuration that another case covers. To save time it is compiled for
        sm_80 alone, where registers are scarcest, and with `wgmma` for sm_90 as well."""
        telling = ("sm_80", "sm_90") if self.wgmma else ("sm_80",)
        return replace(self, targets=tuple(t for t in self.targets if t in telling))
