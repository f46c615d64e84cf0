"""`HookSet`: all hooks of one edited model, and how they get on and off it."""

import inspect
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from coachhook import folder
from coachhook.config import EditConfig
from coachhook.errors import AttachError, BaseModelMismatchError, ConfigError
from coachhook.gates import CalibratedGate, Gate, KeyedGate, SequenceGate, SequenceMask, Threshold
from coachhook.hooks import HookLinear, HookState
from coachhook.journal import EditRecord, Journal
from coachhook.models import Architecture, BaseModel, weight_checksums
from coachhook.sharded import RowParallel, gathered
from coachhook.trace import Trace, trace_text
from coachhook_kernels import Delta


class HookSet:
    """Hooks for the layers of one base model, derived from the journal of all batches.

    sketches: per layer `(F, offset)`, see `KeyedGate`. The same set can be attached to several
    copies of its base model, in any dtype and on any device, and to one that processes share
    (tensor parallelism): every process then has a set of its own, and calls it as the others do.
    """

    def __init__(
        self,
        base: BaseModel,
        config: EditConfig,
        sketches: Mapping[int, tuple[Tensor, Tensor]],
        journal: Journal | None = None,
    ) -> None:
        self.base = base
        self.config = config
        self.sketches = dict(sketches)
        self.journal = journal or Journal()
        self._saved: dict[Path, str | None] = {}
        self._owner = uuid4().hex
        self._attached: list[weakref.ref[nn.Module]] = []
        self._masks: dict[int, Any] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        return self.base.layers

    @property
    def edits(self) -> list[EditRecord]:
        """Every edit of the journal, in order."""
        return self.journal.edits()

    def attach(self, model: nn.Module, *, check: bool = True) -> nn.Module:
        """Put the hooks on `model`, in place; its weights are shared, not changed.

        check: compare the checksum of the hooked weights. Turn it off for a quantised copy of the
        base model, whose weights cannot be compared. Raises `AttachError` if the model already has
        hooks, or processes share it and attach different ones or share it in a way that hooks
        cannot follow; `BaseModelMismatchError` if it is another model. Returns `model`.
        """
        architecture = Architecture(self.base.template)
        modules = {i: architecture.down_projection(model, i) for i in self.layers}
        if any(isinstance(module, HookLinear) for module in model.modules()):
            raise AttachError(
                f"this {type(model).__name__} already has hooks attached; detach those first"
            )
        self._check_processes(modules.values())
        if check:
            self.check_base(model)
        base_model = getattr(model, "base_model", model)
        context = SequenceMask(list(inspect.signature(base_model.forward).parameters))
        for layer, module in modules.items():
            hook = HookLinear(module, self._delta(layer), self._gate(layer, context))
            hook.owner = self._owner
            self._place(hook, module)
            model.set_submodule(architecture.name(layer), hook)
        if self.config.gate == SequenceGate.name:
            # On both: not every pass goes through the one, or through the other.
            self._masks[id(model)] = [
                part.register_forward_pre_hook(context, with_kwargs=True)
                for part in {id(model): model, id(base_model): base_model}.values()
            ]
        self._attached.append(weakref.ref(model))
        return model

    def detach(self, model: nn.Module | None = None) -> None:
        """Take the hooks off `model`, or off every model; the original modules return."""
        models = [ref() for ref in self._attached] if model is None else [model]
        for hooked in (m for m in models if m is not None):
            for name, module in list(hooked.named_modules()):
                if isinstance(module, HookLinear) and module.owner == self._owner:
                    hooked.set_submodule(name, module.base)
            for handle in self._masks.pop(id(hooked), ()):
                handle.remove()
        self._attached = [r for r in self._attached if r() is not None and r() not in models]

    @contextmanager
    def attached(self, model: nn.Module, *, check: bool = True) -> Iterator[nn.Module]:
        """Hooks on `model` inside the block only."""
        self.attach(model, check=check)
        try:
            yield model
        finally:
            self.detach(model)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[nn.Module]:
        """The unedited model inside the block, with the hooks left in place."""
        hooks = self.modules(model).values()
        states = [hook.state for hook in hooks]
        for hook in hooks:
            hook.state = HookState.OFF
        try:
            yield model
        finally:
            for hook, state in zip(hooks, states, strict=True):
                hook.state = state

    def modules(self, model: nn.Module) -> dict[int, HookLinear]:
        """The hook of each layer on `model`. Raises `AttachError` if they are not attached."""
        architecture = Architecture(self.base.template)
        found = {layer: architecture.down_projection(model, layer) for layer in self.layers}
        hooks = {k: v for k, v in found.items() if isinstance(v, HookLinear)}
        if len(hooks) < len(found):
            raise AttachError("the hooks are not attached to this model; attach them first")
        return hooks

    def trace(self, model: Any, tokenizer: Any, text: str) -> Trace:
        """Per token of `text` and hooked layer: score, threshold, whether the gate of the attached
        hooks opened, and which edit fired."""
        return trace_text(model, tokenizer, self.modules(model), text)

    def enable(self, edit: int) -> None:
        """Bring an edit (by id) back into force, on every model the hooks are on."""
        self._switch(edit, True)

    def disable(self, edit: int) -> None:
        """Take an edit (by id) out of force. The keyed gate no longer knows its fingerprints; under
        the other gates its share leaves Δ, which undoes it up to what later batches built on it."""
        self._switch(edit, False)

    def _switch(self, edit: int, enabled: bool) -> None:
        edits = self.edits
        if not isinstance(edit, int) or not 0 <= edit < len(edits):
            raise ConfigError(f"there is no edit {edit!r}; this set has {len(edits)}, from 0")
        models = [model for model in (ref() for ref in self._attached) if model is not None]
        hooks = [hook for model in models for hook in self.modules(model).values()]
        edits[edit].enabled = enabled
        if self.config.gate != KeyedGate.name:
            self.refresh()
            return
        live = torch.tensor([record.id for record in self.journal.live()], dtype=torch.long)
        for hook in hooks:
            # In place, so that compiled and captured graphs see it at their next run.
            gate = hook.gate
            assert isinstance(gate, KeyedGate)
            gate.enabled.copy_(torch.isin(gate.owner, live.to(gate.owner.device)))

    def refresh(self, layers: Sequence[int] | None = None) -> None:
        """Bring attached models up to date with the journal."""
        for model in (ref() for ref in self._attached):
            if model is None:
                continue
            for layer, hook in self.modules(model).items():
                if layers is None or layer in layers:
                    delta = self._delta(layer)
                    hook.down, hook.up = delta.down, delta.up
                    hook.gate = self._gate(layer, getattr(hook.gate, "context", SequenceMask()))
                    self._place(hook, hook.base)

    def _delta(self, layer: int) -> Delta:
        keyed = self.config.gate == KeyedGate.name
        left_out = [] if keyed else [edit.id for edit in self.edits if not edit.enabled]
        return self.journal.delta(layer, self.base.shapes[layer], left_out)

    def _gate(self, layer: int, context: SequenceMask) -> Gate:
        batches = self.journal.batches
        threshold = batches[-1].thresholds[layer] if batches else Threshold()
        if self.config.gate == CalibratedGate.name:
            return CalibratedGate(threshold)
        if self.config.gate == SequenceGate.name:
            return SequenceGate(threshold, context)
        projection, offset = self.sketches[layer]
        fingerprints, owner = self.journal.fingerprints(layer, len(offset))
        live = torch.tensor([edit.id for edit in self.journal.live()], dtype=torch.long)
        return KeyedGate(
            threshold, projection, offset, fingerprints, owner, torch.isin(owner, live)
        )

    def _place(self, hook: HookLinear, base: nn.Module) -> None:
        """Move a hook's own tensors to where its base module is, in the dtype it computes in."""
        hook.split_over_processes()
        tensors = [*base.parameters(), *base.buffers()]
        device = tensors[0].device if tensors else None
        # A quantised weight says nothing of the dtype to compute in; its scales may.
        wide = [t.dtype for t in tensors if t.dtype.is_floating_point and t.itemsize > 1]
        dtype = wide[0] if wide else torch.float32
        hook.down = hook.down.to(device, dtype)
        hook.up = None if hook.up is None else hook.up.to(device, dtype)
        if hook.up is not None and hook.down.is_cuda:
            # Rows of zeros change nothing, and a GPU reads aligned factors 16 bytes at a time.
            missing = -hook.down.shape[0] % 16
            hook.down = nn.functional.pad(hook.down, (0, 0, 0, missing))
            hook.up = nn.functional.pad(hook.up, (0, missing))
        hook.gate.to(device, dtype)

    def _check_processes(self, bases: Iterable[nn.Module]) -> None:
        """Raise `AttachError` where processes share a base in a way that hooks cannot follow, or
        are not about to attach the same hooks."""
        shared = [split for split in map(RowParallel.of, bases) if split is not None]
        if shared:
            thresholds = [batch.thresholds for batch in self.journal.batches]
            state = (self.base.checksums, self.config, self.edits, thresholds)
            shared[0].check_agreement(repr(state))

    def check_base(self, model: nn.Module) -> None:
        """Raise `BaseModelMismatchError` unless `model`'s hooked weights are the base model's."""
        architecture = Architecture(self.base.template)
        weights = []
        for layer in self.layers:
            weight = getattr(architecture.down_projection(model, layer), "weight", None)
            if not isinstance(weight, Tensor) or not weight.dtype.is_floating_point:
                raise BaseModelMismatchError(
                    f"{architecture.name(layer)} has no floating-point weight to compare with the "
                    "base model's; if this is a quantised copy of it, attach with check=False"
                )
            weights.append(weight)
        # One by one: processes that share the model gather every weight for it.
        found = weight_checksums(gathered(weight) for weight in weights)
        if not set(found.items()) & set(self.base.checksums.items()):
            raise BaseModelMismatchError(
                f"these hooks were made for {self.base.name!r} with checksum "
                f"{self.base.checksums['bfloat16'][:16]}, but the model's is "
                f"{found['bfloat16'][:16]}; attach them to the model they were made for "
                "(with check=False if this is a quantised copy of it)"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `hook_config.json` and one safetensors file per batch, atomically.

        Batches that the folder already holds are not written again. Raises `SaveError` when
        writing fails, `FolderError` when the folder holds other edits; it is intact then.
        """
        path = Path(directory).resolve()
        contents = folder.Contents(
            self.base, self.config, self.sketches, self.journal, self._saved.get(path)
        )
        folder.save(path, contents)
        self._saved[path] = contents.digest

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "HookSet":
        """Read what `save_pretrained` wrote, after checking every file's checksum.

        Raises `FolderError` and its kinds: missing, corrupt, or of a newer format.
        """
        contents = folder.load(Path(directory))
        hooks = cls(contents.base, contents.config, contents.sketches, contents.journal)
        hooks._saved[Path(directory).resolve()] = contents.digest
        return hooks
