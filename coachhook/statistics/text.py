"""Ordinary text for key statistics, in shards: what the model samples itself, or a file.

A shard's text depends only on the source and the shard's number, not on the process that reads it
or the shards read before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from coachhook.errors import StatisticsError
from coachhook.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Short sequences give many first positions, whose keys differ from all others (attention sinks).
SEQUENCE_LENGTH = 64
SHARD_SEQUENCES = 128
FEWEST_TOKENS = 256
# Shortest sequence of a batch, as a share of the longest: bounds the cost of padding.
_SHORTEST_IN_BATCH = 0.75

Progress = Callable[[int], None]


@dataclass(frozen=True)
class TokenBatch:
    """Token ids `(b, t)` int64 on the CPU, padded on the right; mask bool `(b, t)`, true on real
    tokens, or None where all are."""

    ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Shard:
    """A piece of ordinary text. number: its place in the text, from 0; n_tokens: real tokens;
    read: makes its batches, and reports tokens to `Progress` as they come (sampling is slow)."""

    number: int
    n_tokens: int
    read: Callable[[Progress], list[TokenBatch]]


def sampled_shards(lm: LanguageModel, n_tokens: int, *, seed: int) -> Iterator[Shard]:
    """Text sampled from the model at temperature 1, in sequences of `SEQUENCE_LENGTH` tokens.

    Every sequence starts with a word drawn uniformly from the vocabulary (after the BOS token if
    the tokenizer adds one), so that no data set and no prompt is needed. A shard's `read` raises
    `StatisticsError` for logits that are not finite.
    """
    model, tokenizer, device = *lm, lm.device
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=device)
    lead = torch.tensor(tokenizer("")["input_ids"], device=device).long()
    starts = torch.tensor(_word_tokens(tokenizer), device=device)

    def sample(number: int, size: int, progress: Progress) -> list[TokenBatch]:
        generator = torch.Generator(device=device).manual_seed(_shard_seed(seed, number))
        picks = torch.randint(len(starts), (size, 1), generator=generator, device=device)
        ids = torch.cat([lead.expand(size, -1), starts[picks]], dim=1)
        progress(ids.numel())
        cache = None
        while ids.shape[1] < SEQUENCE_LENGTH:
            new = ids if cache is None else ids[:, -1:]
            with torch.no_grad():
                out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            if not torch.isfinite(logits).all():
                raise StatisticsError(
                    "the model's logits are not finite on text that it sampled itself; load it in "
                    "bfloat16 or float32, or give a file of text"
                )
            # An end-of-text token would start another document in the middle of this one.
            logits[:, special] = -torch.inf
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
            progress(size)
        return [TokenBatch(ids.cpu())]

    n_sequences = -(-n_tokens // SEQUENCE_LENGTH)
    for number, first in enumerate(range(0, n_sequences, SHARD_SEQUENCES)):
        size = min(SHARD_SEQUENCES, n_sequences - first)
        yield Shard(number, size * SEQUENCE_LENGTH, partial(sample, number, size))


def _shard_seed(seed: int, number: int) -> int:
    if number == 0:
        return seed
    # Not seed + number: two sources with neighbouring seeds would then share most of their text.
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def first_tokens(tokenizer: PreTrainedTokenizerFast, n: int, *, seed: int) -> Tensor:
    """`n` one-word texts, int64 `(n, t)`: the special tokens a text starts with, then a word."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor(_word_tokens(tokenizer))
    picks = torch.randint(len(starts), (n, 1), generator=generator)
    lead = torch.tensor([tokenizer("")["input_ids"]] * n).long()
    return torch.cat([lead.reshape(n, -1), starts[picks]], dim=1)


