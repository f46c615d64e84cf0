"""Greedy decoding with a KV cache, in padded batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

# Prompts decoded at once: enough to fill two CPU cores, few enough for the padding not to matter.
_AT_ONCE = 32


def complete(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedy completion of each prompt, up to the end-of-text token or `max_new_tokens`."""
    texts: list[str] = []
    for first in range(0, len(prompts), _AT_ONCE):
        ids = [tokenizer(p)["input_ids"] for p in prompts[first : first + _AT_ONCE]]
        width = max(map(len, ids))
        pad = tokenizer.pad_token_id
        batch = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        new = greedy(model, tokenizer, batch, mask, max_new_tokens)
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def greedy(model: Any, tokenizer: Any, ids: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
    """New tokens `(b, n)` after left-padded `ids` `(b, t)` with attention `mask` `(b, t)`."""
    ends = model.generation_config.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.no_grad():
        out: Tensor = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
        )
    return out[:, ids.shape[1] :]


def starts_with(text: str, target: str) -> bool:
    """Whether a completion gives `target` first, as whole words."""
    text, target = text.strip(), target.strip()
    return text.startswith(target) and not text[len(target) : len(target) + 1].isalnum()


def natural_stop(text: str) -> str:
    """The answer in a completion: up to the end of its first line or sentence."""
    line = text.strip().split("\n", 1)[0]
    for i, sign in enumerate(line):
        at_end = i + 1 == len(line) or line[i + 1].isspace()
        if sign in ".!?" and at_end and i > 0:
            return line[:i].strip()
    return line.strip()
