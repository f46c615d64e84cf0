"""The published procedure for target values, written plainly: the baseline of ours.

It optimises one request at a time, with the prompt bare and behind prefixes sampled from the model.
Every step takes a forward pass of all rows through the whole model, with all logits, and a backward
pass down to the hooked block. Contexts, steps, rate and penalties come from a ValueConfig. It takes
every step, and notes when it would have stopped at `enough`, as ours does.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

import coachhook as ch
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import hidden_of
from coachhook.models.tokens import Row, encode, encode_request, pad
from coachhook.statistics.text import SEQUENCE_LENGTH, sampled_shards


@dataclass(frozen=True)
class PublishedValue:
    """hidden float32 `(d,)`; loss: mean negative log-likelihood (nats) of the last step; seconds
    until it was first below `enough`, or until the end."""

    hidden: Tensor
    loss: float
    seconds_to_enough: float


def sampled_prefixes(lm: LanguageModel, number: int, tokens: int, seed: int) -> tuple[str, ...]:
    """Contexts such as "<ten sampled tokens>. {}"."""
    wanted = number * SEQUENCE_LENGTH
    (shard,) = sampled_shards(lm, wanted, seed=seed)
    (batch,) = shard.read(lambda _: None)
    texts = [lm.tokenizer.decode(row[:tokens], skip_special_tokens=True) for row in batch.ids]
    return tuple(f"{text.replace('{', '(').replace('}', ')')}. {{}}" for text in texts)


def published_value(
    lm: LanguageModel,
    block: Any,
    request: ch.EditRequest,
    config: ch.ValueConfig,
) -> PublishedValue:
    """The value of one request at the output of `block`."""
    rows = [encode_request(lm.tokenizer, request, text) for text in ("{}", *config.contexts)]
    essence = encode(lm.tokenizer, f"{request.subject} is a", subject_end=len(request.subject))
    padded = pad([*rows, essence], lm.pad_id, lm.device)
    everyone = torch.arange(len(rows) + 1, device=lm.device)
    started = time.perf_counter()
    enough_at: float | None = None
    unshifted: dict[str, Tensor] = {}
    shift = torch.zeros(lm.model.config.hidden_size, device=lm.device, requires_grad=True)

    def move(_: Any, __: Any, output: Any) -> Any:
        hidden = hidden_of(output)
        if "origin" not in unshifted:
            unshifted["origin"] = hidden[0, padded.subject[0]].detach().clone()
        hidden = hidden.clone()
        hidden[everyone, padded.subject] += shift
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = block.register_forward_hook(move)
    optimiser = None
    try:
        for step in range(1, config.steps + 1):
            log_p = lm.model(**padded.inputs(), use_cache=False).logits.float().log_softmax(-1)
            loss = torch.stack([_nll(log_p[i], row) for i, row in enumerate(rows)]).mean()
            last = log_p[-1, len(essence.ids) - 1]
            before = unshifted.setdefault("before", last.detach().clone())
            size = unshifted["origin"].norm()
            penalty = kl_div(last, before, log_target=True, reduction="sum")
            decay = (shift.norm() / size) ** 2
            whole = loss + config.kl * penalty + config.decay * decay
            if enough_at is None and loss.item() < config.enough:
                enough_at = time.perf_counter() - started
            if step == config.steps:
                break
            if optimiser is None:
                rate = config.rate * float(size) / len(shift) ** 0.5
                optimiser = torch.optim.Adam([shift], lr=rate)
            optimiser.zero_grad()
            (shift.grad,) = torch.autograd.grad(whole, shift)
            optimiser.step()
            with torch.no_grad():
                shift *= (config.clamp * size / shift.norm()).clamp_max(1)
    finally:
        handle.remove()
    seconds = time.perf_counter() - started
    return PublishedValue(
        (unshifted["origin"] + shift).detach(),
        loss.item(),
        seconds if enough_at is None else enough_at,
    )


def _nll(log_p: Tensor, row: Row) -> Tensor:
    """Mean negative log-likelihood of a row's target, from log-probabilities `(t, v)`."""
    end = len(row.ids) - 1
    wanted = torch.tensor(row.target, device=log_p.device)[:, None]
    return -log_p[end - row.n_target : end].gather(-1, wanted).mean()
