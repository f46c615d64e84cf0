"""Explaining: which tokens of a text open which gates, how far from the threshold, and why."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.errors import RequestError
from coachhook.hooks.layer import HookLinear
from coachhook.models.passes import eval_mode, input_device, read_pass


@dataclass(frozen=True)
class Trace:
    """What every gate says of every token of a text, for l hooked layers and t tokens.

    score, z float32 `(l, t)`; threshold float32 `(l,)`: the least open score (under the sequence
    gate, whose reference is the text itself, the least open z); is_open bool `(l, t)`; edit int64
    `(l, t)`: the edit the score stands for, -1 if the gate names none.
    """

    tokens: list[str]
    layers: list[int]
    score: Tensor
    z: Tensor
    threshold: Tensor
    is_open: Tensor
    edit: Tensor

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; a z-score that does not exist is None."""

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
        }


def trace_text(model: Any, tokenizer: Any, hooks: dict[int, HookLinear], text: str) -> Trace:
    """Read `text` with the hooks at work, and report their gates. See `HookSet.trace`."""
    if not text:
        raise RequestError("there is nothing to trace: the text is empty")
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids = torch.tensor([encoded["input_ids"]], device=input_device(model))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with eval_mode(model):
        keys, _ = read_pass(model, inputs, list(hooks.values()))
    readings = [hook.read(k) for hook, k in zip(hooks.values(), keys, strict=True)]
    tokens = [
        text[start:end] or tokenizer.convert_ids_to_tokens(token)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    gates = [hook.gate for hook in hooks.values()]
    return Trace(
        tokens=tokens,
        layers=list(hooks),
        score=torch.stack([reading.score[0].float().cpu() for reading in readings]),
        z=torch.stack([reading.z[0].float().cpu() for reading in readings]),
        threshold=torch.stack([gate.least_open().cpu() for gate in gates]),
        is_open=torch.stack([reading.is_open[0].cpu() for reading in readings]),
        edit=torch.stack([reading.edit[0].cpu() for reading in readings]),
    )
