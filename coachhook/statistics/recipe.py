"""The recipe of key statistics: one checksum of everything that they depend on."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn

from coachhook.errors import StatisticsError
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.placement import fetched
from coachhook.statistics import text as corpus
from coachhook.statistics.source import StatisticsSource


def recipe_of(
    lm: LanguageModel,
    architecture: Architecture,
    layers: Sequence[int],
    source: StatisticsSource,
    n_tokens: int,
    site: str = "down_projection",
) -> str:
    """A checksum, as 32 hexadecimal digits, of the tokenizer, the layers, the text, how it is cut,
    and all weights except those of the blocks above the last of `layers`.

    Raises `StatisticsError` if weights are sharded, or the file at `path` cannot be read.
    """
    blocks = architecture.blocks(lm.model)
    path = None if source.path is None else Path(source.path)
    above = {id(p) for block in blocks[max(layers) + 1 :] for p in block.parameters()}
    recipe = {
        "model": lm.model.config.model_type,
        "template": architecture.template,
        "weights": _weights_checksum(lm.model, above),
        "vocabulary": [len(lm.tokenizer), *lm.tokenizer("")["input_ids"]],
        "layers": list(layers),
        "text": None if path is None else [path.suffix, _file_checksum(path)],
        "cut": [n_tokens, source.seed, corpus.SEQUENCE_LENGTH, corpus.SHARD_SEQUENCES],
    }
    if site != "down_projection":
        recipe["site"] = site
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]


def _weights_checksum(model: nn.Module, left_out: set[int]) -> str:
    _check_whole(model)
    # Every byte is hashed: sums or samples of a weight might not distinguish a fine-tuned model
    # from its base. One checksum per tensor, so that threads compute several at once: for an 8B
    # model about 8 GB are read, at 0.5 to 2 GB/s per thread.
    sums: list[tuple[str, bytes | Future[bytes]]] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for name, weight in model.state_dict(keep_vars=True).items():
            if id(weight) in left_out:
                continue
            title = f"{name} {weight.dtype} {tuple(weight.shape)} "
            if weight.is_meta:
                # One at a time: offloaded weights may not fit in memory together.
                path, _, leaf = name.rpartition(".")
                sums.append((title, _checksum(fetched(model.get_submodule(path), leaf))))
            else:
                sums.append((title, pool.submit(_checksum, weight)))
    digest = hashlib.sha256()
    for title, checksum in sums:
        digest.update(title.encode())
        digest.update(checksum if isinstance(checksum, bytes) else checksum.result())
    return digest.hexdigest()


def _checksum(weight: Tensor) -> bytes:
    raw = weight.detach().cpu().contiguous().flatten()
    return hashlib.sha256(raw.view(torch.uint8).numpy().data).digest()


def _check_whole(model: nn.Module) -> None:
    # Imported here, because commands without a model should start at once.
    from torch.distributed.tensor import DTensor

    has_parts = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    if has_parts or (getattr(model, "tp_size", None) or 1) > 1:
        raise StatisticsError(
            "this model's weights are divided among processes, and with tensor parallelism so are "
            "its keys; measure its key statistics with the model loaded whole"
        )


def _file_checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StatisticsError(f"cannot read text from {path}: {error.strerror}") from error
