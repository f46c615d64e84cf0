"""What the loops of NVIDIA machine code load, read off its disassembly."""

import re
from collections import Counter
from dataclasses import dataclass

# `/*00a0*/  @!P0 LDG.E.128 R4, ...`: the opcode with its modifiers, and the operands.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)")
LABEL = re.compile(r"^(\.L_\w+):")
JUMP = re.compile(r"`\((\.L_\w+)\)")
LOAD = re.compile(r"(LDG|LDGSTS|LD|UTMALDG|UBLKCP)(\.|$)")
WIDTH = re.compile(r"\.[US]?(8|16|64|128)\b")
WHOLE_TILES = ("UTMALDG", "UBLKCP")
FEWEST_FMAS = 32
"""Multiplications that make a loop one of products where no tensor core computes them: other loops
add up a few numbers a thread."""
BESIDE = 10
"""Narrow loads count where they bring more than one in so many of a loop's bytes: a single row's
keys, which `Conv1D` weights are multiplied with, bring less."""


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


def _width(opcode: str) -> int:
    """Bytes that a load brings a thread; 16 where one instruction copies a whole tile."""
    if opcode.split(".")[0] in WHOLE_TILES:
        return 16
    bits = WIDTH.search(opcode)
    return int(bits[1]) // 8 if bits else 4


def is_narrow(opcode: str) -> bool:
    """Whether a load brings fewer than 16 bytes a thread, and not one, which is a boolean."""
    return 1 < _width(opcode) < 16


def loads(code: Code) -> Counter[str]:
    """Loads in loops of products, by opcode; without narrow ones that bring next to nothing, and
    without the loads of a product that has no loop."""
    found: Counter[str] = Counter()
    for loop in filter(_multiplies, _innermost(code)):
        streamed = [opcode for opcode in loop if LOAD.match(opcode)]
        narrow = [opcode for opcode in streamed if is_narrow(opcode)]
        found.update(streamed)
        if BESIDE * sum(map(_width, narrow)) <= sum(map(_width, streamed)):
            found.subtract(narrow)
    return +found
