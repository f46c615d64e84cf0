"""Writing one batch of target values into the hooked layers, from the lowest up.

The residual is spread over the layers: each takes an equal share of what is still missing at the
output of the last one, and keys and residual are collected again after each (design section 2).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from coachhook.config import EditConfig
from coachhook.editing.background_scores import BackgroundScores
from coachhook.editing.inverse import RecursiveInverse, whitening_sketch
from coachhook.errors import ModelError
from coachhook.facts.request import EditRequest
from coachhook.hooks.gates import CalibratedGate, KeyedGate, Threshold
from coachhook.hooks.layer import HookLinear, HookState
from coachhook.hookset import HookSet
from coachhook.journal.journal import Batch, EditRecord, LayerFactors, Verdict
from coachhook.models.architecture import Architecture
from coachhook.models.passes import in_parts, input_device, read_pass
from coachhook.models.tokens import Padded, encode_request, pad
from coachhook.statistics.measure import LayerStatistics
from coachhook_kernels import difference_norm, sequence_zscore

# A fingerprint that ordinary tokens resemble more than this (cosine, at the allowed rate of false
# alarms) is no fingerprint: attention sinks, the keys of first tokens, reach 1.
_DISTINCT = 0.8

# A key with at least this cosine to those of more than that share of first words is an attention
# sink; in few dimensions it takes more.
_SINK, _SINK_SHARE = 0.62, 0.01

_ROUNDING = 1e-3

# Fingerprints that are compared with all background keys at a time.
_CHUNK = 256

SINK_REASON = (
    "the subject is the first token of the prompt, where every text has the same key (an attention "
    "sink); let other words precede it"
)


def _fingerprint(keys: Tensor, projection: Tensor, offset: Tensor) -> Tensor:
    return normalize(keys @ projection.T - offset, dim=-1)


def layer_sketch(
    statistics: LayerStatistics, config: EditConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Projection `(s, d_in)` and offset `(s,)` of a layer's fingerprints, float32 on the CPU.

    device: where the whitening is computed, in float64.
    """
    projection = whitening_sketch(
        statistics.moment, config.preservation, config.fingerprint_size, seed=0, device=device
    )
    return projection, (statistics.background.float() @ projection.T).mean(0)


@dataclass
class LayerWriter:
    """What writing into one layer needs: its inverse, its sketch, and background keys.

    background bfloat16 `(m, d_in)`; sketched float32 `(m, s)`: their unit-norm sketches; first:
    unit-norm sketches of first words, float32 `(f, s)`.
    """

    solver: RecursiveInverse
    projection: Tensor
    offset: Tensor
    background: Tensor
    sketched: Tensor
    first: Tensor

    def __post_init__(self) -> None:
        self.background_scores = BackgroundScores(self.sketched)

    @classmethod
    def of(
        cls,
        statistics: LayerStatistics,
        config: EditConfig,
        sketch: tuple[Tensor, Tensor],
        solver: RecursiveInverse,
    ) -> "LayerWriter":
        """From a layer's statistics, the sketch of its hook set, and its inverse.

        sketch: projection `(s, d_in)` and offset `(s,)`, float32 on the CPU.
        """
        projection, offset = sketch
        # Of a small vocabulary the same word was drawn many times.
        first = statistics.first.float().unique(dim=0)
        return cls(
            solver=solver,
            projection=projection,
            offset=offset,
            background=statistics.background,
            sketched=_fingerprint(statistics.background.float(), projection, offset),
            first=_fingerprint(first, projection, offset),
        )

    def fingerprint(self, keys: Tensor) -> Tensor:
        """Unit-norm sketches `(n, s)` of keys `(n, d_in)`."""
        return _fingerprint(keys, self.projection, self.offset)

    def sinks(self, fingerprints: Tensor) -> Tensor:
        """Which fingerprints `(n, s)` are also those of some first words, whatever these are, bool
        `(n,)`. Not those of first tokens alone: the sink may be a token or two further on."""
        # The cosine of unrelated directions has a deviation of 1 / √s.
        least = max(_SINK, min(3 / math.sqrt(fingerprints.shape[1]), 0.95))
        alike = (self.first @ fingerprints.T >= least).sum(0)
        # One of them may be the subject's own word.
        return alike > max(1, _SINK_SHARE * len(self.first))

    def distinct(self, fingerprints: Tensor, rate: float) -> Tensor:
        """Which fingerprints `(n, s)` stand out from ordinary tokens and first words, `(n,)`."""
        allowed = int(rate * len(self.sketched))
        # In parts: a large batch against all of the background need not fit in memory.
        ceilings = [
            (self.sketched @ some.T).topk(allowed + 1, dim=0).values[-1]
            for some in fingerprints.split(_CHUNK)
        ]
        return (torch.cat(ceilings) < _DISTINCT) & ~self.sinks(fingerprints)


