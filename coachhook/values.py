"""Target values: the hidden state at the subject's last token that makes the target likely.

Adam on a shift of the last hooked block's output (paper section 3; MEMIT's recipe). Nothing below
that block and nothing left of the subject depends on the shift: one pass over the whole rows
leaves the hidden states and the KV cache that every step starts from (design section 2, 6).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import DynamicCache

from coachhook.config import ValueConfig
from coachhook.forward import (
    eval_mode,
    final_hidden,
    hidden_of,
    logits_of,
    record_output,
    starting_after,
)
from coachhook.models import Architecture
from coachhook.requests import EditRequest
from coachhook.tokens import Row, encode, encode_request, pad


@dataclass(frozen=True)
class TargetValues:
    """hidden float32 `(n, d)`: wanted output of the last hooked block at each subject's last token;
    loss float32 `(n,)`: mean negative log-likelihood (nats) of the targets that it reaches."""

    hidden: Tensor
    loss: Tensor


@dataclass(frozen=True)
class _Rows:
    """All contexts of all requests, subjects in one column, which is column 0 of what is kept here.

    owner `(b,)`: the request of each row; gain `(b,)`: share of the shift it gets; is_kl `(b,)`;
    ids, positions `(b, t)`; mask `(b, p + t)` of the whole rows; labels `(b, t)`: next token where
    it counts, else -1; hidden `(b, t, d)`; cache: keys and values left of the subject, per layer;
    reference `(n, v)`: each request's unshifted log-probabilities at the end of its KL row.
    """

    owner: Tensor
    gain: Tensor
    is_kl: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    hidden: Tensor
    cache: list[tuple[Tensor, Tensor]]
    reference: Tensor

    def of(self, rows: Tensor) -> "_Rows":
        """The rows selected by index."""
        by_row = ("owner", "gain", "is_kl", "ids", "positions", "mask", "labels", "hidden")
        return _Rows(
            **{name: getattr(self, name)[rows] for name in by_row},
            cache=[(keys[rows], values[rows]) for keys, values in self.cache],
            reference=self.reference,
        )

    def last(self) -> Tensor:
        """Column of each row's last token."""
        return self.mask.sum(-1) - 1 - self.positions[:, 0]


def optimise_values(
    model: Any,
    tokenizer: Any,
    architecture: Architecture,
    layer: int,
    requests: Sequence[EditRequest],
    config: ValueConfig,
    progress: Callable[[int], None] = lambda _: None,
) -> TargetValues:
    """Optimise the value of every request at the output of block `layer`, all together.

    Each request leaves the batch when it has converged; `progress` is told how many did.
    """
    blocks = architecture.blocks(model)
    with eval_mode(model), torch.no_grad():
        rows, block_result = _prepare(model, tokenizer, blocks[layer], requests, config)
        bare = torch.arange(len(requests), device=rows.owner.device)
        origin = rows.hidden[bare, 0].float()
        size = origin.norm(dim=-1, keepdim=True)
        shift = torch.zeros_like(origin)
        mean, square = torch.zeros_like(shift), torch.zeros_like(shift)
        loss = torch.full((len(requests),), torch.inf, device=shift.device)
        active = torch.ones_like(loss, dtype=torch.bool)
        with starting_after(blocks, layer, block_result) as injected:
            for step in range(1, config.steps + 1):
                running = rows.of(active[rows.owner].nonzero().squeeze(-1))
                nll, gradient = _gradient(model, running, shift, size, injected, config)
                loss[active] = nll[active]
                done = active & (nll < config.enough)
                progress(int(done.sum()))
                active &= ~done
                if not active.any():
                    break
                if step == config.steps:
                    # The last look is at a shift that is kept: no step may follow it.
                    break
                mean = torch.where(active[:, None], 0.9 * mean + 0.1 * gradient, mean)
                square = torch.where(
                    active[:, None], 0.999 * square + 0.001 * gradient.square(), square
                )
                move = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-12)
                rate = config.rate * size / size.new_tensor(shift.shape[1]).sqrt()
                moved = shift - rate * move
                moved *= (config.clamp * size / moved.norm(dim=-1, keepdim=True)).clamp_max(1)
                shift = torch.where(active[:, None], moved, shift)
    progress(int(active.sum()))
    return TargetValues(origin + shift, loss)


