"""Loading a causal language model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from coachhook.errors import ModelError
from coachhook.models import embedded
from coachhook.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def load_model(
    name: str | Path, *, device: str | None = None, dtype: torch.dtype | None = None
) -> LanguageModel:
    """Load a causal language model and its tokenizer.

    name: "smollm2" (the embedded model), a local folder or a hub id. device: a GPU by default if
    there is one. dtype: by default float32 on a CPU, the checkpoint's own on a GPU. Raises
    `ModelError` if the model cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(embedded.embedded_model() if str(name) == embedded.NAME else name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = dtype or (torch.float32 if device == "cpu" else "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=wanted)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"cannot load model {str(name)!r}: {reason} (expected 'smollm2', a folder with a "
            "transformers checkpoint, or a hub id)"
        ) from error
    # The requested name: the embedded model's folder has another.
    model.config._name_or_path = str(name)
    return LanguageModel(model.eval().to(device), prepare_tokenizer(tokenizer))


def prepare_tokenizer(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Give `tokenizer` a padding token if it has none. Raises `ModelError` if it gives no character
    offsets."""
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} gives no character offsets, which locate the subject's "
            "tokens; load the fast tokenizer (use_fast=True)"
        )
    if tokenizer.pad_token_id is None:
        # Any token will do: padding is always masked.
        tokenizer.pad_token = (
            tokenizer.eos_token
            or tokenizer.bos_token
            or tokenizer.unk_token
            or tokenizer.convert_ids_to_tokens(0)
        )
    return tokenizer
