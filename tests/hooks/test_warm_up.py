"""After a warm-up nothing is left to compile, whatever the number of tokens and of edits."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
from bench.ops import host_time
from bench.ops.layers import random_gate
from coachhook.hooks.gates import Threshold
from coachhook.hooks.memory import Entries, MemoryHook, MemoryRows

compiled = []

class Counted(host_time.Compiled):
    def __init__(self):
        compiled.append(self)

host_time.Compiled = Counted
with torch.no_grad(), host_time.launching_nothing():
    for gate in host_time.GATES:
        for rank in (None, host_time.RANK):
            del compiled[:]
            hook = host_time.hook_of(gate, rank)
            hook.warm_up(512)
            warm = len(compiled)
            like = torch.empty(0, dtype=torch.bfloat16)
            for edits in (10, 11, 1025, 4000):
                if gate == "keyed":
                    hook.gate = random_gate(gate, host_time.D_IN, edits, like, Threshold())
                for rows in (1, 2, 3, 5, 16, 17, 31, 32, 33, 48, 64, 65, 100, 128, 255, 300, 512):
                    hook(torch.zeros(1, rows, host_time.D_IN, dtype=torch.bfloat16))
            if gate == "sequence":
                for shape in ((1, 7), (2, 30), (3, 100), (2, 200)):
                    mask = torch.ones(shape, dtype=torch.long)
                    hook.gate.watcher.mask, hook.gate.watcher.batch = mask, shape[0]
                    hook(torch.zeros(*shape, host_time.D_IN, dtype=torch.bfloat16))
                hook.warm_up(64)
            print(gate, rank, warm, len(compiled) - warm)
    del compiled[:]
    hook = host_time.hook_of("keyed", None)
    # A base that something watches runs by itself.
    hook.base.register_forward_hook(lambda *_: None)
    hook.warm_up(512)
    warm = len(compiled)
    for edits in (10, 1025, 4000):
        hook.gate = random_gate("keyed", host_time.D_IN, edits, like, Threshold())
        for rows in (1, 2, 17, 33, 64, 65, 300):
            hook(torch.zeros(1, rows, host_time.D_IN, dtype=torch.bfloat16))
    print("keyed", "alone", warm, len(compiled) - warm)
    del compiled[:]
    site = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    memory = MemoryHook(torch.randn(16, 64), torch.randn(16), site).to(torch.bfloat16)
    rows = MemoryRows(memory, 64, is_last=True).to(torch.bfloat16)
    memory.warm_up(512)
    warm = len(compiled)
    for edits in (1, 70, 3000):
        marks = torch.randn(edits, 16)
        memory.hold(Entries(marks, torch.arange(edits), torch.arange(edits)), 0.5)
        rows.hold(torch.randn(edits, 64))
        for n in (1, 2, 17, 64, 65, 300, 512):
            memory.watch(site, (torch.zeros(1, n, 64, dtype=torch.bfloat16),))
            rows.add(site, (), torch.zeros(1, n, 64, dtype=torch.bfloat16))
    print("memory", "rows", warm, len(compiled) - warm)
"""


def test_serving_compiles_nothing_after_a_warm_up() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8
    for gate, rank, warm, later in lines:
        assert int(warm) > 0
        assert int(later) == 0, (gate, rank)
