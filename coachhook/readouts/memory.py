"""The memory readout: rows of the edits' own, added after later blocks (csrc_notes/method.md,
"Memory")."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.errors import BaseModelMismatchError
from coachhook.hooks.memory import OFF, RIVAL, Entries, MemoryHook, MemoryRows
from coachhook.hooks.tensor_parallel import gathered, shared_by
from coachhook.journal.compaction import merge_rows
from coachhook.journal.journal import EditRecord
from coachhook.models.placement import device_of, fetched
from coachhook.readouts.delta import compute_dtype
from coachhook.readouts.readout import Readout

NAME = "coachhook_memory"
"""Of the submodules."""


@dataclass
class MemoryReadout(Readout):
    """A `MemoryHook` at the FFN of the gate block, `MemoryRows` at each write block."""

    name = "memory"

    @property
    def tells_edits_apart(self) -> bool:
        return True

    def unsaid(self) -> list[EditRecord]:
        return self.journal.unsaid()

    @property
    def gate_block(self) -> int:
        return self.base.layers[0]

    @property
    def write_blocks(self) -> tuple[int, ...]:
        assert self.config.memory.write_blocks is not None
        return self.config.memory.write_blocks

    def check(self, model: nn.Module) -> None:
        n_blocks = len(self.architecture.blocks(model))
        for number in (self.gate_block, *self.write_blocks):
            if not 0 <= number < n_blocks:
                raise BaseModelMismatchError(
                    f"these hooks belong at block {number}, and this {type(model).__name__} has "
                    f"{n_blocks} blocks, from 0; attach them to the model they were made for"
                )
        mesh = shared_by(model)
        if mesh is not None:
            self.agree(mesh)

    def attach(self, model: nn.Module, owner: str) -> None:
        site = self.architecture.ffn(model, self.gate_block)
        memory = MemoryHook(*self.sketches[self.gate_block], site)
        memory.owner = owner
        memory.to(device_of(site), compute_dtype(site))
        memory.handle = site.register_forward_pre_hook(memory.watch)
        site.add_module(NAME, memory)
        _tell_apart(site)
        blocks = self.architecture.blocks(model)
        d = self.base.shapes[self.gate_block][1]
        for number in self.write_blocks:
            block = blocks[number]
            rows = MemoryRows(memory, d, is_last=number == self.write_blocks[-1])
            rows.to(device_of(block), compute_dtype(block))
            rows.handle = block.register_forward_hook(rows.add)
            block.add_module(NAME, rows)
            _tell_apart(block)
        try:
            self.refresh(model, [self.gate_block])
        except BaseException:
            # Rows are read from files, which may be gone or damaged.
            self.detach(model, owner)
            raise

    def detach(self, model: nn.Module, owner: str) -> None:
        for module in list(model.modules()):
            part = module._modules.get(NAME)
            if isinstance(part, MemoryHook | MemoryRows) and part.owner == owner:
                assert part.handle is not None
                part.handle.remove()
                del module._modules[NAME]
                if _is_own(module.__dict__.get("forward"), module):
                    del module.__dict__["forward"]

    def hooks(self, model: nn.Module) -> dict[int, MemoryHook]:
        part = self.architecture.ffn(model, self.gate_block)._modules.get(NAME)
        return {self.gate_block: part} if isinstance(part, MemoryHook) else {}

    def refresh(self, model: nn.Module, layers: Sequence[int]) -> None:
        if self.gate_block not in layers:
            return
        journal, layer = self.journal, self.gate_block
        rows = journal.rows(layer, len(self.write_blocks), self.base.shapes[layer][1])
        threshold = journal.batches[-1].thresholds[layer].alpha if journal.batches else torch.inf
        blocks = self.architecture.blocks(model)
        for i, number in enumerate(self.write_blocks):
            part = blocks[number]._modules[NAME]
            assert isinstance(part, MemoryRows)
            part.hold(rows[:, i])
        memory = self.hooks(model)[layer]
        memory.hold(self._entries(), threshold)

    def switch(self, model: nn.Module) -> None:
        self.hooks(model)[self.gate_block].switch(self._entries().row)

    def _entries(self) -> Entries:
        """The edits' fingerprints, and after them their rivals', which go with their edits."""
        journal, layer = self.journal, self.gate_block
        size = len(self.sketches[layer][1])
        served = journal.served()
        marks, edit = journal.fingerprints(layer, size)
        row = served[edit]
        rivals, beside, free = journal.rivals(layer, size)
        return Entries(
            torch.cat([marks, rivals]),
            torch.cat([edit, torch.full_like(beside, -1)]),
            torch.cat(
                [
                    torch.where(row < 0, OFF, row),
                    torch.where(free & (served[beside] >= 0), RIVAL, OFF),
                ]
            ),
        )

    def merge(self, keep: int) -> None:
        d = self.base.shapes[self.gate_block][1]
        merge_rows(self.journal, keep, self.gate_block, len(self.write_blocks), d)

    def weights(self, model: nn.Module) -> Iterator[Tensor]:
        blocks = self.architecture.blocks(model)
        for number in sorted({self.gate_block, *self.write_blocks}):
            yield from identifying(blocks[number], f"block {number}")


def _tell_apart(module: nn.Module) -> None:
    """Give a module its own forward once more, in a place that compiled graphs look at. They do not
    look at hooks: one of a model without would run for a model with them, and the other way round.
    """
    module.__dict__.setdefault("forward", module.forward)


def _is_own(forward: Any, module: nn.Module) -> bool:
    """Whether `forward` is the one of the module's class, and no wrapper of somebody's."""
    return getattr(forward, "__func__", None) is type(module).forward


def identifying(block: nn.Module, name: str) -> list[Tensor]:
    """The weights that tell a block from its like: its vectors and its smallest matrix. Raises
    `BaseModelMismatchError` for a block without any."""
    found = []
    matrices: list[tuple[int, nn.Module, str]] = []
    for module in block.modules():
        if isinstance(module, MemoryHook | MemoryRows):
            continue
        for leaf, weight in module.named_parameters(recurse=False):
            if not weight.dtype.is_floating_point or weight.itemsize == 1:
                continue
            if weight.ndim == 1:
                found.append(gathered(fetched(module, leaf)))
            elif weight.ndim == 2:
                matrices.append((weight.numel(), module, leaf))
    if matrices:
        _, module, leaf = min(matrices, key=lambda one: one[0])
        found.append(gathered(fetched(module, leaf)))
    if not found:
        raise BaseModelMismatchError(
            f"{name} has no floating-point weight to compare with the base model's; if this is a "
            "quantised copy of it, attach with check=False"
        )
    return found
