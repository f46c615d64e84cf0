"""What the host spends on one hooked layer, or on a memory, on a machine without a GPU.

    python -m bench.ops.host_time [--rounds N] [--json PATH or -]

Layers are tiny, so that hardly anything but overhead is left. *kernels*: the way to the Triton
kernels up to and with Triton's own preparation of each launch; nothing is compiled or launched, so
what the driver's launch itself takes is not in it. *plain torch*: the same layer on the CPU, whose
arithmetic is in it. A memory's *hook* is the gate at one block and the addition at another, every
token closed; it has no layer of its own.
"""

import itertools
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import thread_time
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from rich.table import Table
from torch.nn.functional import normalize

from bench.harness.output import put
from bench.harness.script import JsonTo, run_script
from bench.ops.layers import SKETCH, random_delta, random_gate
from coachhook.hooks import memory as memory_hooks
from coachhook.hooks.gates import Gate, SequenceGate, SequenceMask, Threshold
from coachhook.hooks.layer import HookLinear
from coachhook.hooks.memory import Entries, MemoryHook, MemoryRows
from coachhook_kernels import hook_linear, hook_linear_sequence, memory_add_, memory_gate
from coachhook_kernels.hook_linear_sequence import op as sequence_op
from coachhook_kernels.launch import runtime

D_IN, D_OUT, EDITS, RANK = 64, 32, 10, 16
CALLS = 20
# Decoding, and a prompt.
ROWS = (1, 128)
GATES = ("keyed", "calibrated", "sequence")
MEMORY = "memory"


class Compiled:
    """A kernel as Triton holds it, which only counts when it is launched."""

    launches = 0
    function = packed_metadata = None

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        from triton.compiler import CompiledKernel

        return CompiledKernel.__getitem__(self, grid)

    def _init_handles(self) -> None: ...

    def launch_metadata(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None:
        Compiled.launches += 1


@contextmanager
def launching_nothing() -> Iterator[None]:
    """Operations take the way to their Triton kernels, for tensors on a CPU, and end short of the
    driver's launch."""
    import triton
    from triton.backends.compiler import GPUTarget

    from coachhook_kernels.launch import prepared

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def compiled(kernel: Any, key: Any, signature: Any, device: int, *_: Any, **__: Any) -> Any:
        return kernel.device_caches[device][0].setdefault(key, Compiled())

    with (
        patch.object(triton.runtime.driver, "_active", Driver()),
        patch.object(runtime, "triton_runs", lambda *_: True),
        patch.object(sequence_op, "triton_runs", lambda *_: True),
        patch.object(memory_hooks, "_is_seen", lambda tensor: False),
        patch.object(triton.runtime.jit.JITFunction, "_do_compile", compiled),
        patch.dict(prepared._variants, clear=True),
    ):
        yield


def hook_of(gate: str, rank: int | None) -> HookLinear:
    like = torch.empty(0, dtype=torch.bfloat16)
    base = torch.nn.Linear(D_IN, D_OUT, bias=False, dtype=like.dtype)
    closed = Threshold()
    made: Gate
    if gate == SequenceGate.name:
        made = SequenceGate(closed, SequenceMask())
    else:
        made = random_gate(gate, D_IN, EDITS, like, closed)
    return HookLinear(base, random_delta(D_IN, D_OUT, rank, like), made)


def memory_steps(rows: int) -> dict[str, Callable[[], object]]:
    """The two operations of a memory alone, and its two hooks."""
    like = torch.empty(0, dtype=torch.bfloat16)
    memory = MemoryHook(like.new_ones(SKETCH, D_IN), like.new_zeros(SKETCH), torch.nn.Identity())
    marks = normalize(torch.randn(EDITS, SKETCH), dim=-1)
    memory.hold(Entries(marks, torch.arange(EDITS), torch.arange(EDITS)), torch.inf)
    part = MemoryRows(memory, D_IN, is_last=True)
    part.to(like.dtype)
    part.hold(torch.randn(EDITS, D_IN))
    keys, output = (torch.randn(1, rows, D_IN, dtype=like.dtype) for _ in range(2))
    gate = memory.gate(memory.row)

    def operations() -> object:
        seen = memory_gate(keys, gate)
        return memory_add_(output, *seen, gate.threshold, part.rows)

    def hooks() -> object:
        memory.watch(memory.site, (keys,))
        return part.add(memory.site, (keys,), output)

    return {"operation": operations, "hook": hooks}


def steps(gate: str, rank: int | None, rows: int) -> dict[str, Callable[[], object]]:
    """The unhooked layer, the operation alone, and the hook in place of the layer; of a memory, the
    latter two."""
    if gate == MEMORY:
        return memory_steps(rows)
    hook = hook_of(gate, rank)
    keys = torch.randn(1, rows, D_IN, dtype=hook.weight.dtype)
    weight, delta, tokens = hook.weight, hook.delta, hook.gate.per_token()

    def operation() -> object:
        if tokens is None:
            return hook_linear_sequence(keys, weight, None, delta, None, hook.gate.alpha)
        return hook_linear(keys, weight, None, delta, tokens)

    return {"layer": lambda: hook.base(keys), "operation": operation, "hook": lambda: hook(keys)}


def microseconds(step: Callable[[], object], rounds: int) -> float:
    """Of processor time a call: the least over the rounds, which other work disturbed least."""
    step()
    return min(timeit.repeat(step, timer=thread_time, number=CALLS, repeat=rounds)) / CALLS * 1e6


def measure(rounds: int) -> list[dict[str, Any]]:
    layers = [*itertools.product(GATES, (None, RANK)), (MEMORY, None)]
    return [measure_one(gate, rank, rows, rounds) for gate, rank in layers for rows in ROWS]


def measure_one(gate: str, rank: int | None, rows: int, rounds: int) -> dict[str, Any]:
    line: dict[str, Any] = {"gate": gate, "rank": rank, "rows": rows}
    found = steps(gate, rank, rows)
    line |= {f"{k}, plain torch": microseconds(v, rounds) for k, v in found.items()}
    found.pop("layer", None)
    with launching_nothing():
        before = Compiled.launches
        found["operation"]()
        line["launches of Triton"] = Compiled.launches - before
        line |= {f"{k}, kernels": microseconds(v, rounds) for k, v in found.items()}
    return line


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, of which the best counts.")] = 100,
    json_to: JsonTo = None,
) -> None:
    """Time the host's part of every operation of a hooked layer."""
    torch.set_num_threads(1)
    with torch.no_grad():
        lines = measure(rounds)
    table = Table(title="microseconds of the host a call, no gradients")
    for name in lines[0]:
        table.add_column(name)
    for line in lines:
        cells = {k: f"{v:.1f}" if isinstance(v, float) else str(v) for k, v in line.items()}
        if line["rank"] is None:
            cells["rank"] = "" if line["gate"] == MEMORY else "dense"
        table.add_row(*(cells.get(name, "") for name in lines[0]))
    put({"rows": lines}, table, json_to)


if __name__ == "__main__":
    run_script(main)
