"""Rows of text whose hidden state at the subject can be shifted, ready for many passes.

Nothing below the hooked block and nothing left of the subject depends on the shift
(csrc_notes/method.md, "Exact savings"), so both are computed once: the tokens left of the subject
as a KV cache (a context's common beginning once for all requests), the tokens from the subject on
up to the hooked block. A pass then starts after that block, over the tokens from the subject on,
and computes logits only where a target is predicted and at the last token of the KL penalty's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, layer_norm, log_softmax
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

from coachhook.config import ValueConfig
from coachhook.facts.request import EditRequest
from coachhook.models.decoding import SENTENCE_ENDS
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import final_hidden, hidden_of, logits_of, run_to
from coachhook.models.tokens import Row, encode, encode_request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Overhead of one more pass (launches, small products), counted in tokens.
_PASS_COST = {"cpu": 24, "cuda": 512}

# The gradients of single tokens would underflow in float16.
_FLOAT16_SCALE = 1024.0


def contexts_of(
    tokenizer: PreTrainedTokenizerFast, requests: Sequence[EditRequest], config: ValueConfig
) -> list[list[Row]]:
    """The rows of n requests: their bare prompts, their prompts in each context, and last, as in
    MEMIT, "{subject} is a", to preserve what else the model knows about the subject."""
    scored = [
        [_scored(tokenizer, request, context, config.stop) for request in requests]
        for context in ("{}", *config.contexts)
    ]
    essence = [
        encode(tokenizer, f"{request.subject} is a", subject_end=len(request.subject))
        for request in requests
    ]
    return [*scored, essence]


def _scored(
    tokenizer: PreTrainedTokenizerFast, request: EditRequest, context: str, stop: str
) -> Row:
    """The row of a prompt and its target, followed by `stop` if that adds exactly one token and
    leaves the target's tokens unchanged (")" and "." may merge into one)."""
    row = encode_request(tokenizer, request, context)
    if request.target.rstrip().endswith(tuple(SENTENCE_ENDS)):
        return row
    stopped = encode_request(tokenizer, request, context, stop=stop)
    return stopped if stopped.ids[:-1] == row.ids else row


@dataclass(frozen=True)
class ShiftedRows:
    """b rows: t columns hold the tokens from the subject's last token on, p columns those before.

    owner `(b,)`: the request of each row; gain `(b,)`: share of the shift the row gets; weight
    `(b,)`: the row's share in its request's loss, 0 for rows of the KL penalty; length `(b,)`: real
    tokens among the t; ids, positions `(b, t)`; mask `(b, p + t)`; labels `(b, t)`: the next token
    if it is part of the target, else -1; hidden `(b, t, d)`: the hooked block's output without a
    shift; past: attention keys and values of the p columns, per block.
    """

    owner: Tensor
    gain: Tensor
    weight: Tensor
    length: Tensor
    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    hidden: Tensor
    past: list[tuple[Tensor, Tensor]]

    def part(self, rows: Tensor, width: int) -> ShiftedRows:
        """The rows selected by index, and the first `width` columns from the subject on."""
        by_row = ("owner", "gain", "weight", "length")
        by_token = ("ids", "positions", "labels", "hidden")
        kept = self.mask.shape[1] - self.ids.shape[1] + width
        return ShiftedRows(
            **{name: _picked(getattr(self, name), rows) for name in by_row},
            **{name: _picked(getattr(self, name), rows)[:, :width] for name in by_token},
            mask=_picked(self.mask, rows)[:, :kept],
            past=[(_picked(keys, rows), _picked(values, rows)) for keys, values in self.past],
        )

    def buckets(self, active: Tensor) -> list[ShiftedRows]:
        """The rows of the `active` requests, bool `(n,)`, split by length into the parts that cost
        least, counting padding and the overhead of passes."""
        rows = active[self.owner].nonzero().squeeze(-1)
        lengths, order = self.length[rows].sort()
        counts = lengths.unique_consecutive(return_counts=True)
        widths, numbers = counts[0].tolist(), counts[1].tolist()
        # best[i]: least cost of the i smallest lengths, and the start of their last part.
        best: list[tuple[float, int]] = [(0.0, 0)]
        overhead = _PASS_COST["cpu" if rows.device.type == "cpu" else "cuda"]
        for end in range(1, len(widths) + 1):
            best.append(
                min(
                    (best[first][0] + overhead + widths[end - 1] * sum(numbers[first:end]), first)
                    for first in range(end)
                )
            )
        parts, end = [], len(widths)
        while end:
            first = best[end][1]
            start, stop = sum(numbers[:first]), sum(numbers[:end])
            parts.append(self.part(rows[order[start:stop]], widths[end - 1]))
            end = first
        return parts


