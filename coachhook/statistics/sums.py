"""Sums over the keys of a text's shards: the state of a pass over ordinary text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coachhook.errors import StatisticsError
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import read_pass
from coachhook.statistics.text import Shard, TokenBatch
from coachhook_kernels.key_covariance import key_covariance_

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Tokens of context that an error message quotes on either side.
_QUOTED = 8


@dataclass(frozen=True)
class KeyReader:
    """Reads keys of text. modules: the hooked down-projections by layer, lowest first."""

    lm: LanguageModel
    modules: Mapping[int, Any]

    def read(self, batch: TokenBatch) -> dict[int, Tensor]:
        """The keys of a batch by layer, `(b, t, d_in)` in the model's dtype, on the layer's device,
        from one pass that stops at the last hooked layer.

        Raises `StatisticsError`, naming layer, token and text, if a real token's key is not finite.
        """
        device = self.lm.device
        inputs = {"input_ids": batch.ids.to(device)}
        if batch.mask is not None:
            inputs["attention_mask"] = batch.mask.to(device, torch.long)
        keys, _ = read_pass(self.lm.model, inputs, inputs_of=list(self.modules.values()))
        by_layer = dict(zip(self.modules, keys, strict=True))
        for layer, rows in by_layer.items():
            _check_finite(rows, batch, self.lm.tokenizer, layer)
        return by_layer


@dataclass
class KeySums:
    """Sums over the keys of some shards.

    moments: `Σ k kᵀ` by layer, float32 `(d_in, d_in)`, only the upper triangle filled. shards: by
    number of each shard included, its count of tokens. background: by layer and shard, the shard's
    first keys, bfloat16 `(n, d_in)` on the CPU.
    """

    moments: dict[int, Tensor]
    shards: dict[int, int] = field(default_factory=dict)
    background: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def like(cls, keys: Mapping[int, Tensor], *, on_cpu: bool = False) -> KeySums:
        """Empty sums for keys of the widths of `keys`, on their devices or on the CPU."""
        return cls(
            {
                layer: torch.zeros(rows.shape[-1], rows.shape[-1], device=_at(rows, on_cpu))
                for layer, rows in keys.items()
            }
        )

    def add(
        self, reader: KeyReader, shard: Shard, batches: Sequence[TokenBatch], n_background: int
    ) -> None:
        """Add the keys of `shard`, whose text is `batches`; keep its first `n_background` keys.

        A batch that does not fit in GPU memory is read in halves. Raises `StatisticsError` for keys
        that are not finite; discard the sums then.
        """
        waiting = list(reversed(batches))
        kept: dict[int, list[Tensor]] = {layer: [] for layer in self.moments}
        while waiting:
            batch = waiting.pop()
            try:
                keys = reader.read(batch)
            except torch.OutOfMemoryError:
                if len(batch.ids) == 1:
                    raise
                waiting.extend(reversed(_halves(batch)))
                continue
            for layer, of_layer in keys.items():
                _add(self.moments[layer], of_layer, batch.mask)
                if n_background > 0:
                    kept[layer].append(_real(of_layer, batch.mask)[:n_background])
            n_background -= batch.ids.numel() if batch.mask is None else int(batch.mask.sum())
        self.shards[shard.number] = shard.n_tokens
        for layer, rows in kept.items():
            if rows:
                self.background[layer, shard.number] = torch.cat(rows)

    def absorb(self, other: KeySums) -> None:
        """Add the sums of other shards."""
        for layer, moment in other.moments.items():
            self.moments[layer] += moment.to(self.moments[layer].device)
        self.shards |= other.shards
        self.background |= other.background


def _add(moment: Tensor, keys: Tensor, mask: Tensor | None) -> None:
    rows = keys.flatten(0, 1).to(moment.device)
    counted = None if mask is None else mask.flatten().to(moment.device)
    key_covariance_(moment, rows, counted, mirror=False)


def _real(keys: Tensor, mask: Tensor | None) -> Tensor:
    """Keys of real tokens `(n, d_in)`, bfloat16, on the CPU."""
    rows = keys if mask is None else keys[mask.to(keys.device)]
    return rows.reshape(-1, keys.shape[-1]).to("cpu", torch.bfloat16)


def _halves(batch: TokenBatch) -> list[TokenBatch]:
    middle = len(batch.ids) // 2
    cuts = slice(middle), slice(middle, None)
    return [
        TokenBatch(batch.ids[cut], None if batch.mask is None else batch.mask[cut]) for cut in cuts
    ]


def _check_finite(
    keys: Tensor, batch: TokenBatch, tokenizer: PreTrainedTokenizerFast, layer: int
) -> None:
    if torch.isfinite(keys).all():
        return
    wrong = ~torch.isfinite(keys).all(-1).cpu()
    real = torch.ones_like(wrong) if batch.mask is None else batch.mask
    wrong &= real
    if not wrong.any():
        return
    row, column = wrong.nonzero()[0].tolist()
    ids = batch.ids[row][real[row]].tolist()
    around = tokenizer.decode(ids[max(0, column - _QUOTED) : column + _QUOTED + 1])
    if wrong[row].sum() == len(ids) > 1:
        # Attention spreads non-finite values, also to earlier tokens.
        place = f"at every token of a text that starts with {around!r}"
    else:
        token = tokenizer.decode([ids[column]])
        place = f"at the token {token!r}, number {column} of its sequence, in {around!r}"
    raise StatisticsError(
        f"layer {layer} has keys that are not finite on ordinary text, {place}; load the model in "
        "bfloat16 or float32, or check that its weights are intact"
    )


def _at(rows: Tensor, on_cpu: bool) -> torch.device:
    return torch.device("cpu") if on_cpu else rows.device
