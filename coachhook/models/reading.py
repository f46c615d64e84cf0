"""Reading a model at chosen tokens: the keys of its modules, or the logits that predict targets.

Rows are read in parts, alike in length, and in smaller ones wherever memory does not suffice.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import final_hidden, in_parts, logits_of, read_pass
from coachhook.models.tokens import Padded, Row, pad

# Rows read at once, alike in length.
_AT_ONCE = 32

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
# Tensors `(b', t, …)` that are made of a module's keys `(b', t, d_in)` in some rows of a rectangle.
Make = Callable[[Module, Tensor, slice], Sequence[Tensor]]


def read_padded(
    model: nn.Module,
    padded: Padded,
    at: Tensor,
    modules: Sequence[Module],
    make: Make[Module],
    *,
    at_once: int = _AT_ONCE,
    block: nn.Module | None = None,
    before: Callable[[slice], None] = lambda _: None,
) -> tuple[list[list[Tensor]], Tensor | None]:
    """What `make` makes of the keys of each of `modules`, and the output of `block`, at the tokens
    `at` (bool `(b, t)`, n of them true): per module tensors `(n, …)`, and float32 `(n, d)`, on the
    CPU, in the order of the rows.

    at_once: how many rows are read in one pass, halved wherever memory does not suffice; `before`
    is called with the rows of each pass. Raises `NotEnoughMemoryError` if one row is too much.
    """
    inputs = padded.inputs()

    def some(rows: slice) -> tuple[list[list[Tensor]], Tensor | None]:
        before(rows)
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        keys, output = read_pass(model, part, modules, block)

        def chosen(tensor: Tensor) -> Tensor:
            return tensor[at[rows].to(tensor.device)].cpu()

        made = [
            [chosen(tensor) for tensor in make(module, key, rows)]
            for module, key in zip(modules, keys, strict=True)
        ]
        return made, None if output is None else chosen(output).float()

    parts = in_parts(some, len(at), at_once)
    outputs = [output for _, output in parts if output is not None]
    return _joined([made for made, _ in parts]), torch.cat(outputs) if outputs else None


def read_rows(
    lm: LanguageModel,
    rows: Sequence[Row],
    modules: Sequence[Module],
    make: Make[Module],
    *,
    every: bool,
) -> list[list[Tensor]]:
    """What `make` makes of the keys of each of `modules` at the rows' subjects, or at `every` one
    of their tokens: per module tensors `(n, …)` on the CPU, in the order of the rows, of which
    there is at least one."""
    parts, order = [], []
    for places in _alike(rows):
        padded = pad([rows[i] for i in places], lm.pad_id, lm.device)
        at = padded.mask.bool() if every else padded.subject_mask()
        parts.append(read_padded(lm.model, padded, at, modules, make)[0])
        order += places
    counts = [len(rows[i].ids) if every else 1 for i in order]
    # Where the tokens of each row stand in what was read.
    spans = dict(zip(order, torch.arange(sum(counts)).split(counts), strict=True))
    wanted = torch.cat([spans[i] for i in range(len(rows))])
    return [[tensor[wanted] for tensor in made] for made in _joined(parts)]


@torch.no_grad()
def read_targets(
    lm: LanguageModel, rows: Sequence[Row], read: Callable[[Tensor, Row], T]
) -> list[T]:
    """`read` of each row, given the logits `(n_target, v)` that predict its target (teacher
    forcing). Raises `NotEnoughMemoryError` if one row is too much."""
    results: dict[int, T] = {}

    def some(group: Sequence[int], part: slice) -> None:
        places = group[part]
        chosen = [rows[i] for i in places]
        padded = pad(chosen, lm.pad_id, lm.device)
        final = final_hidden(lm.model, **padded.inputs(), use_cache=False).last_hidden_state
        ends = [len(row.ids) - 1 for row in chosen]
        spans = zip(final, chosen, ends, strict=True)
        # One product with the output embeddings, which are read once for all rows.
        states = torch.cat([states[end - row.n_target : end] for states, row, end in spans])
        logits = logits_of(lm.model, states).split([row.n_target for row in chosen])
        for i, row, its in zip(places, chosen, logits, strict=True):
            results[i] = read(its, row)

    for group in _alike(rows):
        in_parts(partial(some, group), len(group), len(group))
    return [results[i] for i in range(len(rows))]


def _alike(rows: Sequence[Row]) -> Iterator[list[int]]:
    """The places of all rows, as many at a time as are read at once, the shortest first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), _AT_ONCE):
        yield order[first : first + _AT_ONCE]


def _joined(parts: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    """What was made of each module's keys, of all parts."""
    return [
        [torch.cat(pieces) for pieces in zip(*of_module, strict=True)]
        for of_module in zip(*parts, strict=True)
    ]