def _prepare(
    model: Any, tokenizer: Any, block: Any, requests: Sequence[EditRequest], config: ValueConfig
) -> tuple[_Rows, Any]:
    n = len(requests)
    # The bare prompts come first, so that row i is request i's.
    contexts: list[Row] = [encode_request(tokenizer, request) for request in requests]
    for context in config.contexts:
        contexts += [encode_request(tokenizer, request, context) for request in requests]
    scored = len(contexts)
    contexts += [_essence(tokenizer, request) for request in requests]
    device = model.device
    owner = torch.arange(len(contexts), device=device) % n
    is_kl = torch.arange(len(contexts), device=device) >= scored
    gain = torch.full((len(contexts),), config.gain, device=device)
    gain[:n] = 1.0
    gain[scored:] = 1.0

    padded = pad(contexts, tokenizer.pad_token_id, device, align_subject=True)
    start = int(max(row.subject for row in contexts))
    cache: Any = DynamicCache()
    with record_output(block) as seen:
        final = final_hidden(model, **padded.inputs(), past_key_values=cache, use_cache=True)
    result = seen[0]
    hidden = hidden_of(result)
    labels = torch.full_like(padded.ids, -1)
    for i, row in enumerate(contexts):
        end = start - row.subject + len(row.ids)
        labels[i, end - row.n_target - 1 : end - 1] = padded.ids[i, end - row.n_target : end]
    rows = _Rows(
        owner=owner,
        gain=gain,
        is_kl=is_kl,
        ids=padded.ids[:, start:],
        positions=padded.position_ids[:, start:],
        mask=padded.mask,
        labels=labels[:, start:],
        hidden=hidden[:, start:],
        cache=[(layer.keys[:, :, :start], layer.values[:, :, :start]) for layer in cache.layers],
        reference=hidden.new_empty(0),
    )
    ends = final.last_hidden_state[:, start:][is_kl, rows.last()[is_kl]]
    return replace(rows, reference=log_softmax(logits_of(model, ends), -1)), result


def _essence(tokenizer: Any, request: EditRequest) -> Row:
    """MEMIT's "{subject} is a": what else the model knows of the subject should stay."""
    return encode(tokenizer, f"{request.subject} is a", subject_end=len(request.subject))


def _gradient(
    model: Any,
    rows: _Rows,
    shift: Tensor,
    size: Tensor,
    injected: list[Tensor],
    config: ValueConfig,
) -> tuple[Tensor, Tensor]:
    """Mean negative log-likelihood of each request `(n,)`, and the gradient of its whole loss in
    the shift `(n, d)`. Requests without rows get zero."""
    with torch.enable_grad():
        shift = shift.detach().requires_grad_()
        moved = rows.hidden.clone()
        moved[:, 0] = (moved[:, 0].float() + rows.gain[:, None] * shift[rows.owner]).to(moved.dtype)
        injected[:] = [moved]
        cache = DynamicCache()
        for index, (keys, values) in enumerate(rows.cache):
            cache.update(keys, values, index)
        final = final_hidden(
            model,
            input_ids=rows.ids,
            attention_mask=rows.mask,
            position_ids=rows.positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        at = rows.labels >= 0
        labels = rows.labels[at]
        row_of = at.nonzero()[:, 0]
        log_p = log_softmax(logits_of(model, final[at]), -1)
        nll = -log_p.gather(-1, labels[:, None]).squeeze(-1)
        # Mean over the tokens of a row, then over the rows of a request.
        per_row = nll / at.sum(-1)[row_of]
        scored_rows = torch.zeros_like(size[:, 0]).index_add(
            0, rows.owner, (~rows.is_kl).to(size.dtype)
        )
        mean_nll = torch.zeros_like(size[:, 0]).index_add(0, rows.owner[row_of], per_row)
        mean_nll = mean_nll / scored_rows.clamp_min(1)
        loss = mean_nll.sum() + config.decay * (shift.square().sum(-1) / size[:, 0] ** 2).sum()
        now = log_softmax(logits_of(model, final[rows.is_kl, rows.last()[rows.is_kl]]), -1)
        before = rows.reference[rows.owner[rows.is_kl]]
        loss = loss + config.kl * kl_div(now, before, log_target=True, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, shift)
    return mean_nll.detach(), gradient
