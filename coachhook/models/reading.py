"""What a model gives for the tokens of targets that are read, not generated."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from coachhook.models.passes import final_hidden, input_device, logits_of
from coachhook.models.tokens import Row, pad

# Rows read at once, alike in length.
_AT_ONCE = 32

T = TypeVar("T")


@torch.no_grad()
def read_targets(
    model: Any, tokenizer: Any, rows: Sequence[Row], read: Callable[[Tensor, Row], T]
) -> list[T]:
    """`read` of each row, given the logits `(n_target, v)` that predict its target."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    found: dict[int, T] = {}
    for first in range(0, len(order), _AT_ONCE):
        places = order[first : first + _AT_ONCE]
        some = [rows[i] for i in places]
        padded = pad(some, tokenizer.pad_token_id, input_device(model))
        final = final_hidden(model, **padded.inputs(), use_cache=False).last_hidden_state
        ends = [len(row.ids) - 1 for row in some]
        spans = zip(final, some, ends, strict=True)
        # One product with the output embeddings, which are read once for all rows.
        states = torch.cat([states[end - row.n_target : end] for states, row, end in spans])
        logits = logits_of(model, states).split([row.n_target for row in some])
        for i, row, its in zip(places, some, logits, strict=True):
            found[i] = read(its, row)
    return [found[i] for i in range(len(rows))]
