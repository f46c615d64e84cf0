"""Greedy decoding with a KV cache, in padded batches."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from unicodedata import east_asian_width

import torch
from torch import Tensor
from transformers import GenerationConfig

from coachhook.errors import ContextLengthError
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import in_parts
from coachhook.models.tokens import tokenize

# Prompts of similar length decoded at once. With 32, each took 1.3 times as long on a CPU.
_AT_ONCE = 128

SENTENCE_ENDS = ".!?"
# Tokens to decode after a target, to check that it stands in the answer as whole words: the next
# token may extend its last word.
BEYOND_TARGET = 2


def complete(lm: LanguageModel, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """The greedy completion of each prompt, up to an end-of-text token, `max_new_tokens` or the end
    of the context. Raises `ContextLengthError` for a prompt that fills the context."""
    limit = lm.context_length
    rows = [tokenize(lm.tokenizer, prompt)[0] for prompt in prompts]
    room = [max_new_tokens if limit is None else limit - len(row) for row in rows]
    if room and min(room) < 1:
        longest = max(map(len, rows))
        raise ContextLengthError(
            f"a prompt of {longest} tokens leaves no room in the model's context of {limit}; "
            "shorten it"
        )
    texts = [""] * len(rows)
    # A prompt nearly as long as the context is decoded alone, for as many tokens as there is room.
    tight = [i for i, left in enumerate(room) if left < max_new_tokens]
    wide = [i for i, left in enumerate(room) if left >= max_new_tokens]
    wide.sort(key=lambda i: len(rows[i]))
    groups = [wide[i : i + _AT_ONCE] for i in range(0, len(wide), _AT_ONCE)] + [[i] for i in tight]
    for group in groups:
        width = max(len(rows[i]) for i in group)
        pads = [width - len(rows[i]) for i in group]
        ids = [[lm.pad_id] * pad + rows[i] for pad, i in zip(pads, group, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        steps = min(max_new_tokens, *(room[i] for i in group))
        decode = partial(_decoded, lm, torch.tensor(ids), torch.tensor(mask), steps)
        parts = in_parts(decode, len(group), len(group))
        for i, text in zip(group, chain.from_iterable(parts), strict=True):
            texts[i] = text
    return texts


def _decoded(lm: LanguageModel, ids: Tensor, mask: Tensor, steps: int, rows: slice) -> list[str]:
    new = greedy(lm, ids[rows], mask[rows], steps)
    texts: list[str] = lm.tokenizer.batch_decode(new, skip_special_tokens=True)
    return texts


def greedy(lm: LanguageModel, ids: Tensor, mask: Tensor, max_new_tokens: int) -> Tensor:
    """New tokens `(b, n)` after left-padded `ids` `(b, t)` with attention `mask` `(b, t)`."""
    ends = lm.model.generation_config.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=lm.tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=lm.pad_id,
    )
    device = lm.device
    with torch.no_grad():
        out: Tensor = lm.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
        )
    return out[:, ids.shape[1] :]


def starts_with(text: str, target: str) -> bool:
    """Whether a completion starts with `target`, as whole words."""
    text, target = text.strip(), target.strip()
    following = text[len(target) : len(target) + 1]
    # Wide characters belong to scripts without spaces between words.
    spaced = east_asian_width(following) not in ("W", "F") if following else True
    return text.startswith(target) and not (spaced and following.isalnum())


def is_exactly(text: str, target: str) -> bool:
    """Whether a completion is `target` followed by a natural stop."""
    text, target = text.strip(), target.strip().rstrip(SENTENCE_ENDS)
    return text.startswith(target) and natural_stop(f"x{text[len(target) :]}") == "x"


def natural_stop(text: str) -> str:
    """The answer in a completion: up to the end of its first line or sentence."""
    line = text.strip().split("\n", 1)[0]
    for i, sign in enumerate(line):
        at_end = i + 1 == len(line) or line[i + 1].isspace()
        if sign in SENTENCE_ENDS and at_end and i > 0:
            return line[:i].strip()
    return line.strip()