@dataclass(frozen=True)
class Contexts:
    """The texts an edit's keys are taken from: every bare prompt, then every prefixed one."""

    padded: Padded
    n_requests: int

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, requests: Sequence[EditRequest], contexts: Sequence[str]
    ) -> "Contexts":
        rows = [
            encode_request(tokenizer, request, text, with_target=False)
            for text in ("{}", *contexts)
            for request in requests
        ]
        return cls(pad(rows, tokenizer.pad_token_id, input_device(model)), len(requests))

    def subject_mask(self) -> Tensor:
        """Where each row's subject ends, bool `(b, t)`."""
        columns = torch.arange(self.padded.ids.shape[1], device=self.padded.ids.device)
        return columns == self.padded.subject[:, None]

    def read(
        self,
        model: Any,
        hooks: Sequence[HookLinear],
        tokens: int,
        *,
        block: nn.Module | None = None,
        temporary: Sequence[HookLinear] = (),
        what: Callable[[HookLinear, Tensor, slice], Tensor] = lambda _, keys, __: keys,
    ) -> tuple[list[Tensor], Tensor | None]:
        """At each row's subject, on the CPU: for every hook its keys `(b, d_in)`, or what `what`
        makes of its keys `(b', t, d_in)` in some rows; the output of `block`, float32 `(b, d)`.

        temporary: hooks that correct the subjects alone. tokens: how many are read at once.
        """
        mask, inputs = self.subject_mask(), self.padded.inputs()

        def some(rows: slice) -> tuple[list[Tensor], Tensor | None]:
            here = mask[rows]
            for hook in temporary:
                hook.open_at = here.to(hook.down.device)
            part = {name: tensor[rows] for name, tensor in inputs.items()}
            keys, output = read_pass(model, part, hooks, block)
            values = [what(hook, k, rows) for hook, k in zip(hooks, keys, strict=True)]
            found = [value[here.to(value.device)].cpu() for value in values]
            return found, None if output is None else output[here.to(output.device)].float().cpu()

        try:
            parts = in_parts(some, len(mask), max(1, tokens // mask.shape[1]))
        finally:
            for hook in temporary:
                hook.open_at = None
        outputs = [output for _, output in parts if output is not None]
        by_hook = [torch.cat(pieces) for pieces in zip(*(found for found, _ in parts), strict=True)]
        return by_hook, torch.cat(outputs) if outputs else None


def write_batch(
    model: Any,
    tokenizer: Any,
    hooks: HookSet,
    writers: dict[int, LayerWriter],
    batch: Batch,
    values: Tensor,
) -> None:
    """Fill `batch`, already the last of the attached hooks' journal, with factors and thresholds.

    values float32 `(n, d)`: wanted outputs of the last hooked block at the subjects of the n edits
    that are not refused.
    """
    architecture = Architecture(hooks.base.template)
    accepted = [i for i, edit in enumerate(batch.edits) if edit.verdict is not Verdict.REFUSED]
    requests = [batch.edits[i].request for i in accepted]
    contexts = Contexts.of(model, tokenizer, requests, hooks.config.values.contexts)
    modules = hooks.modules(model)
    last_block = architecture.blocks(model)[hooks.layers[-1]]
    rate = hooks.config.false_alarms / len(hooks.layers)
    tokens = hooks.config.values.tokens
    values = values.cpu()
    try:
        for hook in modules.values():
            hook.state = HookState.TEMPORARY
        for done, layer in enumerate(hooks.layers):
            hook, writer = modules[layer], writers[layer]
            (keys,), reached = contexts.read(
                model, [hook], tokens, block=last_block, temporary=list(modules.values())
            )
            assert reached is not None
            missing = (values - reached[: len(requests)]) / (len(hooks.layers) - done)
            if not missing.isfinite().all():
                raise ModelError(
                    f"what layer {layer} should add is not finite; load the model in a wider dtype"
                )
            factors = _solve(writer, keys.float(), missing, hooks.config, rate)
            batch.layers[layer] = factors.spread(torch.tensor(accepted), len(batch.edits))
            batch.thresholds[layer] = Threshold()
            hooks.refresh([layer])
            batch.thresholds[layer] = threshold(hooks, model, layer, hook, writer, contexts, rate)
            hooks.refresh([layer])
            hook.state = HookState.VALIDATED
    finally:
        for hook in modules.values():
            hook.state = HookState.VALIDATED


def refuse_sinks(
    model: Any,
    tokenizer: Any,
    hooks: HookSet,
    writers: dict[int, LayerWriter],
    edits: Sequence[EditRecord],
) -> None:
    """Refuse edits whose subject is a text's first token with the key that first tokens share."""
    contexts = Contexts.of(model, tokenizer, [edit.request for edit in edits], ())
    starts = (contexts.padded.subject == 0).nonzero().squeeze(-1).tolist()
    if not starts:
        return
    modules = hooks.modules(model)
    keys, _ = contexts.read(model, list(modules.values()), hooks.config.values.tokens)
    for layer, found in zip(modules, keys, strict=True):
        marks = writers[layer].fingerprint(found[starts].float())
        sinks = writers[layer].sinks(marks).tolist()
        for i, sink in zip(starts, sinks, strict=True):
            if sink:
                edits[i].verdict, edits[i].reason = Verdict.REFUSED, SINK_REASON


def _solve(
    writer: LayerWriter, keys: Tensor, residuals: Tensor, config: EditConfig, rate: float
) -> LayerFactors:
    """One layer's factors. keys `(c · n, d_in)`, bare prompts first; residuals `(n, d_out)`."""
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
    # A column of weight w is one of length √w, in the solve and in `C_accu`. Where the key of the
    # bare prompt is not written, those under the contexts stand in for it.
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
