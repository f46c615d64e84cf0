"""`Editor`: edits batches of facts into one model and reports which of them took."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from coachhook.config import EditConfig
from coachhook.editing.delta_writing import DeltaWriting
from coachhook.editing.layer_writer import layer_sketch
from coachhook.editing.memory_writing import MemoryWriting
from coachhook.editing.verdicts import judge
from coachhook.editing.writing import Wanted, Writing
from coachhook.errors import ConfigError, ModelError
from coachhook.facts.request import EditRequest, check_aliases, check_batch
from coachhook.hooks.tensor_parallel import is_sharded
from coachhook.hookset import HookSet
from coachhook.journal.journal import Batch, EditRecord, Journal, Verdict
from coachhook.models.architecture import (
    Architecture,
    check_layers,
    default_layers,
    memory_blocks,
)
from coachhook.models.base import BaseModel, weight_checksums
from coachhook.models.language_model import LanguageModel
from coachhook.models.loading import load_model, prepare_tokenizer
from coachhook.models.passes import eval_mode, plainly
from coachhook.models.placement import device_of
from coachhook.models.tokens import check_length, encode_request
from coachhook.readouts import READOUTS
from coachhook.statistics.measure import KeyStatistics, key_statistics
from coachhook.storage.batch_file import batch_from_bytes, batch_to_bytes
from coachhook.storage.folder import threshold_type
from coachhook.system.hardware import arithmetic_device
from coachhook.system.processes import ALONE, Processes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

WRITING: dict[str, Callable[..., Writing]] = {"delta": DeltaWriting, "memory": MemoryWriting}
# Whose inputs are the keys.
SITES = {"delta": "down_projection", "memory": "ffn"}


@dataclass(frozen=True)
class BatchReport:
    """How each request of a batch ended, in the order given; `number` counts batches from 1."""

    number: int
    edits: list[EditRecord]

    def count(self, verdict: Verdict) -> int:
        return sum(edit.verdict is verdict for edit in self.edits)


class Editor:
    """Edits facts into `model` through hooks, which stay attached to it while the editor is open.

    `model`, `tokenizer` and `hooks` are public. The model's own weights are never changed.

    With several `processes`, each has a copy of the model and an editor, and all call `edit` with
    the same requests: statistics and target values are shared out among them, the first process
    writes and judges each batch, and the others take it over. An error ends the whole job.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        hooks: HookSet,
        statistics: KeyStatistics,
        processes: Processes = ALONE,
    ) -> None:
        self._lm = LanguageModel(model, tokenizer)
        self.hooks = hooks
        self._processes = processes
        self._writing = WRITING[hooks.config.readout](self._lm, hooks, statistics, processes)
        hooks.attach(model)

    @classmethod
    @plainly()
    def from_pretrained(
        cls,
        model: Any,
        tokenizer: Any = None,
        *,
        config: EditConfig | None = None,
        statistics: KeyStatistics | None = None,
        processes: Processes = ALONE,
    ) -> Editor:
        """An editor without edits for `model`: "smollm2", a folder, a hub id, or a loaded model
        with its `tokenizer`. Key statistics are measured unless cached or given."""
        config = config or EditConfig()
        lm = _loaded(model, tokenizer)
        architecture = architecture_of(lm.model, config)
        config = placed(config, lm.model)
        layers = gate_layers(config, len(architecture.blocks(lm.model)))
        site = SITES[config.readout]
        if statistics is None:
            statistics = key_statistics(
                lm, architecture, layers, config.statistics, processes, site=site
            )
        base = BaseModel(
            name=name_of(model),
            checksums={},
            template=architecture.template,
            shapes={
                layer: (
                    statistics[layer].moment.shape[0],
                    lm.model.config.get_text_config().hidden_size,
                )
                for layer in layers
            },
        )
        readout = READOUTS[config.readout](base, config, {}, Journal())
        base = replace(base, checksums=weight_checksums(readout.weights(lm.model)))
        sketches = {}
        for layer in layers:
            at = architecture.blocks(lm.model)[layer]
            device = arithmetic_device(config.inverse_device, device_of(at))
            sketches[layer] = layer_sketch(statistics[layer], config, device)
        return cls(*lm, HookSet(base, config, sketches), statistics, processes)

    @classmethod
    @plainly()
    def resume(
        cls,
        directory: str | Path,
        model: Any = None,
        tokenizer: Any = None,
        *,
        statistics: KeyStatistics | None = None,
        processes: Processes = ALONE,
    ) -> Editor:
        """The editor that wrote `directory`, ready for its next batch.

        The model is loaded by the name in the folder unless it is given.
        """
        hooks = HookSet.from_pretrained(directory)
        lm = _loaded(hooks.base.name if model is None else model, tokenizer)
        # Before the statistics, which take a while.
        hooks.check_base(lm.model)
        architecture = Architecture(hooks.base.template)
        if statistics is None:
            statistics = key_statistics(
                lm,
                architecture,
                hooks.layers,
                hooks.config.statistics,
                processes,
                site=SITES[hooks.config.readout],
            )
        return cls(*lm, hooks, statistics, processes)

    @property
    def model(self) -> PreTrainedModel:
        return self._lm.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self._lm.tokenizer

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the hooks, with all that `resume` needs. See `HookSet.save_pretrained`.

        With several processes, all of them must call it; the first one writes.
        """
        if self._processes.is_first:
            self.hooks.save_pretrained(directory)
        self._processes.everyone(True)
        if not self._processes.is_first:
            self.hooks.follow(directory)

    @plainly()
    def edit(self, requests: Sequence[EditRequest], values: Tensor | None = None) -> BatchReport:
        """Edit one batch of facts. If anything fails on the way, the whole batch is undone.

        values: one for each distinct request; by default they are optimised now. Under the delta
        readout float32 `(n, d)`, wanted outputs of the last hooked block (`optimise_values`); under
        the memory readout `(n, w, d)`, what is added after each of the w write blocks
        (`optimise_shifts`).

        Raises `RequestError` or a subclass for unusable requests and `ConfigError` for values of
        another shape, before any work is done.
        """
        requests = check_batch(requests)
        self.check(requests)
        shape = self._writing.shape(len(requests))
        if values is not None and values.shape != shape:
            raise ConfigError(
                f"values of shape {tuple(values.shape)} do not fit the batch, which needs {shape}: "
                "one row for each of its distinct requests"
            )
        journal = self.hooks.journal
        first = len(self.hooks.edits)
        batch = Batch([EditRecord(first + i, r) for i, r in enumerate(requests)], {}, {})
        with eval_mode(self.model):
            if self._processes.is_first:
                self._writing.refuse(batch.edits)
            self._share_verdicts(batch.edits)
            usable = [i for i, e in enumerate(batch.edits) if e.verdict is not Verdict.REFUSED]
            wanted = None
            if usable:
                chosen = [requests[i] for i in usable]
                wanted = self._writing.values(chosen) if values is None else Wanted(values[usable])
            try:
                if self._processes.is_first:
                    journal.batches.append(batch)
                    self._write(batch, wanted)
                if self._processes.size > 1:
                    batch = self._of_first(batch)
                self._writing.absorb(batch)
            except BaseException:
                if journal.batches and journal.batches[-1] is batch:
                    journal.batches.pop()
                    self.hooks.refresh()
                # Some layers may have absorbed the batch's keys.
                self._writing.forget()
                raise
        return BatchReport(len(journal.batches), batch.edits)

    @plainly()
    def rollback(self, batch: int) -> None:
        """Forget every batch after number `batch`; 0 forgets them all.

        Raises `ConfigError` for a number that is no batch, and `CompactedError` for a batch before
        the last that `compact` merged.
        """
        if type(batch) is not int or not 0 <= batch <= len(self.hooks.journal.batches):
            raise ConfigError(
                f"there is no batch {batch!r}; this editor has {len(self.hooks.journal.batches)}"
            )
        journal = self.hooks.journal
        forgotten = journal.batches[batch:]
        journal.forget_after(batch)
        try:
            self.hooks.refresh()
        except BaseException:
            journal.batches += forgotten
            raise
        self._writing.forget()

    def close(self) -> None:
        """Take the hooks off the model, which is then bit for bit what it was before."""
        self.hooks.detach(self.model)

    def __enter__(self) -> Editor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Raise `RequestError` or a subclass if a request does not fit the tokenizer or context."""
        check_aliases(requests, [edit.request for edit in self.hooks.journal.live()])
        limit = self._lm.context_length
        for request in requests:
            for context in ("{}", *self.hooks.config.values.contexts):
                row = encode_request(self.tokenizer, request, context)
                check_length(row, limit, f"prompt {request.prompt[:80]!r}")

    def sinks(self, requests: Sequence[EditRequest]) -> list[EditRequest]:
        """The requests that `edit` refuses, because their subject is the text's first token, whose
        key all first tokens share. A prompt with words before the subject may work."""
        records = [EditRecord(i, request) for i, request in enumerate(requests)]
        with eval_mode(self.model):
            self._writing.refuse(records)
        return [record.request for record in records if record.verdict is Verdict.REFUSED]

    def _share_verdicts(self, edits: Sequence[EditRecord]) -> None:
        """Copy to every process the verdicts of the first, which refuses edits before any work."""
        refused = [[edit.verdict, edit.reason] for edit in edits]
        known = json.loads(self._processes.broadcast_bytes(json.dumps(refused).encode()))
        for edit, (verdict, reason) in zip(edits, known, strict=True):
            edit.verdict, edit.reason = Verdict(verdict), reason

    def _of_first(self, batch: Batch) -> Batch:
        """The batch as the first process wrote it, in force in every process."""
        first = self._processes.is_first
        data = self._processes.broadcast_bytes(batch_to_bytes(batch) if first else b"")
        if not first:
            threshold = threshold_type(self.hooks.config)
            batch = batch_from_bytes(self.hooks.layers, data, threshold)
            self.hooks.journal.batches.append(batch)
            self.hooks.refresh()
        return batch

    def _write(self, batch: Batch, wanted: Wanted | None) -> None:
        """Write `batch`, the last of the journal, and judge it."""
        if wanted is None:
            self._writing.write_nothing(batch)
            return
        self._writing.write(batch, wanted)
        judge(self._lm, self.hooks, batch)


