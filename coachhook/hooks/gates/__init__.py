"""The gates, by their names in the settings. To add one, add a module here and a line below."""

from coachhook.hooks.gates.calibrated import CalibratedGate
from coachhook.hooks.gates.gate import Evidence, Gate, GateReading, LayerEdits, Threshold
from coachhook.hooks.gates.keyed import KeyedGate
from coachhook.hooks.gates.sequence import SequenceGate, SequenceMask

GATES: dict[str, type[Gate]] = {
    gate.name: gate for gate in (KeyedGate, CalibratedGate, SequenceGate)
}

__all__ = [
    "GATES",
    "CalibratedGate",
    "Evidence",
    "Gate",
    "GateReading",
    "KeyedGate",
    "LayerEdits",
    "SequenceGate",
    "SequenceMask",
    "Threshold",
]
