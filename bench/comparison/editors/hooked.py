"""The engine itself, under each of its gates."""

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

import coachhook as ch
from bench.comparison.editors.setting import Setting


class Hooked:
    """`coachhook.Editor` with one gate; preservation: λ."""

    def __init__(self, setting: Setting, gate: str, preservation: float) -> None:
        self._editor = ch.Editor.from_pretrained(
            *setting.lm,
            config=replace(setting.config, gate=gate, preservation=preservation),
            statistics=setting.statistics,
        )
        self.edits = self._editor.hooks

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        self._editor.edit(requests, values)

    def held(self) -> int:
        modules = self.edits.modules(self._editor.model).values()
        tensors = [t for m in modules for t in (m.down, m.up, *m.gate.buffers()) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)
