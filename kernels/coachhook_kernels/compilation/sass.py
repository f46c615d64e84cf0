"""What the loops of NVIDIA machine code load, read off its disassembly."""

import re
from collections import Counter
from dataclasses import dataclass

# `/*00a0*/  @!P0 LDG.E.128 R4, ...`: the opcode with its modifiers, and the operands.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"^(\.L_\w+):")
JUMP = re.compile(r"`\((\.L_\w+)\)")
LOAD = re.compile(r"(LDG|LDGSTS|LD|UTMALDG|UBLKCP)(\.|$)")
BOOLEAN = re.compile(r"\.[US]8\b")
TENSOR_COPIES = ("UTMALDG", "UBLKCP")
FEWEST_FMAS = 32
"""Multiplications that make a loop one of products where no tensor core computes them: other loops
add up a few numbers a thread."""


@dataclass(frozen=True)
class Code:
    """opcodes: of every instruction, with modifiers. loops: first instruction of each loop, and the
    one behind its last."""

    opcodes: list[str]
    loops: list[tuple[int, int]]


def parse(disassembly: str) -> Code:
    """Read what `nvdisasm -c` prints."""
    opcodes: list[str] = []
    loops: list[tuple[int, int]] = []
    labels: dict[str, int] = {}
    for line in disassembly.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            opcode, operands = found.groups()
            opcodes.append(opcode)
            jump = JUMP.search(operands) if opcode.startswith("BRA") else None
            # A label already seen: the branch goes back.
            if jump and jump[1] in labels:
                loops.append((labels[jump[1]], len(opcodes)))
    return Code(opcodes, loops)


def _innermost(code: Code) -> list[list[str]]:
    """The opcodes of each loop that holds no other."""
    return [
        code.opcodes[first:last]
        for first, last in code.loops
        if not any(
            first <= begin and end <= last and (begin, end) != (first, last)
            for begin, end in code.loops
        )
    ]


def _multiplies(loop: list[str]) -> bool:
    if any(opcode.split(".")[0].endswith("MMA") for opcode in loop):
        return True
    return sum(opcode.startswith("FFMA") for opcode in loop) >= FEWEST_FMAS


def loads(code: Code) -> Counter[str]:
    """Loads in loops of products, by opcode. Single bytes, which are booleans, do not count, nor do
    the loads of a product without a loop."""
    return Counter(
        opcode
        for loop in filter(_multiplies, _innermost(code))
        for opcode in loop
        if LOAD.match(opcode) and not BOOLEAN.search(opcode)
    )


def is_narrow(opcode: str) -> bool:
    """Whether a load is of fewer than 16 bytes a thread."""
    return opcode.split(".")[0] not in TENSOR_COPIES and ".128" not in opcode
