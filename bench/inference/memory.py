"""Synthetic entries of a memory, to be put on a model to generate with."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.hooks import RemovableHandle

from bench.inference.shapes import Opening, Synthetic
from bench.ops.layers import SKETCH
from coachhook.hooks.memory import Entries, MemoryHook, MemoryRows
from coachhook.models.architecture import Architecture, memory_blocks

FORMS = 6
"""Fingerprints of an edit without aliases (coachhook/editing/forms.py)."""


class SyntheticMemory(Synthetic):
    """Random entries behind a closed gate, with a row each, at the blocks that are the default."""

    exact = True

    def __init__(self, model: Any, entries: int) -> None:
        super().__init__(model)
        architecture = Architecture.of_blocks(model)
        blocks = architecture.blocks(model)
        gate, written = memory_blocks(len(blocks))
        self.layers = [gate, *written]
        d, device = model.config.hidden_size, model.device
        projection = torch.randn(SKETCH, d, device=device) / d**0.5
        site = architecture.ffn(model, gate)
        self.memory = MemoryHook(projection, torch.zeros(SKETCH, device=device), site)
        self.rows = {
            number: MemoryRows(self.memory, d, is_last=number == written[-1]) for number in written
        }
        self._handles: list[RemovableHandle] = []
        self._blocks = {number: blocks[number] for number in written}
        for part in (self.memory, *self.rows.values()):
            part.to(device, model.dtype)
        owner = torch.arange(FORMS * entries, device=device) // FORMS
        marks = normalize(torch.randn(len(owner), SKETCH, device=device), dim=-1)
        self.memory.hold(Entries(marks, owner, owner), torch.inf)
        for part in self.rows.values():
            # As large as a hidden state or larger, so that an open gate shows in the logits.
            part.hold(torch.randn(entries, d, device=device))

    def set(self, on: bool) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if on:
            watch = self.memory.site.register_forward_pre_hook(self.memory.watch)
            self._handles.append(watch)
            for number, part in self.rows.items():
                self._handles.append(self._blocks[number].register_forward_hook(part.add))

    def opening(self) -> Opening:
        memory = self.memory
        return Opening(memory.site, memory.read, dict(memory.named_buffers()), memory.threshold)

    def bytes_held(self) -> int:
        rows = [part.rows for part in self.rows.values()]
        return sum(int(tensor.nbytes) for tensor in (*self.memory.buffers(), *rows))

    def bytes_read(self) -> int:
        memory = self.memory
        read: list[Tensor] = [memory.projection, memory.fingerprints, memory.enabled]
        return sum(int(tensor.nbytes) for tensor in read)
