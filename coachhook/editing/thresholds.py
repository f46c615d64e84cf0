"""The threshold of a layer's gate after a batch."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coachhook.editing.contexts import Contexts
from coachhook.editing.layer_writer import LayerWriter
from coachhook.hooks.gates import CalibratedGate, KeyedGate, Threshold
from coachhook.hooks.layer import HookLinear
from coachhook.hookset import HookSet
from coachhook_kernels import difference_norm, sequence_zscore

_ROUNDING = 1e-3


def threshold(
    hooks: HookSet,
    model: Any,
    layer: int,
    hook: HookLinear,
    writer: LayerWriter,
    contexts: Contexts,
    rate: float,
) -> Threshold:
    """The threshold of a layer whose Δ and fingerprints are now those of the whole journal."""
    if hooks.config.gate == KeyedGate.name:
        scores = writer.background_scores.of(hooks.journal, layer)
        if scores is None:
            return Threshold()
        found = Threshold.above(scores, rate)
        least = (hooks.config.resemblance - found.mean) / found.std
        return replace(found, alpha=max(found.alpha, least))
    if hooks.config.gate == CalibratedGate.name:
        # Disabled edits too: they may come back, and must then find their threshold.
        delta = hooks.journal.delta(layer, hooks.base.shapes[layer])
        delta = delta.to(hook.down.dtype, hook.down.device)
        pieces = writer.background.split(4096)
        norms = [difference_norm(delta.project(p.to(delta.down.device))) for p in pieces]
        return Threshold.above(torch.cat(norms).cpu(), rate, hooks.config.calibrated_alpha)

    def zscores(hook: HookLinear, keys: Tensor, rows: slice) -> Tensor:
        norms = difference_norm(hook.delta.project(keys))
        return sequence_zscore(norms, contexts.padded.mask[rows].bool().to(norms.device))

    (z,), _ = contexts.read(model, [hook], hooks.config.values.tokens, what=zscores)
    at_subject = z[: contexts.n_requests]
    reachable = at_subject[~at_subject.isnan()]
    alphas = [hooks.config.sequence_alpha]
    alphas += [b.thresholds[layer].alpha for b in hooks.journal.batches[-2:-1]]
    # The paper's rule: α falls to the least z-score of any edit, batch after batch; a little below
    # it, because the same token in another batch rounds otherwise.
    alphas += [reachable.min().item() - _ROUNDING] if len(reachable) else []
    return Threshold(alpha=min(alphas))
