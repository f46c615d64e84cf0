"""Random memories to measure on, the check that comes before any time is taken, and the contenders.

Keys, rows and fingerprints are random; three fingerprints belong to each entry. As in
`bench.ops.layers`, the keys of open tokens lie far above the threshold and all others far below.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, silu

from bench.harness.script import WrongResultError
from bench.ops.layers import SKETCH, require_close
from coachhook_kernels import MemoryGate, memory_add_, memory_gate
from coachhook_kernels.memory import reference

AN_ENTRY = 3
"""Fingerprints of one entry."""
CHECKED = 256
"""Rows compared in float64, at most: of 300,000 fingerprints more would not fit."""
GATE, ADD, LAYER = "memory_gate", "memory_add_", "memory_gate, memory_add_"
OPERATIONS = (GATE, ADD, LAYER)
PLAIN = "plain torch"

Contenders = dict[str, Callable[[], object]]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


class Memory(NamedTuple):
    """keys and output `(t, d)`, rows `(e, d)`; `n_open` tokens, far apart, are open."""

    keys: Tensor
    gate: MemoryGate
    output: Tensor
    rows: Tensor
    n_open: int

    def opened(self) -> Tensor:
        """The tokens that are to be open; the i-th of them carries fingerprint i."""
        step = len(self.keys) // max(self.n_open, 1)
        return torch.arange(self.n_open, device=self.keys.device) * step


def random_memory(
    d: int,
    tokens: int,
    entries: int,
    *,
    n_open: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Memory:
    """A memory of so many entries for keys `(tokens, d)`."""
    like = torch.empty(0, dtype=dtype, device=device)
    number = AN_ENTRY * entries
    gate = MemoryGate(
        like.new_empty(SKETCH, d).normal_(std=d**-0.5),
        like.new_zeros(SKETCH),
        normalize(torch.randn(number, SKETCH, device=device), dim=-1).to(dtype),
        torch.arange(number, device=device) // AN_ENTRY,
        torch.ones(number, dtype=torch.bool, device=device),
        torch.tensor(0.8, device=device),
    )
    keys, output = (like.new_empty(tokens, d).normal_() for _ in range(2))
    memory = Memory(keys, gate, output, like.new_empty(entries, d).normal_(), n_open)
    # A random key's largest cosine is at most 0.65; with 32 times a fingerprint added, 0.9.
    keys[memory.opened()] += 32 * gate.fingerprints[torch.arange(n_open) % number] @ gate.projection
    return memory


def check_memory(memory: Memory) -> None:
    """Raise WrongResultError unless both operations give the reference's result."""
    found = memory_gate(memory.keys, memory.gate)
    plain = reference.memory_gate(memory.keys, memory.gate)
    for name, (score, entry) in ((GATE, found), (PLAIN, plain)):
        _require_open(name, memory, score, entry)
    _check_nearest(memory, found, plain[0])
    _check_add(memory, *found)


def _require_open(name: str, memory: Memory, score: Tensor, entry: Tensor) -> None:
    is_open = (score >= memory.gate.threshold) & (entry >= 0)
    wanted = torch.zeros_like(is_open)
    wanted[memory.opened()] = True
    if not torch.equal(is_open, wanted):
        count = int(is_open.sum())
        raise WrongResultError(
            f"{name} opened {count} of {len(is_open)} tokens, not the {memory.n_open} right ones"
        )
    own = memory.gate.owner[torch.arange(memory.n_open) % len(memory.gate.owner)]
    if not torch.equal(entry[memory.opened()], own):
        raise WrongResultError(f"{name} opened tokens for entries that are not theirs")


