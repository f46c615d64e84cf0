"""Compile one kernel for a GPU that need not be here, and read the resources it would take there.

Triton ships the assemblers and disassemblers of its targets, so the code inspected is the code that
would run. Triton is imported inside the functions, so that the table of targets works without it.
"""

import io
import re
import subprocess
import tempfile
import warnings
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coachhook_kernels.compilation import sass
from coachhook_kernels.compilation.case import CompileCase

SASS_COPIES = ("LDGSTS", "UTMALDG", "UBLKCP")
AMD_OPCODE = re.compile(r"^\s+([a-z]+_\w+)(.*)$", re.M)
TENSOR_MEMORY_COLUMNS = 512


@dataclass(frozen=True)
class Target:
    """A GPU as Triton names it; shared_limit: bytes of shared memory that one block may use."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
}


@dataclass(frozen=True)
class Resources:
    """The resources that a compiled kernel takes.

    registers: of a thread (on AMD, vector registers). stack, local: bytes of a thread. spills: on
    NVIDIA the bytes stored and loaded (`store`, `load`), on AMD the registers (`vgpr`, `sgpr`).
    shared: bytes of a block. tensor_memory: columns, on sm_100. tensor_cores: matrix instructions
    by opcode. async_copies: instructions that copy to shared memory past the registers.
    loads: those in loops of products, by opcode (`sass.loads`); on AMD none are counted.
    serialized: the assembler gave up on keeping warp-group products in flight.
    """

    registers: int
    scalar_registers: int | None
    stack: int
    local: int | None
    spills: dict[str, int]
    shared: int
    tensor_memory: int | None
    tensor_cores: dict[str, int]
    async_copies: int
    loads: dict[str, int]
    serialized: bool


def compile_resources(case: CompileCase, target: Target) -> Resources:
    """Compile `case` for `target` with an empty cache.

    Raises ValueError where the case does not fit its kernel's parameters, and Triton's own errors
    where it does not compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    amd = target.backend == "hip"
    options = {
        "num_warps": case.num_warps,
        "num_stages": case.amd_num_stages if amd else case.num_stages,
    }
    assembler_log = io.StringIO()
    # In an empty cache, since a cached kernel would come without the assembler's log.
    with (
        tempfile.TemporaryDirectory() as folder,
        triton.knobs.cache.scope(),
        triton.knobs.nvidia.scope(),
        redirect_stdout(assembler_log),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        triton.knobs.cache.dir = folder
        triton.knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(
            _source(case),
            target=GPUTarget(target.backend, target.arch, target.warp_size),
            options=options,
        )
        if amd:
            return _amd(compiled)
        cubin = Path(folder) / "kernel.cubin"
        return _nvidia(compiled, assembler_log.getvalue(), cubin)


def objections(case: CompileCase, name: str, found: Resources) -> list[str]:
    """Reasons not to ship `case` for the target `name`; empty if there are none.

    Missing matrix instructions and narrow loads count against NVIDIA code only.
    """
    target = TARGETS[name]
    reasons = _memory_spilled(found)
    if target.backend == "cuda":
        narrow = [f"{n} {opcode}" for opcode, n in found.loads.items() if sass.is_narrow(opcode)]
        if narrow:
            reasons.append(
                f"loads of fewer than 16 bytes in a loop of products: {', '.join(narrow)}"
            )
        if case.tensor_cores and not found.tensor_cores:
            reasons.append("no tensor-core instruction")
        if case.wgmma and name == "sm_90":
            if not any(opcode.endswith("GMMA") for opcode in found.tensor_cores):
                reasons.append("no warp-group matrix instruction (HGMMA)")
            if found.serialized:
                reasons.append("ptxas runs the warp-group matrix instructions one after another")
    if found.shared > target.shared_limit:
        reasons.append(f"shared memory: {found.shared} bytes of {target.shared_limit}")
    if (found.tensor_memory or 0) > TENSOR_MEMORY_COLUMNS:
        reasons.append(f"tensor memory: {found.tensor_memory} of {TENSOR_MEMORY_COLUMNS} columns")
    return reasons


def _memory_spilled(found: Resources) -> list[str]:
    """Scalar registers, which only AMD has, spill into lanes of vector registers, not to memory."""
    reasons = []
    spills = {kind: count for kind, count in found.spills.items() if kind != "sgpr" and count}
    if "vgpr" in spills:
        reasons.append(f"spills: {spills['vgpr']} vector registers")
    elif spills:
        reasons.append(
            f"spills: {found.spills['store']} bytes stored, {found.spills['load']} loaded"
        )
    if found.stack or found.local:
        reasons.append(
            f"local memory: stack {found.stack}, local {found.local or 0} bytes a thread"
        )
    return reasons


def _source(case: CompileCase) -> Any:
    from triton.compiler import ASTSource

    names: list[str] = case.kernel.arg_names
    given = [*case.arguments, *case.constants]
    wrong = sorted(set(names).symmetric_difference(given)) or sorted(
        set(case.arguments) & set(case.constants)
    )
    if wrong:
        raise ValueError(
            f"parameters {wrong} of the case and of the kernel differ; every parameter of the "
            f"kernel needs either a type or a constant"
        )
    constants: dict[Any, Any] = dict(case.constants)
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(given: Any, *path: int) -> Any:
        """The type alone; what else is said goes to `constants` and `attributes`."""
        if isinstance(given, tuple):
            return type(given)(*[kind(member, *path, i) for i, member in enumerate(given)])
        if not isinstance(given, str):
            constants[path] = given
            return "constexpr"
        name, _, divisor = given.partition(":")
        if divisor:
            attributes[path] = [["tt.divisibility", int(divisor)]]
        return name

    signature = {
        name: kind(case.arguments.get(name, "constexpr"), i) for i, name in enumerate(names)
    }
    return ASTSource(case.kernel, signature, constants, attributes)


def _nvidia(compiled: Any, assembler_log: str, cubin: Path) -> Resources:
    from triton import knobs

    cubin.write_bytes(compiled.asm["cubin"])
    usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(cubin))
    # Without data-flow analysis (-ndf), which no count needs. Disassembly still takes a quarter of
    # the report's time.
    code = sass.parse(_output(knobs.nvidia.nvdisasm.path, "-ndf", "-c", str(cubin)))
    opcodes = Counter(opcode.split(".")[0] for opcode in code.opcodes)
    return Resources(
        registers=max(_numbers(r"\bREG:(\d+)", usage)),
        scalar_registers=None,
        stack=max(_numbers(r"\bSTACK:(\d+)", usage)),
        local=max(_numbers(r"\bLOCAL:(\d+)", usage)),
        spills={
            "store": sum(_numbers(r"(\d+) bytes spill stores", assembler_log)),
            "load": sum(_numbers(r"(\d+) bytes spill loads", assembler_log)),
        },
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        tensor_cores={name: count for name, count in opcodes.items() if name.endswith("MMA")},
        async_copies=sum(opcodes[name] for name in SASS_COPIES),
        loads=dict(sass.loads(code)),
        serialized="wgmma.mma_async instructions are serialized" in assembler_log,
    )


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    opcodes: Counter[str] = Counter()
    copies = 0
    for name, operands in AMD_OPCODE.findall(text):
        if name.startswith(("v_mfma", "v_smfmac")):
            opcodes[name] += 1
        copies += "_load_" in name and (operands.endswith(" lds") or "_load_lds_" in name)
    return Resources(
        registers=max(_numbers(r"\.vgpr_count:\s+(\d+)", text)),
        scalar_registers=max(_numbers(r"\.sgpr_count:\s+(\d+)", text)),
        stack=max(_numbers(r"\.private_segment_fixed_size:\s+(\d+)", text)),
        local=None,
        spills={
            kind: sum(_numbers(rf"\.{kind}_spill_count:\s+(\d+)", text))
            for kind in ("vgpr", "sgpr")
        },
        shared=compiled.metadata.shared,
        tensor_memory=None,
        tensor_cores=dict(opcodes),
        async_copies=copies,
        loads={},
        serialized=False,
    )


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _numbers(pattern: str, text: str) -> list[int]:
    """Every number that `pattern` finds. Raises ValueError if there is none, which must not read as
    zero."""
    found = [int(number) for number in re.findall(pattern, text)]
    if not found:
        raise ValueError(
            f"nothing matches {pattern!r}: this version of the tools is not understood"
        )
    return found
