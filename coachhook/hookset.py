"""`HookSet`: all hooks of one edited model; attaching, detaching, switching and saving them."""

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4

from torch import Tensor, nn

from coachhook.config import EditConfig
from coachhook.errors import (
    AttachError,
    BaseModelMismatchError,
    CompactedError,
    ConfigError,
)
from coachhook.facts.request import EditRequest
from coachhook.hooks.layer import HookLinear, HookState
from coachhook.hooks.memory import MemoryHook
from coachhook.hooks.trace import Trace, trace_text
from coachhook.journal.journal import EditRecord, Journal
from coachhook.models.base import BaseModel, weight_checksums
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import plainly
from coachhook.readouts import READOUTS
from coachhook.storage import folder

logger = logging.getLogger(__name__)


class HookSet:
    """Hooks for the layers of one base model, derived from the journal of all batches.

    sketches: by layer `(F, offset)`, see `KeyedGate`. One set can be attached to several copies of
    its base model, in any dtype and on any device, and to a model that processes share (tensor
    parallelism): every process then has its own set and makes the same calls. A set that is never
    saved keeps every batch in memory; a saved set keeps only what its hooks need.
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
        readout = READOUTS[config.readout]
        self.readout = readout(base, config, self.sketches, self.journal)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HookSet":
        """A set of its own, attached to no model: hooks tell by their set which to detach."""
        return HookSet(
            deepcopy(self.base, memo),
            deepcopy(self.config, memo),
            deepcopy(self.sketches, memo),
            deepcopy(self.journal, memo),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return self.base.layers

    @property
    def edits(self) -> list[EditRecord]:
        """Every edit of the journal, in order."""
        return self.journal.edits()

    @plainly()
    def attach(self, model: nn.Module, *, check: bool = True) -> nn.Module:
        """Put the hooks on `model`, in place; its weights are shared, not changed.

        check: compare the checksum of the hooked weights. Turn it off for a quantised copy of the
        base model, whose weights cannot be compared. Returns `model`. Raises
        `BaseModelMismatchError` if it is another model; `AttachError` if it already has hooks, or
        if processes share it and attach different hooks, or in a way that hooks cannot follow.
        """
        if any(isinstance(module, HookLinear | MemoryHook) for module in model.modules()):
            raise AttachError(
                f"this {type(model).__name__} already has hooks attached; detach those first"
            )
        self.readout.check(model)
        if check:
            self.check_base(model)
        self.readout.attach(model, self._owner)
        self._attached.append(weakref.ref(model))
        return model

    def detach(self, model: nn.Module | None = None) -> None:
        """Take the hooks off `model`, or off every model; the original modules are put back."""
        models = [ref() for ref in self._attached] if model is None else [model]
        for hooked in (m for m in models if m is not None):
            self.readout.detach(hooked, self._owner)
        self._attached = [r for r in self._attached if r() is not None and r() not in models]

    @contextmanager
    def attached(self, model: nn.Module, *, check: bool = True) -> Iterator[nn.Module]:
        """Attach the hooks to `model` inside the block only."""
        self.attach(model, check=check)
        try:
            yield model
        finally:
            self.detach(model)

    @contextmanager
    def off(self, model: nn.Module) -> Iterator[nn.Module]:
        """Turn the hooks off inside the block: `model` acts unedited, the hooks stay attached."""
        hooks = self.modules(model).values()
        states = [hook.state for hook in hooks]
        for hook in hooks:
            hook.state = HookState.OFF
        try:
            yield model
        finally:
            for hook, state in zip(hooks, states, strict=True):
                hook.state = state

    def in_force(self) -> list[list[EditRequest]]:
        """By batch, the requests that are written, not superseded and enabled."""
        live = {edit.id for edit in self.journal.live()}
        return [
            [edit.request for edit in batch.edits if edit.id in live]
            for batch in self.journal.batches
        ]

    def modules(self, model: nn.Module) -> dict[int, Any]:
        """The hook of each layer on `model`: `HookLinear`, or under the memory readout the
        `MemoryHook` of the gate block. Raises `AttachError` if they are not attached."""
        hooks = self.readout.hooks(model)
        if len(hooks) < len(self.layers):
            raise AttachError("the hooks are not attached to this model; attach them first")
        return dict(hooks)

    def warm_up(self, model: nn.Module, most_rows: int = 4096) -> None:
        """Run every hook on zeros of up to `most_rows` tokens, so that on a GPU no kernel is left
        to compile when the model serves, however many edits follow: until Δ, with its rank, turns
        from factors to dense; warm up again then. Each is compiled once for all models of these
        shapes. Raises `AttachError` if the hooks are not attached, `ConfigError` for a number of
        tokens below 1."""
        if type(most_rows) is not int or most_rows < 1:
            raise ConfigError(f"most_rows must be a whole number from 1, not {most_rows!r}")
        for hook in self.modules(model).values():
            hook.warm_up(most_rows)

    def trace(self, model: Any, tokenizer: Any, text: str) -> Trace:
        """Run `text` and record, per token and hooked layer: score, threshold, whether the gate
        opened, and for which edit. Raises `AttachError` if the hooks are not attached."""
        return trace_text(LanguageModel(model, tokenizer), self.modules(model), text)

    def enable(self, edit: int) -> None:
        """Enable an edit (by id) again, on every model the hooks are attached to."""
        self._switch(edit, True)

    def disable(self, edit: int) -> None:
        """Disable an edit (by id). The keyed gate then ignores its fingerprints. Under the other
        gates its share is taken out of Δ, which does not undo what later batches built on it."""
        self._switch(edit, False)

    def _switch(self, edit: int, enabled: bool) -> None:
        edits = self.edits
        if type(edit) is not int or not 0 <= edit < len(edits):
            raise ConfigError(f"there is no edit {edit!r}; this set has {len(edits)}, from 0")
        models = [model for model in (ref() for ref in self._attached) if model is not None]
        for model in models:
            self.modules(model)
        if not self.readout.tells_edits_apart:
            self._take_in_or_out(edits[edit], enabled)
            return
        edits[edit].enabled = enabled
        for model in models:
            self.readout.switch(model)
        for other in self.readout.unsaid():
            if other.request.subject == edits[edit].request.subject:
                logger.warning(
                    "edit %d (%r) is not said: facts of one subject share a row, and no row says "
                    "just those that are now in force; edit it again",
                    other.id,
                    other.request.prompt[:80],
                )

    def _take_in_or_out(self, edit: EditRecord, enabled: bool) -> None:
        """Add an edit's own share to Δ or take it out. Raises `CompactedError` if it is merged."""
        if edit.id < self.journal.n_merged_edits:
            raise CompactedError(
                f"edit {edit.id} was merged with others by compact, and under the "
                f"{self.config.gate} gate its own share of Δ is needed to switch it"
            )
        before, edit.enabled = edit.enabled, enabled
        try:
            self.refresh()
        except BaseException:
            edit.enabled = before
            raise

    @plainly()
    def compact(self, keep: int = 0) -> None:
        """Merge all batches but the last `keep` into one. Per layer it holds a Δ and the keys or
        their Gram matrix, of bounded size, besides the records and fingerprints of all edits.

        The hooks' outputs stay the same, bit for bit, and editing can go on. Every edit keeps its
        record, its verdict and its fingerprints. But there is no way back to a batch before the
        last merged one, and under gates other than the keyed gate, merged edits can no longer be
        enabled or disabled. A folder is compacted at the next `save_pretrained`.

        Raises `ConfigError` for a negative `keep`, `CorruptFolderError` if a file with factors is
        missing; nothing has changed then.
        """
        if type(keep) is not int or keep < 0:
            raise ConfigError(f"cannot keep {keep!r} batches; give 0 or more")
        self.readout.merge(keep)

    @plainly()
    def refresh(self, layers: Sequence[int] | None = None) -> None:
        """Update the hooks on all attached models from the journal. layers: None for all."""
        wanted = [layer for layer in self.layers if layers is None or layer in layers]
        for model in (ref() for ref in self._attached):
            if model is not None:
                self.modules(model)
                self.readout.refresh(model, wanted)

    def check_base(self, model: nn.Module) -> None:
        """Raise `BaseModelMismatchError` unless the weights of `model` that identify it are the
        base model's."""
        checksums = weight_checksums(self.readout.weights(model))
        if not set(checksums.items()) & set(self.base.checksums.items()):
            raise BaseModelMismatchError(
                f"these hooks were made for {self.base.name!r} with checksum "
                f"{self.base.checksums['bfloat16'][:16]}, but the model's is "
                f"{checksums['bfloat16'][:16]}; attach them to the model they were made for "
                "(with check=False if this is a quantised copy of it)"
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write `hook_config.json` and one safetensors file per batch, atomically.

        Batches that the folder already holds are not written again. From then on the factors of all
        batches are read from the folder when needed, and no longer kept in memory.

        Raises `SaveError` if writing fails, `FolderLockedError` if another process is editing the
        folder, `FolderError` if it holds other edits; it is intact then.
        """
        path = Path(directory).resolve()
        contents = folder.Contents(
            self.base, self.config, self.sketches, self.journal, self._saved.get(path)
        )
        folder.save(path, contents)
        self._saved[path] = contents.digest

    def follow(self, directory: str | Path) -> None:
        """Read the factors of all batches from a folder that another process of the job has just
        saved with the same edits, and no longer keep them in memory."""
        folder.follow(Path(directory).resolve(), self.journal)

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "HookSet":
        """Read what `save_pretrained` wrote, after checking every file's checksum. The factors of
        batches stay in the folder until `attach` needs them.

        Raises `FolderError` if there are no hooks, or one of its subclasses if they are corrupt or
        of a newer or older format.
        """
        contents = folder.load(Path(directory))
        hooks = cls(contents.base, contents.config, contents.sketches, contents.journal)
        hooks._saved[Path(directory).resolve()] = contents.digest
        return hooks
