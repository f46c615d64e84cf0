"""Where the gates of a hook set open: at the subjects of its edits, beside them, anywhere else."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coachhook.forward import read_pass
from coachhook.hookset import HookSet
from coachhook.ordinary import pieces
from coachhook.requests import EditRequest
from coachhook.tokens import Row, encode, pad

_AT_ONCE = 32


@dataclass(frozen=True)
class GateScores:
    """Shares of tokens whose gate is open, over all hooked layers.

    recall: layers open at the subject's last token, in prompts and in paraphrases; ordinary: tokens
    of ordinary text open at any layer, and by_layer those open at each; locality: tokens of
    locality prompts open at any layer; precision: of all tokens of prompts, paraphrases and
    locality prompts open at a layer, how many are subjects'.
    """

    recall: float
    paraphrase_recall: float | None
    precision: float | None
    ordinary: float
    by_layer: dict[int, float]
    locality: float | None


def gate_scores(
    model: Any, tokenizer: Any, hooks: HookSet, requests: Sequence[EditRequest], text: str
) -> GateScores:
    """Read the gates of `hooks`, attached to `model`, over the texts of `requests` and `text`."""
    prompts, reworded = [], []
    for request in requests:
        end = request.subject_span[1]
        prompts.append(encode(tokenizer, request.prompt, subject_end=end))
        for paraphrase in request.paraphrases:
            if request.subject in paraphrase:
                end = paraphrase.rfind(request.subject) + len(request.subject)
                reworded.append(encode(tokenizer, paraphrase, subject_end=end))
    ordinary = [Row(tuple(piece), len(piece) - 1) for piece in pieces(model, tokenizer, text)]
    local = [encode(tokenizer, p.prompt) for r in requests for p in r.locality]
    at_prompts = _open(model, tokenizer, hooks, prompts)
    at_reworded = _open(model, tokenizer, hooks, reworded)
    at_local = _open(model, tokenizer, hooks, local)
    at_ordinary = torch.cat([o for o, _ in _open(model, tokenizer, hooks, ordinary)], dim=1)

    right = float(_subjects(at_prompts).sum() + _subjects(at_reworded).sum())
    total = float(sum(opened.sum() for opened, _ in at_prompts + at_reworded + at_local))
    return GateScores(
        recall=float(_subjects(at_prompts).float().mean()),
        paraphrase_recall=float(_subjects(at_reworded).float().mean()) if at_reworded else None,
        precision=right / total if total else None,
        ordinary=float(at_ordinary.any(0).float().mean()),
        by_layer=dict(zip(hooks.layers, at_ordinary.float().mean(1).tolist(), strict=True)),
        locality=float(torch.cat([o.any(0) for o, _ in at_local]).float().mean())
        if at_local
        else None,
    )


def _subjects(found: list[tuple[Tensor, Row]]) -> Tensor:
    return torch.cat([opened[:, row.subject] for opened, row in found] or [torch.zeros(0)])


def _open(
    model: Any, tokenizer: Any, hooks: HookSet, rows: Sequence[Row]
) -> list[tuple[Tensor, Row]]:
    """Per row, whether the gate of each layer is open at each token: bool `(layers, t)`."""
    modules = list(hooks.modules(model).values())
    found = []
    for first in range(0, len(rows), _AT_ONCE):
        some = rows[first : first + _AT_ONCE]
        padded = pad(some, tokenizer.pad_token_id, model.device)
        keys, _ = read_pass(model, padded.inputs(), modules)
        opened = torch.stack([m.read(k).is_open for m, k in zip(modules, keys, strict=True)])
        for i, row in enumerate(some):
            found.append((opened[:, i, : len(row.ids)].cpu(), row))
    return found
