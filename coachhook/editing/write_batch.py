"""Writing one batch of target values into the hooked layers, from the lowest up.

The residual is spread over the layers: each remaining layer takes an equal share of what is still
missing at the last layer's output, and keys and residual are read again before each layer
(csrc_notes/method.md, "Spreading over layers").
"""

import torch
from torch import Tensor

from coachhook.config import EditConfig
from coachhook.editing.contexts import Contexts
from coachhook.editing.layer_writer import LayerWriter
from coachhook.editing.thresholds import threshold
from coachhook.errors import ModelError
from coachhook.hooks.gates import Threshold
from coachhook.hooks.layer import HookState
from coachhook.hookset import HookSet
from coachhook.journal.factors import LayerFactors
from coachhook.journal.journal import Batch, Verdict
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel


def write_batch(
    lm: LanguageModel,
    hooks: HookSet,
    writers: dict[int, LayerWriter],
    batch: Batch,
    values: Tensor,
) -> None:
    """Fill `batch`, already the last in the attached hooks' journal, with factors and thresholds.

    values float32 `(n, d)`: wanted outputs of the last hooked block at the subjects of the n edits
    not refused. Raises `ModelError` for a residual that is not finite.
    """
    architecture = Architecture(hooks.base.template)
    accepted = [i for i, edit in enumerate(batch.edits) if edit.verdict is not Verdict.REFUSED]
    requests = [batch.edits[i].request for i in accepted]
    contexts = Contexts.of(lm, requests, hooks.config.values.contexts)
    modules = hooks.modules(lm.model)
    last_block = architecture.blocks(lm.model)[hooks.layers[-1]]
    rate = hooks.config.false_alarms / len(hooks.layers)
    tokens = hooks.config.values.tokens
    values = values.cpu()
    try:
        for hook in modules.values():
            hook.state = HookState.TEMPORARY
        for done, layer in enumerate(hooks.layers):
            hook, writer = modules[layer], writers[layer]
            (keys,), reached = contexts.read(
                lm.model, [hook], tokens, block=last_block, temporary=list(modules.values())
            )
            assert reached is not None
            missing = (values - reached[: len(requests)]) / (len(hooks.layers) - done)
            if not missing.isfinite().all():
                raise ModelError(
                    f"the residual of layer {layer} is not finite; load the model in a wider dtype"
                )
            factors = _solve(writer, keys.float(), missing, hooks.config, rate)
            batch.layers[layer] = factors.spread(torch.tensor(accepted), len(batch.edits))
            batch.thresholds[layer] = Threshold()
            hooks.refresh([layer])
            batch.thresholds[layer] = threshold(
                hooks, lm.model, layer, hook, writer, contexts, rate
            )
            hooks.refresh([layer])
            hook.state = HookState.VALIDATED
    finally:
        for hook in modules.values():
            hook.state = HookState.VALIDATED


def _solve(
    writer: LayerWriter, keys: Tensor, residuals: Tensor, config: EditConfig, rate: float
) -> LayerFactors:
    """One layer's factors, from keys `(c · n, d_in)`, bare prompts first, and residuals
    `(n, d_out)`."""
    n = len(residuals)
    # Two fingerprints an edit: the bare prompt's key, and the mean over the other contexts.
    by_context = keys.reshape(-1, n, keys.shape[1])
    marks = torch.cat([by_context[0], *([by_context[1:].mean(0)] if len(by_context) > 1 else [])])
    fingerprints = writer.fingerprint(marks)
    owner = torch.arange(len(marks)) % n
    marked = writer.distinct(fingerprints, rate)
    written = torch.zeros(n, dtype=torch.bool).index_fill(0, owner[marked], True)

    edit = torch.arange(len(keys)) % n
    kept = writer.distinct(writer.fingerprint(keys), rate) & written[edit]
    # A key of weight w is scaled by √w, in the solve and in `C_accu`. Where the bare prompt's key
    # is not kept, the keys read in the contexts stand in for it.
    lengths = torch.ones(len(keys), 1)
    lengths[n:][kept[edit[n:]]] = config.context_weight**0.5
    columns, edit, lengths = (keys * lengths)[kept], edit[kept], lengths[kept]
    solutions = torch.zeros(n, keys.shape[1], dtype=torch.float64)
    if len(columns):
        solved = writer.solver.solve(columns, config.fit).cpu()
        solutions.index_add_(0, edit, lengths * solved)
    return LayerFactors(
        residuals=torch.where(written[:, None], residuals, 0),
        solutions=solutions.float(),
        keys=columns,
        fingerprints=fingerprints[marked],
        owner=owner[marked],
    )
