"""The readouts: how the edits of a journal change the tokens whose gates are open."""

from coachhook.readouts.delta import DeltaReadout
from coachhook.readouts.memory import MemoryReadout
from coachhook.readouts.readout import Hook, Readout

READOUTS: dict[str, type[Readout]] = {r.name: r for r in (DeltaReadout, MemoryReadout)}

__all__ = ["READOUTS", "DeltaReadout", "Hook", "MemoryReadout", "Readout"]