def _check_nearest(memory: Memory, found: tuple[Tensor, Tensor], plain: Tensor) -> None:
    """Cosines, and that the entry named is the nearest up to rounding, on some tokens."""
    tokens = len(memory.keys)
    some = torch.arange(0, tokens, max(1, tokens // CHECKED), device=memory.keys.device)
    projection, offset, fingerprints = (part.double() for part in memory.gate[:3])
    unit = normalize(linear(memory.keys[some].double(), projection) - offset, dim=-1)
    cosines = linear(unit, fingerprints)
    score, entry = (part[some] for part in found)
    best = cosines.amax(-1)
    require_close(GATE, score, plain[some], best)
    of_entry = AN_ENTRY * entry[:, None] + torch.arange(AN_ENTRY, device=entry.device)
    behind = float((best - cosines.gather(1, of_entry).amax(-1)).max())
    # Which of two is nearer may be decided by rounding.
    if not behind <= 4 * torch.finfo(memory.keys.dtype).eps:
        raise WrongResultError(f"{GATE} names an entry whose cosine is {behind:.3g} too low")


def _check_add(memory: Memory, score: Tensor, entry: Tensor) -> None:
    _, gate, output, rows, _ = memory
    added = memory_add_(output.clone(), score, entry, gate.threshold, rows)
    plain = reference.memory_add(output, score, entry, gate.threshold, rows)
    exact = output.double()
    exact[memory.opened()] += rows[entry[memory.opened()]].double()
    require_close(ADD, added, plain, exact)
    closed = torch.ones(len(output), dtype=torch.bool, device=output.device)
    closed[memory.opened()] = False
    if not torch.equal(added[closed], output[closed]):
        raise WrongResultError(f"{ADD} changed closed tokens")


def gate_contenders(memory: Memory, compiled: Compile) -> Contenders:
    keys, gate = memory.keys, memory.gate
    form = compiled(reference.memory_gate)
    return {
        PLAIN: lambda: reference.memory_gate(keys, gate),
        f"{PLAIN}, compiled": lambda: form(keys, gate),
        GATE: lambda: memory_gate(keys, gate),
    }


def add_contenders(memory: Memory, compiled: Compile) -> Contenders:
    keys, gate, output, rows, _ = memory
    # Of the reference: what the kernels of the gate look up is not this operation's.
    seen = (*reference.memory_gate(keys, gate), gate.threshold, rows)
    form = compiled(reference.memory_add)
    return {
        PLAIN: lambda: reference.memory_add(output, *seen),
        f"{PLAIN}, compiled": lambda: form(output, *seen),
        ADD: lambda: memory_add_(output, *seen),
    }


def layer_contenders(memory: Memory, inner: int, compiled: Compile) -> Contenders:
    """The FFN of a Llama block, and the same with a memory that reads its input and adds to its
    output. inner: its width."""
    keys, gate, _, rows, _ = memory
    d = keys.shape[1]
    opening, up = (keys.new_empty(inner, d).normal_(std=d**-0.5) for _ in range(2))
    down = keys.new_empty(d, inner).normal_(std=inner**-0.5)

    def ffn() -> Tensor:
        return linear(silu(linear(keys, opening)) * linear(keys, up), down)

    def plain() -> Tensor:
        seen = reference.memory_gate(keys, gate)
        return reference.memory_add(ffn(), *seen, gate.threshold, rows)

    def with_memory() -> Tensor:
        seen = memory_gate(keys, gate)
        return memory_add_(ffn(), *seen, gate.threshold, rows)

    whole = compiled(plain)
    return {
        "FFN": ffn,
        f"FFN, {PLAIN}": plain,
        f"FFN, {PLAIN}, compiled": whole,
        f"FFN, {LAYER}": with_memory,
    }


def gate_work(d: int, tokens: int, entries: int, itemsize: int) -> tuple[int, int]:
    """Bytes of `memory_gate`, each counted once, and operations."""
    number = AN_ENTRY * entries
    # Of each fingerprint one byte says whether it is enabled; of each token there is a score, an
    # entry, and the owner that this was read from.
    moved = itemsize * (tokens * d + SKETCH * (d + 1 + number)) + number + tokens * (4 + 8 + 8)
    return moved, 2 * tokens * SKETCH * (d + number)


def add_work(d: int, tokens: int, n_open: int, itemsize: int) -> tuple[int, int]:
    """The same of `memory_add_`: of a closed token it reads the score and the entry alone."""
    return tokens * (4 + 8) + 3 * itemsize * n_open * d, n_open * d


def ffn_work(d: int, tokens: int, inner: int, itemsize: int) -> tuple[int, int]:
    """The same of a Llama block's FFN, whose inner values stay in the last cache."""
    return itemsize * (3 * inner * d + 2 * tokens * d), 6 * tokens * inner * d
