"""Ordinary text for key statistics: what the model samples itself, or a file."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coachhook.errors import StatisticsError

# Short sequences give many first positions, whose keys are unlike all others (attention sink).
SEQUENCE_LENGTH = 64
FEWEST_TOKENS = 256
_SAMPLED_AT_ONCE = 128

Progress = Callable[[int], None]


def sample_text(
    model: Any, tokenizer: Any, n_tokens: int, *, seed: int, progress: Progress
) -> Iterator[Tensor]:
    """Text sampled from the model at temperature 1, as int64 `(b, SEQUENCE_LENGTH)` batches.

    Every sequence starts with a word drawn uniformly from the vocabulary (behind the BOS token if
    the tokenizer puts one), so that no data set and no prompt is needed. `progress` is told the
    number of tokens sampled since the last call.
    """
    device = model.device
    generator = torch.Generator(device=device).manual_seed(seed)
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), device=device)
    lead = tokenizer("", return_tensors=None)["input_ids"]
    starts = torch.tensor(_word_tokens(tokenizer), device=device)
    n_sequences = -(-n_tokens // SEQUENCE_LENGTH)
    for first in range(0, n_sequences, _SAMPLED_AT_ONCE):
        size = min(_SAMPLED_AT_ONCE, n_sequences - first)
        picks = torch.randint(len(starts), (size, 1), generator=generator, device=device)
        ids = torch.cat([torch.tensor([lead] * size, device=device).long(), starts[picks]], dim=1)
        cache = None
        while ids.shape[1] < SEQUENCE_LENGTH:
            new = ids if cache is None else ids[:, -1:]
            with torch.no_grad():
                out = model(input_ids=new, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            # An end-of-text token would start another document in the middle of this one.
            logits[:, special] = -torch.inf
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, drawn], dim=1)
            progress(size)
        yield ids


def first_tokens(tokenizer: Any, n: int, *, seed: int) -> Tensor:
    """`n` one-word texts, int64 `(n, t)`: what stands at the first position of ordinary text."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor(_word_tokens(tokenizer))
    picks = torch.randint(len(starts), (n, 1), generator=generator)
    lead = torch.tensor([tokenizer("")["input_ids"]] * n).long()
    return torch.cat([lead.reshape(n, -1), starts[picks]], dim=1)


def _word_tokens(tokenizer: Any) -> list[int]:
    """Tokens that can start a text: more than one character, letters only, not a special token."""
    special = set(tokenizer.all_special_ids)
    words = []
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token]).strip()
        if token not in special and len(text) > 1 and text.isalpha():
            words.append(token)
    return words or [t for t in range(len(tokenizer)) if t not in special]


def file_text(
    path: Path, tokenizer: Any, n_tokens: int, *, device: Any, progress: Progress
) -> Iterator[Tensor]:
    """Text of a file, one document after another, as int64 `(1, t)` batches of at most
    `SEQUENCE_LENGTH` tokens. Raises `StatisticsError` if the file has no usable text."""
    taken = 0
    for document in _documents(path):
        ids = tokenizer(document)["input_ids"]
        for start in range(0, len(ids), SEQUENCE_LENGTH):
            if taken >= n_tokens:
                return
            piece = ids[start : start + SEQUENCE_LENGTH]
            if len(piece) > 1:
                taken += len(piece)
                progress(len(piece))
                yield torch.tensor([piece], device=device)
    if taken < FEWEST_TOKENS:
        raise StatisticsError(
            f"{path} has {taken} tokens of text, and statistics need {FEWEST_TOKENS} at the very "
            "least; give a file with several thousand words"
        )


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
            yield from path.read_text(encoding="utf-8").split("\n\n")
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
    return text


def _parquet_documents(path: Path) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid, parquet
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
    for batch in table.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text)
