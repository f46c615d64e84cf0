"""Key statistics of the hooked layers: second moment and background keys, in one streaming pass."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coachhook import corpus
from coachhook.embedded import cache_dir
from coachhook.errors import AttachError, ConfigError, StatisticsError
from coachhook.forward import eval_mode, read_pass
from coachhook.hooks import HookLinear
from coachhook.models import Architecture
from coachhook.progress import track
from coachhook_kernels.key_covariance import key_covariance_, mirror_

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StatisticsSource:
    """Where ordinary text comes from: `path` (text, JSONL or Parquet), or the model's own samples.

    n_tokens: how many tokens to read; also how many background keys are kept, at most 65,536.
    """

    path: str | None = None
    n_tokens: int = 16_384
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_tokens < corpus.FEWEST_TOKENS:
            raise ConfigError(
                f"statistics need at least {corpus.FEWEST_TOKENS} tokens, not {self.n_tokens}"
            )


@dataclass(frozen=True)
class LayerStatistics:
    """One layer. moment: mean of `k kᵀ`, float32 `(d_in, d_in)`; background: keys of ordinary
    tokens, bfloat16 `(n, d_in)`; first: keys of texts' first words, bfloat16 `(m, d_in)`, which
    are alike in many models (attention sinks)."""

    moment: Tensor
    background: Tensor
    first: Tensor


KeyStatistics = dict[int, LayerStatistics]

_BACKGROUND = 65_536
_FIRST = 1_024


def key_statistics(
    model: Any,
    tokenizer: Any,
    architecture: Architecture,
    layers: Sequence[int],
    source: StatisticsSource | None = None,
) -> KeyStatistics:
    """Statistics of the keys of `layers`, from the cache or measured now (and then cached).

    The cache file is named by a checksum of all weights but those of the blocks above the last
    hooked one, the tokenizer, the layers and the source. Raises `StatisticsError` on unusable text
    or non-finite keys.
    """
    if any(isinstance(module, HookLinear) for module in model.modules()):
        raise AttachError(
            "this model has hooks attached, and key statistics are those of the unedited model; "
            "detach the hooks first"
        )
    source = source or StatisticsSource()
    file = _cache_file(model, tokenizer, architecture, layers, source)
    if file.is_file():
        try:
            return _load(file, layers)
        except (SafetensorError, KeyError, OSError):
            file.unlink(missing_ok=True)
    with eval_mode(model):
        found = _measure(model, tokenizer, architecture, layers, source)
    try:
        _save(file, found)
    except OSError as error:
        logger.warning("key statistics are not cached: cannot write %s (%s)", file, error.strerror)
    return found


def _measure(
    model: Any,
    tokenizer: Any,
    architecture: Architecture,
    layers: Sequence[int],
    source: StatisticsSource,
) -> KeyStatistics:
    if source.path is None:
        with track("sampling text", source.n_tokens) as advance:
            batches: Iterable[Tensor] = list(
                corpus.sample_text(
                    model, tokenizer, source.n_tokens, seed=source.seed, progress=advance
                )
            )
    else:
        batches = corpus.file_text(
            Path(source.path),
            tokenizer,
            source.n_tokens,
            device=model.device,
            progress=lambda _: None,
        )
    modules = [architecture.down_projection(model, layer) for layer in layers]
    moments: list[Tensor] = []
    background: list[list[Tensor]] = [[] for _ in layers]
    count = 0
    with track("key statistics", source.n_tokens) as advance:
        for ids in batches:
            keys, _ = read_pass(model, {"input_ids": ids}, inputs_of=modules)
            for i, found in enumerate(keys):
                rows = found.reshape(-1, found.shape[-1])
                if not torch.isfinite(rows).all():
                    raise StatisticsError(
                        f"layer {layers[i]} has non-finite keys on ordinary text; load the model "
                        "in bfloat16 or float32"
                    )
                if len(moments) == i:
                    width = rows.shape[1]
                    moments.append(torch.zeros(width, width, device=rows.device))
                key_covariance_(moments[i], rows, mirror=False)
                if count < _BACKGROUND:
                    background[i].append(rows[: _BACKGROUND - count].to(torch.bfloat16).cpu())
            count += ids.numel()
            advance(ids.numel())
    starts = corpus.first_tokens(tokenizer, _FIRST, seed=source.seed)
    first, _ = read_pass(model, {"input_ids": starts.to(model.device)}, inputs_of=modules)
    return {
        layer: LayerStatistics(
            moment=(mirror_(moments[i]) / count).cpu(),
            background=torch.cat(background[i]),
            first=first[i][:, -1].to(torch.bfloat16).cpu().contiguous(),
        )
        for i, layer in enumerate(layers)
    }


def _cache_file(
    model: Any,
    tokenizer: Any,
    architecture: Architecture,
    layers: Sequence[int],
    source: StatisticsSource,
) -> Path:
    blocks = architecture.blocks(model)
    above = {id(p) for block in blocks[max(layers) + 1 :] for p in block.parameters()}
    digest = hashlib.sha256()
    for name, weight in model.state_dict(keep_vars=True).items():
        if id(weight) not in above:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            raw = weight.detach().cpu().contiguous().flatten()
            digest.update(raw.view(torch.uint8).numpy().data)
    recipe = {
        "model": model.config.model_type,
        "template": architecture.template,
        "weights": digest.hexdigest(),
        "vocabulary": [len(tokenizer), *tokenizer("")["input_ids"]],
        "layers": list(layers),
        "source": asdict(source),
        "text": None if source.path is None else _file_checksum(Path(source.path)),
        "length": corpus.SEQUENCE_LENGTH,
    }
    name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "statistics" / f"{name}.safetensors"


def _file_checksum(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StatisticsError(f"cannot read text from {path}: {error.strerror}") from error


def _save(file: Path, statistics: KeyStatistics) -> None:
    tensors = {}
    for layer, found in statistics.items():
        tensors[f"moment.{layer}"] = found.moment
        tensors[f"background.{layer}"] = found.background
        tensors[f"first.{layer}"] = found.first
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, staging = tempfile.mkstemp(dir=file.parent, prefix=".writing-")
    os.close(handle)
    try:
        save_file(tensors, staging)
        os.replace(staging, file)
    except BaseException:
        Path(staging).unlink(missing_ok=True)
        raise


def _load(file: Path, layers: Sequence[int]) -> KeyStatistics:
    with safe_open(file, framework="pt") as tensors:
        return {
            layer: LayerStatistics(
                moment=tensors.get_tensor(f"moment.{layer}"),
                background=tensors.get_tensor(f"background.{layer}"),
                first=tensors.get_tensor(f"first.{layer}"),
            )
            for layer in layers
        }
