"""The paper's gate: the difference norm, standardised over one sequence (Eq. 16-20)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from coachhook.hooks.gates.gate import Evidence, Gate, LayerEdits, PassWatcher, Threshold
from coachhook_kernels import Delta, difference_norm, hook_linear_sequence, sequence_zscore

# Margin between α and the lowest z-score of an edit: in another batch the same token rounds
# differently.
_ROUNDING = 1e-3


class SequenceMask:
    """Forward pre-hook of a base model that records which tokens of a pass are real, for gates.

    parameters: names of the base model's forward parameters, in order.
    """

    def __init__(self, parameters: Sequence[str] = ()) -> None:
        self.parameters = tuple(parameters)
        self.mask: Tensor | None = None
        self.batch: int | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(self.parameters, args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        self.batch = inputs.shape[0] if isinstance(inputs, Tensor) else None

    def of(self, leading: Sequence[int]) -> tuple[tuple[int, int], Tensor | None]:
        """The shape `(b, t)` of a pass whose keys have leading shape `leading`, and the bool mask
        `(b, t)` of its real tokens (None: all are). Some architectures flatten batch and sequence
        before the FFN, and a pass with a KV cache brings only the last `t` tokens."""
        batch = self.batch if self.mask is None else self.mask.shape[0]
        if batch is None:
            batch = leading[0] if len(leading) > 1 else 1
        length = math.prod(leading) // max(batch, 1)
        if self.mask is None:
            return (batch, length), None
        return (batch, length), self.mask[:, self.mask.shape[1] - length :].bool()


class SequenceGate(Gate):
    """The paper's gate: z-score of `‖Δ k‖` over the real tokens of the same sequence."""

    name = "sequence"
    compared = "z"
    watcher: SequenceMask

    def __init__(self, threshold: Threshold, watcher: SequenceMask) -> None:
        super().__init__(threshold, watcher)

    @classmethod
    def build(
        cls, threshold: Threshold, edits: LayerEdits, watcher: PassWatcher | None = None
    ) -> "SequenceGate":
        return cls(threshold, watcher if isinstance(watcher, SequenceMask) else SequenceMask())

    @classmethod
    def watch(cls, parameters: Sequence[str]) -> SequenceMask:
        return SequenceMask(parameters)

    @classmethod
    def choose(cls, evidence: Evidence) -> Threshold:
        """The paper's rule: the minimum of `sequence_alpha`, the previous α and the lowest z-score
        of this batch's edits."""
        delta = evidence.delta_in_force()

        def zscores(keys: Tensor, mask: Tensor) -> Tensor:
            return sequence_zscore(difference_norm(delta.project(keys)), mask)

        z = evidence.at_subjects(zscores)
        reachable = z[~z.isnan()]
        alphas = [evidence.settings.sequence_alpha]
        alphas += [] if evidence.before is None else [evidence.before.alpha]
        alphas += [reachable.min().item() - _ROUNDING] if len(reachable) else []
        return Threshold(alpha=min(alphas))

    def passes(self, rows: int) -> Iterator[None]:
        """Sequences of each length whose statistics a kernel reads otherwise, without a mask and
        with one."""
        before = self.watcher.mask, self.watcher.batch
        lengths = {rows, *(length for length in (16, 128) if rows % length == 0)}
        try:
            for batch in (rows // length for length in lengths):
                mask = torch.ones(batch, rows // batch, dtype=torch.bool, device=self.alpha.device)
                for given in (None, mask):
                    self.watcher.mask, self.watcher.batch = given, batch
                    yield
        finally:
            self.watcher.mask, self.watcher.batch = before

    def standardise(
        self, projected: Tensor, sketch: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        score = difference_norm(projected)
        shape, mask = self.watcher.of(score.shape)
        norms = score.reshape(shape)
        mask = torch.ones_like(norms, dtype=torch.bool) if mask is None else mask
        z = sequence_zscore(norms, mask).reshape(score.shape)
        return score, z, torch.full_like(score, -1, dtype=torch.long)

    def fused(self, keys: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta) -> Tensor:
        shape, mask = self.watcher.of(keys.shape[:-1])
        if shape[1] == 1:
            # A lone token has no z-score to open the gate: Δ need not be read.
            return linear(keys, weight, bias)
        sequences = keys.reshape(*shape, keys.shape[-1])
        output, _, _ = hook_linear_sequence(sequences, weight, bias, delta, mask, self.alpha)
        return output.reshape(*keys.shape[:-1], output.shape[-1])
