"""From text to token rows: where the subject ends, where the target is, how rows are padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coachhook.errors import ContextLengthError, RequestError
from coachhook.facts.request import EditRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True)
class Row:
    """One tokenised text. subject: index of the subject's last token (without a subject, of the
    last token before the target). n_target: how many tokens at the end are the target's."""

    ids: tuple[int, ...]
    subject: int
    n_target: int = 0

    @property
    def target(self) -> tuple[int, ...]:
        return self.ids[len(self.ids) - self.n_target :]


def encode(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    target: str | None = None,
    *,
    subject_end: int | None = None,
) -> Row:
    """Tokenise `text` followed by `target` as one string, as the model would see it.

    subject_end: character offset in `text` just after the subject. Raises `RequestError` if the
    text, target or subject has no token of its own.
    """
    full = text if target is None else join(text, target)
    ids, offsets = tokenize(tokenizer, full)
    # A token belongs to the target if it ends past the text; special tokens have empty spans.
    n_target = sum(end > len(text) for start, end in offsets if end > start)
    n_text = len(ids) - n_target
    if target is not None and (n_target == 0 or n_text == 0):
        raise RequestError(f"target {target!r} after {text!r} gives no token of its own")
    subject = n_text - 1
    if subject_end is not None:
        inside = [
            i for i, (start, end) in enumerate(offsets) if end > start and start < subject_end
        ]
        if not inside:
            raise RequestError(f"the subject in {text!r} gives no token")
        subject = min(inside[-1], n_text - 1)
    return Row(tuple(ids), subject, n_target)


def encode_request(
    tokenizer: PreTrainedTokenizerFast,
    request: EditRequest,
    context: str = "{}",
    *,
    with_target: bool = True,
    stop: str = "",
) -> Row:
    """The row of a request: its prompt in place of the "{}" of `context`, then its target and
    `stop`, unless `with_target` is false."""
    before, after = context.split("{}")
    return encode(
        tokenizer,
        before + request.prompt + after,
        request.target + stop if with_target else None,
        subject_end=len(before) + request.subject_span[1],
    )


def tokenize(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text` and their character spans, without special tokens at the end: some
    tokenizers add an end-of-text token, after which no continuation makes sense."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
    while offsets and offsets[-1][0] == offsets[-1][1] and text:
        ids.pop()
        offsets.pop()
    return ids, offsets


def join(text: str, target: str) -> str:
    """`text` and `target` with a space between, unless there is white space there already."""
    separated = text[-1:].isspace() or target[:1].isspace()
    return text + target if separated else f"{text} {target}"


def check_length(row: Row, limit: int | None, what: str) -> None:
    """Raise `ContextLengthError` if `row` has more tokens than `limit`. what: names the row."""
    if limit is not None and len(row.ids) > limit:
        raise ContextLengthError(
            f"{what} takes {len(row.ids)} tokens with its target, but the model's context holds "
            f"{limit}; shorten the prompt"
        )


@dataclass(frozen=True)
class Padded:
    """Rows in one rectangle. ids, position_ids int64 `(b, t)`; mask int64 `(b, t)`, 1 on real
    tokens; subject int64 `(b,)`: the column of each row's subject."""

    ids: Tensor
    mask: Tensor
    position_ids: Tensor
    subject: Tensor

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for a forward pass over the whole rectangle."""
        return {
            "input_ids": self.ids,
            "attention_mask": self.mask,
            "position_ids": self.position_ids,
        }

    def subject_mask(self) -> Tensor:
        """True at each row's last subject token, bool `(b, t)`."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device)
        return columns == self.subject[:, None]


def pad(rows: Sequence[Row], pad_id: int, device: Any, *, align_subject: bool = False) -> Padded:
    """Pad on the right or, with `align_subject`, so that all subjects are in one column."""
    column = max(row.subject for row in rows) if align_subject else 0
    starts = [column - row.subject if align_subject else 0 for row in rows]
    width = max(start + len(row.ids) for start, row in zip(starts, rows, strict=True))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (start, row) in enumerate(zip(starts, rows, strict=True)):
        ids[i, start : start + len(row.ids)] = torch.tensor(row.ids)
        mask[i, start : start + len(row.ids)] = 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    subject = torch.tensor([s + row.subject for s, row in zip(starts, rows, strict=True)])
    return Padded(ids.to(device), mask.to(device), positions.to(device), subject.to(device))