def prepare(
    lm: LanguageModel, blocks: Any, layer: int, groups: Sequence[Sequence[Row]], gain: float
) -> tuple[ShiftedRows, Any]:
    """The rows of `contexts_of`, and the raw output of block `layer`, the last hooked one."""
    rows = [row for group in groups for row in group]
    device, n = lm.device, len(groups[0])
    shared = [_shared_length(group) for group in groups for _ in group]
    heads = [_Piece(group[0].ids[: _shared_length(group)], 0) for group in groups]
    lefts = [_Piece(r.ids[k : r.subject], k) for r, k in zip(rows, shared, strict=True)]
    # Nothing is predicted after a target's last token.
    ends = [len(row.ids) - bool(row.n_target) for row in rows]
    rights = [_Piece(r.ids[r.subject : e], r.subject) for r, e in zip(rows, ends, strict=True)]

    past, mask = _extend(lm, [], None, heads)
    of_group = torch.arange(len(rows), device=device) // n
    past = [(_picked(keys, of_group), _picked(values, of_group)) for keys, values in past]
    past, mask = _extend(lm, past, mask[of_group], lefts)
    ids, positions, real = _rectangle(rights, lm.pad_id, device)
    mask = torch.cat([mask, real], dim=1)
    inputs = {"input_ids": ids, "position_ids": positions, "attention_mask": mask}
    result = run_to(blocks[layer], lm.model, {**inputs, **_cached(past)})
    # Blocks up to the hooked one are not run again, but the cache's length is read from the first.
    past = [
        (keys, values) if index > layer else (keys[:, :1, :, :1], values[:, :1, :, :1])
        for index, (keys, values) in enumerate(past)
    ]

    labels = torch.full_like(ids, -1)
    for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
        stop = end - row.subject
        labels[i, stop - row.n_target : stop] = torch.tensor(row.target, dtype=torch.long)
    hidden = hidden_of(result)
    # The hooked block and the embeddings may live on different devices.
    position = torch.arange(len(rows), device=hidden.device)
    is_scored = position < len(rows) - n
    in_context = (position >= n) & is_scored
    return ShiftedRows(
        owner=position % n,
        gain=torch.where(in_context, gain, 1.0),
        weight=is_scored / (len(groups) - 1),
        length=real.sum(-1).to(hidden.device),
        ids=ids,
        positions=positions,
        mask=mask,
        labels=labels.to(hidden.device),
        hidden=hidden,
        past=past,
    ), result


