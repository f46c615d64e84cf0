"""Reading a model at chosen tokens: the keys of its modules, or the logits that predict targets.

Rows of similar length are read together, and fewer at a time when out of memory.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import final_hidden, in_parts, logits_of, read_pass
from coachhook.models.tokens import Padded, Row, pad

# Rows of similar length read at once.
_AT_ONCE = 32

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
# Maps a module, its keys `(b', t, d_in)` and the rows they belong to, to tensors `(b', t, …)`.
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
    """Read at the n tokens where `at`, bool `(b, t)`, is true: per module, the tensors `(n, …)`
    that `make` returns for its keys; and the output of `block`, float32 `(n, d)`. All are on the
    CPU, in the order of the rows.

    at_once: rows per pass, halved when out of memory. before: called with the rows of each pass.
    Raises `NotEnoughMemoryError` if one row is too much.
    """
    inputs = padded.inputs()

    def some(rows: slice) -> tuple[list[list[Tensor]], Tensor | None]:
        before(rows)
        part = {name: tensor[rows] for name, tensor in inputs.items()}
        # A hook that is no module of the pass itself names the one whose input it reads.
        sites = [getattr(module, "site", module) for module in modules]
        keys, output = read_pass(model, part, sites, block)

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
    """Per module, the tensors `(n, …)` that `make` returns for its keys, at the rows' subjects or,
    with `every`, at all their tokens; on the CPU, in the order of the rows. Needs at least one
    row."""
    parts, order = [], []
    for places in _alike(rows):
        padded = pad([rows[i] for i in places], lm.pad_id, lm.device)
        at = padded.mask.bool() if every else padded.subject_mask()
        parts.append(read_padded(lm.model, padded, at, modules, make)[0])
        order += places
    counts = [len(rows[i].ids) if every else 1 for i in order]
    # Indices of each row's tokens in the tensors read.
    spans = dict(zip(order, torch.arange(sum(counts)).split(counts), strict=True))
    wanted = torch.cat([spans[i] for i in range(len(rows))])
    return [[tensor[wanted] for tensor in made] for made in _joined(parts)]


@torch.no_grad()
def read_targets(
    lm: LanguageModel, rows: Sequence[Row], read: Callable[[Tensor, Row], T]
) -> list[T]:
    """For each row, the result of `read` on the logits `(n_target, v)` that predict its target
    (teacher forcing). Raises `NotEnoughMemoryError` if one row is too much."""
    results: dict[int, T] = {}

    def some(group: Sequence[int], part: slice) -> None:
        places = group[part]
        chosen = [rows[i] for i in places]
        padded = pad(chosen, lm.pad_id, lm.device)
        final = final_hidden(lm.model, **padded.inputs(), use_cache=False).last_hidden_state
        ends = [len(row.ids) - 1 for row in chosen]
        spans = zip(final, chosen, ends, strict=True)
        # A single product reads the output embeddings once for all rows.
        states = torch.cat([states[end - row.n_target : end] for states, row, end in spans])
        logits = logits_of(lm.model, states).split([row.n_target for row in chosen])
        for i, row, its in zip(places, chosen, logits, strict=True):
            results[i] = read(its, row)

    for group in _alike(rows):
        in_parts(partial(some, group), len(group), len(group))
    return [results[i] for i in range(len(rows))]


def _alike(rows: Sequence[Row]) -> Iterator[list[int]]:
    """The indices of all rows, shortest first, in groups to read at once."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for first in range(0, len(order), _AT_ONCE):
        yield order[first : first + _AT_ONCE]


def _joined(parts: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    """Each module's tensors, concatenated over the parts."""
    return [
        [torch.cat(pieces) for pieces in zip(*of_module, strict=True)]
        for of_module in zip(*parts, strict=True)
    ]