def name_of(model: Any) -> str:
    """The name that `resume` will load the model by, from any working directory."""
    loaded = not isinstance(model, str | Path)
    name = (model.config._name_or_path or type(model).__name__) if loaded else model
    return str(Path(name).resolve()) if Path(name).is_dir() else str(name)


def _loaded(model: Any, tokenizer: Any) -> LanguageModel:
    if isinstance(model, str | Path):
        return load_model(model)
    if not hasattr(model, "config"):
        raise ModelError(
            f"{type(model).__name__} is not a model; give a name, a folder, or a loaded model"
        )
    if is_sharded(model):
        raise ModelError(
            "processes share this model's weights, and editing needs all of them in one; edit a "
            "copy of it in one process, save, and attach the hooks here: "
            "HookSet.from_pretrained(folder).attach(model)"
        )
    if tokenizer is None:
        raise ModelError("a model that is already loaded needs its tokenizer as well; pass both")
    return LanguageModel(model, prepare_tokenizer(tokenizer))


def architecture_of(model: Any, config: EditConfig) -> Architecture:
    """Where `model` keeps what the readout of `config` needs. Raises `ArchitectureError`."""
    of = Architecture.of_blocks if config.readout == "memory" else Architecture.of
    return of(model, config.template)


def placed(config: EditConfig, model: Any) -> EditConfig:
    """The configuration with the blocks of the memory readout chosen for `model`. Raises
    `ConfigError` for blocks that it does not have."""
    if config.readout != "memory":
        return config
    n_blocks = len(architecture_of(model, config).blocks(model))
    gate, written = memory_blocks(n_blocks)
    memory = config.memory
    gate = gate if memory.gate_block is None else memory.gate_block
    blocks = written if memory.write_blocks is None else memory.write_blocks
    check_layers([gate, *blocks], n_blocks)
    return replace(config, memory=replace(memory, gate_block=gate, write_blocks=blocks))


def gate_layers(config: EditConfig, n_blocks: int) -> tuple[int, ...]:
    """The layers whose keys the gates read."""
    if config.memory.gate_block is not None and config.readout == "memory":
        return (config.memory.gate_block,)
    return check_layers(config.layers or default_layers(n_blocks), n_blocks)
