"""The threshold of a layer's gate after a batch, and the evidence the gate chooses it by."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from coachhook.config import EditConfig
from coachhook.editing.contexts import Contexts
from coachhook.editing.layer_writer import LayerWriter
from coachhook.hooks.gates import GATES, Threshold
from coachhook.hooks.layer import HookLinear
from coachhook.hookset import HookSet
from coachhook_kernels import Delta


@dataclass(frozen=True)
class _Evidence:
    """See `coachhook.hooks.gates.gate.Evidence`."""

    hooks: HookSet
    model: nn.Module
    layer: int
    hook: HookLinear
    writer: LayerWriter
    contexts: Contexts
    rate: float

    @property
    def settings(self) -> EditConfig:
        return self.hooks.config

    @property
    def before(self) -> Threshold | None:
        batches = self.hooks.journal.batches
        return batches[-2].thresholds[self.layer] if len(batches) > 1 else None

    @property
    def background(self) -> Tensor:
        return self.writer.background

    def delta(self) -> Delta:
        delta = self.hooks.journal.delta(self.layer, self.hooks.base.shapes[self.layer])
        return delta.to(self.hook.down.dtype, self.hook.down.device)

    def delta_in_force(self) -> Delta:
        return self.hook.delta

    def nearest(self) -> Tensor | None:
        return self.writer.background_scores.of(self.hooks.journal, self.layer)

    def at_subjects(self, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        mask = self.contexts.padded.mask.bool()

        def some(_: HookLinear, keys: Tensor, rows: slice) -> Tensor:
            return read(keys, mask[rows].to(keys.device))

        tokens = self.settings.values.tokens
        (readings,), _ = self.contexts.read(self.model, [self.hook], tokens, what=some)
        return readings[: self.contexts.n_requests]


def threshold(
    hooks: HookSet,
    model: nn.Module,
    layer: int,
    hook: HookLinear,
    writer: LayerWriter,
    contexts: Contexts,
    rate: float,
) -> Threshold:
    """The threshold of a layer whose Δ and fingerprints already include the last batch."""
    gate = GATES[hooks.config.gate]
    return gate.choose(_Evidence(hooks, model, layer, hook, writer, contexts, rate))
