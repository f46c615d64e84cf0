"""The memory readout: `memory_gate` and `memory_add_`."""

from coachhook_kernels.memory.gate import MemoryGate
from coachhook_kernels.memory.op import memory_add_, memory_gate

__all__ = ["MemoryGate", "memory_add_", "memory_gate"]
