"""What all editors of a comparison share: model, layers, statistics, and how keys are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import coachhook as ch
from coachhook.editing.contexts import Contexts
from coachhook.evaluation.evaluate import Edits
from coachhook.models.architecture import Architecture, check_layers, default_layers
from coachhook.models.language_model import LanguageModel
from coachhook.statistics.measure import KeyStatistics, key_statistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Setting:
    """A loaded model, which an editor may change, and what is common to all editors.

    config: contexts, weights of keys, and layers, common to all editors. sinks: the requests whose
    subject is an attention sink, which the engine refuses. Editors that write at keys leave them
    out as well: their damage to all other text would drown the differences between editors.
    """

    lm: LanguageModel
    architecture: Architecture
    layers: tuple[int, ...]
    statistics: KeyStatistics
    config: ch.EditConfig
    sinks: frozenset[ch.EditRequest]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        config: ch.EditConfig,
        sinks: frozenset[ch.EditRequest] = frozenset(),
    ) -> Setting:
        architecture, layers = hooked_layers(lm.model, config)
        statistics = key_statistics(lm, architecture, layers, config.statistics)
        return cls(lm, architecture, layers, statistics, config, sinks)

    def accepted(
        self, requests: Sequence[ch.EditRequest], values: Tensor
    ) -> tuple[list[ch.EditRequest], Tensor]:
        """The requests that are not sinks, and their values."""
        chosen = [i for i, request in enumerate(requests) if request not in self.sinks]
        return [requests[i] for i in chosen], values[chosen]

    @property
    def last_block(self) -> Any:
        return self.architecture.blocks(self.lm.model)[self.layers[-1]]

    def down_projection(self, layer: int) -> Any:
        return self.architecture.down_projection(self.lm.model, layer)

    def contexts(self, requests: Sequence[ch.EditRequest]) -> Contexts:
        return Contexts.of(self.lm, requests, self.config.values.contexts)

    def read(self, contexts: Contexts, layer: int) -> tuple[Tensor, Tensor]:
        """At the subjects, with the model as it is now: the layer's keys `(c · n, d_in)`, bare
        prompts first, and the last hooked block's output behind bare prompts `(n, d)`."""
        (keys,), reached = contexts.read(
            self.lm.model,
            [self.down_projection(layer)],
            self.config.values.tokens,
            block=self.last_block,
        )
        assert reached is not None
        return keys.float(), reached[: contexts.n_requests]

    def weighted(self, keys: Tensor, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and residuals of the solve, weighted: those under contexts by `context_weight`."""
        n = len(residuals)
        lengths = torch.full((len(keys), 1), self.config.context_weight**0.5)
        lengths[:n] = 1
        return keys * lengths, residuals.repeat(len(keys) // n, 1) * lengths


def hooked_layers(
    model: PreTrainedModel, config: ch.EditConfig
) -> tuple[Architecture, tuple[int, ...]]:
    """The model's architecture, and the layers that all editors share."""
    architecture = Architecture.of(model, config.template)
    n_blocks = len(architecture.blocks(model))
    return architecture, check_layers(config.layers or default_layers(n_blocks), n_blocks)


class Editor(Protocol):
    """An editor under comparison, after any number of batches."""

    @property
    def edits(self) -> Edits:
        """The edits so far, which can be taken off the model."""
        ...

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        """One more batch. values float32 `(n, d)`: wanted outputs of the last hooked block."""
        ...

    def held(self) -> int:
        """Bytes that inference needs on top of the model's own."""
        ...


class InForce:
    """The requests in force, by batch: a later request replaces earlier ones of the same fact."""

    def __init__(self) -> None:
        self._batches: list[list[ch.EditRequest]] = []

    def add(self, requests: Sequence[ch.EditRequest]) -> None:
        facts = {request.fact for request in requests}
        self._batches = [[r for r in batch if r.fact not in facts] for batch in self._batches]
        self._batches.append(list(requests))

    def in_force(self) -> list[list[ch.EditRequest]]:
        return self._batches
