"""A language model together with its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from coachhook.models.passes import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


class LanguageModel(NamedTuple):
    """A causal language model of transformers, and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return input_device(self.model)

    @property
    def pad_id(self) -> int:
        pad_id: int = self.tokenizer.pad_token_id
        return pad_id

    @property
    def context_length(self) -> int | None:
        """The longest sequence the model was made for, if its configuration says so."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        return int(limit) if limit else None