def score(
    model: PreTrainedModel,
    rows: ShiftedRows,
    shift: Tensor,
    injected: list[Tensor],
    kl: float,
    reference: Tensor,
) -> tuple[Tensor, Tensor]:
    """What these rows contribute to the targets' negative log-likelihood `(n,)`, in nats, and the
    gradient `(n, w, d)` of that plus `kl` times the KL penalty with respect to `shift`
    `(n, w, d)`: of the outputs of w blocks at the subject, the first of them the hooked one.

    reference float32 `(n, v)`: log-probabilities of the token after each request's penalty row;
    where they are NaN, this pass sets them.
    """
    half = rows.hidden.dtype in (torch.float16, torch.bfloat16)
    scale = _FLOAT16_SCALE if rows.hidden.dtype == torch.float16 else 1.0
    device = rows.hidden.device.type
    with (
        torch.enable_grad(),
        torch.autocast(device, rows.hidden.dtype, enabled=half),
        _WideNorms() if half else nullcontext(),
    ):
        shift = shift.detach().requires_grad_()
        # In float32, so that half precision does not round a small shift away.
        moved = rows.hidden.float() if half else rows.hidden.clone()
        given = (rows.gain[:, None, None] * shift[rows.owner]).to(moved.dtype)
        moved[:, 0] += given[:, 0]
        injected[:] = [moved, *given.unbind(1)[1:]]
        final = final_hidden(
            model,
            input_ids=rows.ids,
            position_ids=rows.positions,
            attention_mask=rows.mask,
            **_cached(rows.past),
        ).last_hidden_state
        row, column = (rows.labels >= 0).nonzero(as_tuple=True)
        kl_row = (rows.weight == 0).nonzero().squeeze(-1)
        # One product with the output embeddings for both.
        at = (torch.cat([row, kl_row]), torch.cat([column, rows.length[kl_row] - 1]))
        states = final[at[0].to(final.device), at[1].to(final.device)]
        log_p = log_softmax(logits_of(model, states), -1).to(shift.device)
        log_p, now = log_p.split([len(row), len(kl_row)])
        nll = -log_p.gather(-1, rows.labels[row, column][:, None]).squeeze(-1)
        # Mean over the tokens of a row; the rows of a request by their weight.
        share = rows.weight[row] / row.bincount(minlength=len(rows.owner))[row]
        nll = shift.new_zeros(len(shift)).index_add(0, rows.owner[row], (nll * share).to(shift))
        owner = rows.owner[kl_row]
        unknown = reference[owner].isnan().any(-1, keepdim=True)
        reference[owner] = torch.where(unknown, now.detach(), reference[owner])
        penalty = kl_div(now, reference[owner], log_target=True, reduction="sum")
        (gradient,) = torch.autograd.grad(scale * (nll.sum() + kl * penalty), shift)
    return nll.detach(), gradient / scale


class _WideNorms(TorchFunctionMode):
    """Lets layer norms combine float32 inputs with half-precision weights, as autocast does on a
    GPU but not on a CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is layer_norm:
            dtype = args[0].dtype
            kwargs = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class _Piece:
    """Consecutive tokens of a row, the first at `position`."""

    ids: tuple[int, ...]
    position: int


def _picked(tensor: Tensor, rows: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)]


def _shared_length(group: Sequence[Row]) -> int:
    """How many leading tokens all rows share, short of any subject's last token."""
    most = min(row.subject for row in group)
    first = group[0].ids
    return next((i for i in range(most) if any(row.ids[i] != first[i] for row in group)), most)


def _rectangle(
    pieces: Sequence[_Piece], pad_id: int, device: Any, *, right_aligned: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """ids, positions and mask int64 `(b, t)` of pieces aligned on the left, or on the right."""
    width = max(len(piece.ids) for piece in pieces)
    ids = torch.full((len(pieces), width), pad_id, dtype=torch.long)
    positions, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, piece in enumerate(pieces):
        size = len(piece.ids)
        start = width - size if right_aligned else 0
        ids[i, start : start + size] = torch.tensor(piece.ids, dtype=torch.long)
        positions[i, start : start + size] = torch.arange(piece.position, piece.position + size)
        mask[i, start : start + size] = 1
    return ids.to(device), positions.to(device), mask.to(device)


def _cached(past: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Keyword arguments of a pass that continues after `past`."""
    cache = DynamicCache()
    for index, (keys, values) in enumerate(past):
        cache.update(keys, values, index)
    return {"past_key_values": cache, "use_cache": True}


def _extend(
    lm: LanguageModel,
    past: list[tuple[Tensor, Tensor]],
    mask: Tensor | None,
    pieces: Sequence[_Piece],
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Keys and values of `past` and of one more piece per row, and the mask of both."""
    ids, positions, real = _rectangle(pieces, lm.pad_id, lm.device, right_aligned=True)
    mask = real if mask is None else torch.cat([mask, real], dim=1)
    if ids.shape[1] == 0:
        return past, mask
    inputs = _cached(past)
    final_hidden(lm.model, input_ids=ids, position_ids=positions, attention_mask=mask, **inputs)
    layers = inputs["past_key_values"].layers
    return [(layer.keys, layer.values) for layer in layers], mask