def _word_tokens(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that can start a text: more than one character, letters only, not special; if there
    are none, all tokens that are not special."""
    special = set(tokenizer.all_special_ids)
    words = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token]).strip()
        if token not in special and len(text) > 1 and text.isalpha():
            words.append(token)
    return words or [t for t in range(len(tokenizer)) if t not in special]


def file_shards(path: Path, tokenizer: PreTrainedTokenizerFast, n_tokens: int) -> Iterator[Shard]:
    """A file's text in order, up to `n_tokens`, in sequences of at most `SEQUENCE_LENGTH` tokens.

    Raises `StatisticsError` if the file cannot be read or has under `FEWEST_TOKENS` tokens of text.
    """
    taken = 0
    pieces: list[list[int]] = []
    number = count()
    for piece in _pieces(path, tokenizer):
        pieces.append(piece)
        taken += len(piece)
        if len(pieces) == SHARD_SEQUENCES or taken >= n_tokens:
            yield _file_shard(next(number), pieces, tokenizer)
            pieces = []
        if taken >= n_tokens:
            return
    if taken < FEWEST_TOKENS:
        raise StatisticsError(
            f"{path} has {taken} tokens of text, and statistics need {FEWEST_TOKENS} at the very "
            "least; give a file with several thousand words"
        )
    if pieces:
        yield _file_shard(next(number), pieces, tokenizer)


def _pieces(path: Path, tokenizer: PreTrainedTokenizerFast) -> Iterator[list[int]]:
    for document in _documents(path):
        ids = tokenizer(document)["input_ids"]
        for start in range(0, len(ids), SEQUENCE_LENGTH):
            piece = ids[start : start + SEQUENCE_LENGTH]
            if len(piece) > 1:
                yield piece


def _file_shard(number: int, pieces: list[list[int]], tokenizer: PreTrainedTokenizerFast) -> Shard:
    n_tokens = sum(map(len, pieces))
    pad_id = tokenizer.pad_token_id or 0

    def read(progress: Progress) -> list[TokenBatch]:
        progress(n_tokens)
        return _batches(pieces, pad_id)

    return Shard(number, n_tokens, read)


def _batches(pieces: list[list[int]], pad_id: int) -> list[TokenBatch]:
    """Batches of sequences of similar length."""
    together: list[list[list[int]]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        if not together or len(piece) < _SHORTEST_IN_BATCH * len(together[-1][0]):
            together.append([])
        together[-1].append(piece)
    return [_padded(rows, pad_id) for rows in together]


def _padded(rows: list[list[int]], pad_id: int) -> TokenBatch:
    lengths = torch.tensor([len(row) for row in rows])
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad_id)
    mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(-1)
    return TokenBatch(ids, None if mask.all() else mask)


def _documents(path: Path) -> Iterator[str]:
    try:
        if path.suffix == ".parquet":
            yield from _parquet_documents(path)
        elif path.suffix in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text_field(path, number, line)
        else:
            # One document per paragraph; empty lines separate them.
            with path.open(encoding="utf-8") as lines:
                for has_text, block in groupby(lines, lambda line: line != "\n"):
                    if has_text:
                        yield "".join(block).removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise StatisticsError(f"cannot read text from {path}: {error}") from error


def _text_field(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise StatisticsError(f"{path}:{number}: not JSON: {error}") from error
    text = record if isinstance(record, str) else isinstance(record, dict) and record.get("text")
    if not isinstance(text, str):
        raise StatisticsError(
            f"{path}:{number}: expected a string or an object with a 'text' field"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise StatisticsError(f"{path}:{number}: not text: {error}") from error
    return text


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet, types
    except ImportError as error:
        raise StatisticsError(
            f"reading {path} needs pyarrow; install it with 'pip install coachhook[parquet]'"
        ) from error
    try:
        table = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise StatisticsError(f"{path} is not a Parquet file: {error}") from error
    if "text" not in table.schema_arrow.names:
        raise StatisticsError(f"{path} has no 'text' column; it has {table.schema_arrow.names}")
    kind = table.schema_arrow.field("text").type
    values = kind.value_type if types.is_dictionary(kind) else kind
    if str(values) not in ("string", "large_string", "string_view"):
        raise StatisticsError(f"the 'text' column of {path} holds {kind}, not strings")
    for batch in table.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text)
