"""The engine itself, under each of its gates and readouts."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

import coachhook as ch
from bench.comparison.editors.setting import Setting
from coachhook.hooks.memory import MemoryHook, MemoryRows


class Hooked:
    """`coachhook.Editor` under the delta readout; changed: settings, over those of the setting."""

    def __init__(self, setting: Setting, **changed: Any) -> None:
        self._editor = ch.Editor.from_pretrained(
            *setting.lm,
            config=replace(setting.config, readout="delta", **changed),
            statistics=setting.statistics,
        )
        self.edits = self._editor.hooks

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        self._editor.edit(requests, values)

    def held(self) -> int:
        modules = self.edits.modules(self._editor.model).values()
        tensors = [t for m in modules for t in (m.down, m.up, *m.gate.buffers()) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


class Memory:
    """`coachhook.Editor` under the memory readout, whose rows are optimised where they are written;
    least: the lowest threshold."""

    def __init__(self, setting: Setting, least: float) -> None:
        memory = replace(setting.config.memory, least=least)
        self._editor = ch.Editor.from_pretrained(
            *setting.lm, config=replace(setting.config, readout="memory", memory=memory)
        )
        self.edits = self._editor.hooks

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        self._editor.edit(requests)

    def held(self) -> int:
        parts = [m for m in self._editor.model.modules() if isinstance(m, MemoryHook | MemoryRows)]
        tensors = [tensor for part in parts for tensor in part.buffers()]
        return sum(t.numel() * t.element_size() for t in tensors)
