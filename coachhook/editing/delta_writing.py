"""Writing under the paper's readout: target values at the last hooked layer, a solve in each."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from coachhook.editing.inverse import Earlier, RecursiveInverse
from coachhook.editing.layer_writer import LayerWriter
from coachhook.editing.sinks import refuse_sinks
from coachhook.editing.values import optimise_values
from coachhook.editing.write_batch import write_batch
from coachhook.editing.writing import Wanted
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import Threshold
from coachhook.hookset import HookSet
from coachhook.journal.factors import LayerFactors
from coachhook.journal.journal import Batch, EditRecord
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.placement import device_of
from coachhook.statistics.measure import KeyStatistics
from coachhook.system.hardware import arithmetic_device
from coachhook.system.processes import Processes
from coachhook.system.progress import track


class DeltaWriting:
    """See `Writing`."""

    def __init__(
        self, lm: LanguageModel, hooks: HookSet, statistics: KeyStatistics, processes: Processes
    ) -> None:
        self._lm, self._hooks, self._processes = lm, hooks, processes
        self._writers = _writers(lm.model, hooks, statistics) if processes.is_first else {}

    def shape(self, n: int) -> tuple[int, ...]:
        return n, self._lm.model.config.get_text_config().hidden_size

    def refuse(self, edits: Sequence[EditRecord]) -> None:
        refuse_sinks(self._lm, self._hooks, self._writers, edits)

    def values(self, requests: Sequence[EditRequest]) -> Wanted:
        hooks = self._hooks
        with track("target values", len(requests), shown=self._processes.is_first) as advance:
            found = optimise_values(
                self._lm,
                Architecture(hooks.base.template),
                hooks.layers[-1],
                requests,
                hooks.config.values,
                advance,
                self._processes,
            )
        return Wanted(found.hidden, found.loss)

    def write(self, batch: Batch, wanted: Wanted) -> None:
        write_batch(self._lm, self._hooks, self._writers, batch, wanted.values)

    def write_nothing(self, batch: Batch) -> None:
        earlier = self._hooks.journal.batches[:-1]
        for layer, shape in self._hooks.base.shapes.items():
            size = self._hooks.config.fingerprint_size
            batch.layers[layer] = LayerFactors.nothing(len(batch.edits), shape, size)
            batch.thresholds[layer] = earlier[-1].thresholds[layer] if earlier else Threshold()

    def absorb(self, batch: Batch) -> None:
        for layer, writer in self._writers.items():
            writer.solver.absorb(batch.layers[layer].keys)

    def forget(self) -> None:
        for writer in self._writers.values():
            writer.solver.forget()


def _writers(model: nn.Module, hooks: HookSet, statistics: KeyStatistics) -> dict[int, LayerWriter]:
    """Writers in the state after the last batch of the journal."""
    architecture = Architecture(hooks.base.template)
    config = hooks.config
    writers = {}
    with track("update inverses", len(hooks.layers)) as advance:
        for layer in hooks.layers:
            solver = RecursiveInverse(
                statistics[layer].moment,
                config.preservation,
                partial(_earlier, hooks, layer),
                device=arithmetic_device(
                    config.inverse_device, device_of(architecture.down_projection(model, layer))
                ),
                dtype=getattr(torch, config.inverse_dtype),
            )
            writers[layer] = LayerWriter.of(statistics[layer], hooks.sketches[layer], solver)
            advance(1)
    return writers


def _earlier(hooks: HookSet, layer: int) -> Earlier:
    return Earlier(hooks.journal.keys(layer), hooks.journal.gram(layer))
