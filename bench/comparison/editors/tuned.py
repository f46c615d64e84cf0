"""Fine-tuning on the batch: low-rank adapters, and one layer's weights within a small box.

Both minimise the negative log-likelihood of the targets behind the bare prompts, with at most 25
steps for a batch of any size, and fewer once the loss is below `_ENOUGH`. They use neither the
common keys nor the common target values. The adapters are at the layers that all editors share, and
the box stays around the original weights over all batches.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

import coachhook as ch
from bench.comparison.editors.setting import InForce, Setting
from coachhook.models.tokens import encode_request, pad

_RANK = 8
_STEPS = 25
# Nats a token.
_ENOUGH = 0.01


def target_loss(setting: Setting, requests: Sequence[ch.EditRequest]) -> Tensor:
    """Mean negative log-likelihood (nats) of the targets' tokens."""
    rows = [encode_request(setting.lm.tokenizer, request) for request in requests]
    padded = pad(rows, setting.lm.pad_id, setting.lm.device)
    labels = torch.full_like(padded.ids, -100)
    for i, row in enumerate(rows):
        end = len(row.ids)
        labels[i, end - row.n_target : end] = labels.new_tensor(row.target)
    loss: Tensor = setting.lm.model(**padded.inputs(), labels=labels, use_cache=False).loss
    return loss


def descent(
    setting: Setting, requests: Sequence[ch.EditRequest], optimiser: torch.optim.Optimizer
) -> Iterator[None]:
    """The steps of one batch, each made when asked for."""
    for _ in range(_STEPS):
        optimiser.zero_grad()
        loss = target_loss(setting, requests)
        if loss < _ENOUGH:
            return
        loss.backward()
        optimiser.step()
        yield


class LowRank:
    """Adapters of peft at the shared layers, trained on with every batch. rate: AdamW's."""

    def __init__(self, setting: Setting, rate: float) -> None:
        self._setting = setting
        names = [setting.architecture.name(layer) for layer in setting.layers]
        torch.manual_seed(0)
        config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=names)
        self._wrapped = get_peft_model(setting.lm.model, config)
        self._trained = [p for p in self._wrapped.parameters() if p.requires_grad]
        self._rate = rate
        self._force = InForce()
        self.edits = self

    def in_force(self) -> list[list[ch.EditRequest]]:
        return self._force.in_force()

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        optimiser = torch.optim.AdamW(self._trained, lr=self._rate, weight_decay=0)
        for _ in descent(self._setting, requests, optimiser):
            pass
        self._force.add(requests)

    @contextmanager
    def off(self, model: Any) -> Iterator[Any]:
        with self._wrapped.disable_adapter():
            yield model

    def held(self) -> int:
        return sum(p.numel() * p.element_size() for p in self._trained)


class Constrained:
    """Fine-tuning of the last shared layer, where no weight may move by more than `bound` from its
    original."""

    def __init__(self, setting: Setting, bound: float) -> None:
        self._setting, self._bound = setting, bound
        setting.lm.model.requires_grad_(False)
        self._weight = setting.down_projection(setting.layers[-1]).weight.requires_grad_()
        self._before = self._weight.detach().clone()
        self._force = InForce()
        self.edits = self

    def in_force(self) -> list[list[ch.EditRequest]]:
        return self._force.in_force()

    def edit(self, requests: Sequence[ch.EditRequest], values: Tensor) -> None:
        optimiser = torch.optim.Adam([self._weight], lr=self._bound)
        for _ in descent(self._setting, requests, optimiser):
            with torch.no_grad():
                self._weight.clamp_(self._before - self._bound, self._before + self._bound)
        self._force.add(requests)

    @contextmanager
    def off(self, model: Any) -> Iterator[Any]:
        edited = self._weight.data
        self._weight.data = self._before
        try:
            yield model
        finally:
            self._weight.data = edited

    def held(self) -> int:
        return 0
