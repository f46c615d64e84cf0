"""What the edits do to ordinary text: perplexity, and divergence from the unedited model."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from coachhook.errors import ConfigError
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import final_hidden, input_device, logits_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PIECE = 256

Off = Callable[[Any], AbstractContextManager[Any]]


@dataclass(frozen=True)
class TextScores:
    """Perplexities of one text without and with the edits, and the mean divergence
    `KL(unedited ‖ edited)` of the next-token distributions, in nats a token."""

    perplexity_before: float
    perplexity_after: float
    divergence: float


def ordinary_text() -> str:
    """The page of ordinary English that comes with the package."""
    return (files("coachhook.evaluation") / "ordinary.txt").read_text(encoding="utf-8")


def pieces(lm: LanguageModel, text: str) -> list[list[int]]:
    """`text` in tokens, cut into pieces that the model reads one at a time.

    Raises `ConfigError` if it has fewer than two tokens.
    """
    ids = lm.tokenizer(text)["input_ids"]
    size = min(_PIECE, lm.context_length or _PIECE)
    parts = [ids[i : i + size] for i in range(0, len(ids), size)]
    parts = [part for part in parts if len(part) > 1]
    if not parts:
        raise ConfigError("the ordinary text has fewer than two tokens; give a page or more")
    return parts


def perplexity(lm: LanguageModel, text: str) -> float:
    """Perplexity of `text`. Raises `ConfigError` if it has fewer than two tokens."""
    total, count = 0.0, 0
    for ids in pieces(lm, text):
        following, log_p = _predictions(lm.model, ids)
        total -= float(log_p.gather(-1, following).sum())
        count += len(following)
    return math.exp(total / count)


def compare_text(lm: LanguageModel, text: str, off: Off) -> TextScores:
    """Compare the model on `text` with its edits, and without them, inside `off(model)`.

    Raises `ConfigError` if it has fewer than two tokens.
    """
    before = after = divergence = 0.0
    count = 0
    for ids in pieces(lm, text):
        following, edited = _predictions(lm.model, ids)
        with off(lm.model):
            _, plain = _predictions(lm.model, ids)
        before -= float(plain.gather(-1, following).sum())
        after -= float(edited.gather(-1, following).sum())
        divergence += float(kl_div(edited, plain, log_target=True, reduction="sum"))
        count += len(following)
    return TextScores(math.exp(before / count), math.exp(after / count), divergence / count)


def _predictions(model: PreTrainedModel, ids: list[int]) -> tuple[Tensor, Tensor]:
    """The next token at each position `(t, 1)`, and the log-probabilities of all tokens there
    `(t, v)`."""
    piece = torch.tensor([ids], device=input_device(model))
    with torch.no_grad():
        final = final_hidden(model, input_ids=piece, use_cache=False).last_hidden_state
        log_p = logits_of(model, final[0, :-1]).log_softmax(-1)
        # Output and input embeddings may live on different devices.
        return piece[0, 1:, None].to(log_p.device), log_p
