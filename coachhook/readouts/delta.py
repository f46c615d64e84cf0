"""The paper's readout: `Δ k` at the down-projection of every hooked layer."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from coachhook.errors import BaseModelMismatchError
from coachhook.hooks.gates import GATES, Gate, LayerEdits, Threshold
from coachhook.hooks.gates.gate import PassWatcher
from coachhook.hooks.layer import HookLinear
from coachhook.hooks.tensor_parallel import RowParallel, gathered
from coachhook.journal.compaction import merge
from coachhook.models.placement import device_of, fetched
from coachhook.readouts.readout import Readout
from coachhook_kernels import Delta


@dataclass
class DeltaReadout(Readout):
    """A `HookLinear` in place of each hooked down-projection."""

    name = "delta"
    _watchers: dict[int, list[RemovableHandle]] = field(default_factory=dict)

    @property
    def tells_edits_apart(self) -> bool:
        return self._gate_type.tells_edits_apart

    def check(self, model: nn.Module) -> None:
        bases = [self.architecture.down_projection(model, layer) for layer in self.base.layers]
        shared = [split for split in map(RowParallel.of, bases) if split is not None]
        if shared:
            self.agree(shared[0].mesh)

    def attach(self, model: nn.Module, owner: str) -> None:
        architecture = self.architecture
        modules = {i: architecture.down_projection(model, i) for i in self.base.layers}
        base_model = getattr(model, "base_model", model)
        watcher = self._gate_type.watch(list(inspect.signature(base_model.forward).parameters))
        deltas = self._deltas(self.base.layers)
        for layer, module in modules.items():
            hook = HookLinear(module, deltas[layer], self._gate(layer, watcher))
            hook.owner = owner
            self._place(hook, module)
            model.set_submodule(architecture.name(layer), hook)
        if watcher is not None:
            # On both, because a pass may enter through either one.
            self._watchers[id(model)] = [
                part.register_forward_pre_hook(watcher, with_kwargs=True)
                for part in {id(model): model, id(base_model): base_model}.values()
            ]

    def detach(self, model: nn.Module, owner: str) -> None:
        for name, module in list(model.named_modules()):
            if isinstance(module, HookLinear) and module.owner == owner:
                model.set_submodule(name, module.base)
        for handle in self._watchers.pop(id(model), ()):
            handle.remove()

    def hooks(self, model: nn.Module) -> dict[int, HookLinear]:
        architecture = self.architecture
        modules = {i: architecture.down_projection(model, i) for i in self.base.layers}
        return {k: v for k, v in modules.items() if isinstance(v, HookLinear)}

    def refresh(self, model: nn.Module, layers: Sequence[int]) -> None:
        deltas = self._deltas(layers)
        for layer, hook in self.hooks(model).items():
            if layer in deltas:
                hook.down, hook.up = deltas[layer]
                hook.gate = self._gate(layer, hook.gate.watcher)
                self._place(hook, hook.base)

    def switch(self, model: nn.Module) -> None:
        in_force = self.journal.in_force()
        for hook in self.hooks(model).values():
            hook.gate.switch(in_force)

    def merge(self, keep: int) -> None:
        merge(self.journal, keep, self.base.shapes, self._left_out())

    def weights(self, model: nn.Module) -> Iterator[Tensor]:
        architecture = self.architecture
        modules = {i: architecture.down_projection(model, i) for i in self.base.layers}
        for layer, module in modules.items():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
                raise BaseModelMismatchError(
                    f"{architecture.name(layer)} has no floating-point weight to compare with the "
                    "base model's; if this is a quantised copy of it, attach with check=False"
                )
        # One at a time: weights may have to be gathered from other processes or read from disk.
        yield from (gathered(fetched(module)) for module in modules.values())

    def _left_out(self) -> list[int]:
        """Ids of the edits whose share is not in Δ."""
        if self.tells_edits_apart:
            return []
        return [edit.id for edit in self.journal.edits() if not edit.enabled]

    def _deltas(self, layers: Sequence[int]) -> Mapping[int, Delta]:
        shapes, left_out = self.base.shapes, self._left_out()
        return {layer: self.journal.delta(layer, shapes[layer], left_out) for layer in layers}

    @property
    def _gate_type(self) -> type[Gate]:
        return GATES[self.config.gate]

    def _gate(self, layer: int, watcher: PassWatcher | None) -> Gate:
        batches = self.journal.batches
        threshold = batches[-1].thresholds[layer] if batches else Threshold()
        projection, offset = self.sketches[layer]
        marks = self.journal.fingerprints(layer, len(offset))
        edits = LayerEdits(projection, offset, *marks, self.journal.in_force())
        return self._gate_type.build(threshold, edits, watcher)

    def _place(self, hook: HookLinear, base: nn.Module) -> None:
        """Move a hook's own tensors to its base module's device and compute dtype."""
        hook.split_over_processes()
        device, dtype = device_of(base), compute_dtype(base)
        hook.down = hook.down.to(device, dtype)
        hook.up = None if hook.up is None else hook.up.to(device, dtype)
        if hook.up is not None and hook.down.is_cuda:
            # Zero rows change nothing; with them, a GPU reads aligned factors 16 bytes at a time.
            missing = -hook.down.shape[0] % 16
            hook.down = nn.functional.pad(hook.down, (0, 0, 0, missing))
            hook.up = nn.functional.pad(hook.up, (0, missing))
        hook.gate.to(device, dtype)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: not that of a quantised weight, but maybe that of its
    scales."""
    tensors = [*module.parameters(), *module.buffers()]
    wide = [t.dtype for t in tensors if t.dtype.is_floating_point and t.itemsize > 1]
    return wide[0] if wide else torch.float32
