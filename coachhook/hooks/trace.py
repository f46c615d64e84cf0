"""Traces: which tokens of a text open which gates, how far from the threshold, for which edit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.errors import RequestError
from coachhook.hooks.layer import HookLinear
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import eval_mode
from coachhook.models.reading import read_padded
from coachhook.models.tokens import Row, check_length, pad


@dataclass(frozen=True)
class Trace:
    """The readings of every gate at every token of a text, for l hooked layers and t tokens.

    score, z float32 `(l, t)`; threshold float32 `(l,)`: the lowest score that opens the gate (for
    the sequence gate, whose reference is the text itself, the lowest z-score); is_open bool
    `(l, t)`; edit int64 `(l, t)`: the edit whose fingerprint gave the score, -1 if none. compared:
    what the threshold is compared with, "score" or "z".
    """

    tokens: list[str]
    layers: list[int]
    score: Tensor
    z: Tensor
    threshold: Tensor
    is_open: Tensor
    edit: Tensor
    compared: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values; numbers that are not finite become None."""

        def numbers(values: Tensor) -> Any:
            return [
                [None if isinstance(v, float) and not math.isfinite(v) else v for v in row]
                for row in values.tolist()
            ]

        return {
            "tokens": self.tokens,
            "layers": self.layers,
            "score": numbers(self.score),
            "z": numbers(self.z),
            "threshold": numbers(self.threshold[None])[0],
            "is_open": self.is_open.tolist(),
            "edit": self.edit.tolist(),
            "compared": self.compared,
        }


def trace_text(lm: LanguageModel, hooks: dict[int, HookLinear], text: str) -> Trace:
    """Run `text` through the hooked model and report its gates. See `HookSet.trace`."""
    if not text:
        raise RequestError("there is nothing to trace: the text is empty")
    encoded = lm.tokenizer(text, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    row = Row(ids, len(ids) - 1)
    check_length(row, lm.context_length, "the text to trace")
    # A single row: there is nothing to pad.
    padded = pad([row], 0, lm.device)
    with eval_mode(lm.model):
        by_layer, _ = read_padded(lm.model, padded, padded.mask.bool(), list(hooks.values()), _read)
    score, z, is_open, edit = (torch.stack(layers) for layers in zip(*by_layer, strict=True))
    tokens = [
        text[start:end] or lm.tokenizer.convert_ids_to_tokens(token)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return Trace(
        tokens=tokens,
        layers=list(hooks),
        score=score,
        z=z,
        threshold=torch.stack([hook.least_open().cpu() for hook in hooks.values()]),
        is_open=is_open,
        edit=edit,
        compared=next(iter(hooks.values())).compared,
    )


def _read(hook: HookLinear, keys: Tensor, _: slice) -> Sequence[Tensor]:
    reading = hook.read(keys)
    return reading.score.float(), reading.z.float(), reading.is_open, reading.edit
