"""Key statistics of the hooked layers: second moment and background keys, in one streaming pass.

The text is cut into shards, which the processes of a job divide among themselves; their sums are
added up at the end. A pass that was killed resumes from the sums it had saved.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coachhook.errors import AttachError, StatisticsError
from coachhook.hooks.layer import HookLinear
from coachhook.hooks.memory import MemoryHook
from coachhook.models.architecture import Architecture
from coachhook.models.language_model import LanguageModel
from coachhook.models.passes import eval_mode, plainly
from coachhook.statistics import cache as files
from coachhook.statistics import text as corpus
from coachhook.statistics.cache import Partial
from coachhook.statistics.recipe import recipe_of
from coachhook.statistics.source import TOKENS_PER_WIDTH, StatisticsSource
from coachhook.statistics.sums import KeyReader, KeySums
from coachhook.statistics.text import Progress, Shard, TokenBatch
from coachhook.system.files import remove_unwritten
from coachhook.system.processes import ALONE, Processes
from coachhook.system.progress import track
from coachhook_kernels.key_covariance import mirror_

logger = logging.getLogger(__name__)

# Per layer: most keys of ordinary tokens that are kept, and how many first words are read.
MOST_BACKGROUND = 65_536
FIRST_WORDS = 1_024


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's keys.

    moment: mean of `k kᵀ`, float32 `(d_in, d_in)`; background: keys of ordinary tokens, bfloat16
    `(n, d_in)`; first: keys of texts' first words, bfloat16 `(m, d_in)`, which in many models are
    nearly equal (attention sinks); n_tokens: the number of keys averaged in `moment`.
    """

    moment: Tensor
    background: Tensor
    first: Tensor
    n_tokens: int


KeyStatistics = dict[int, LayerStatistics]


@plainly()
def key_statistics(
    lm: LanguageModel,
    architecture: Architecture,
    layers: Sequence[int],
    source: StatisticsSource | None = None,
    processes: Processes = ALONE,
    site: str = "down_projection",
) -> KeyStatistics:
    """Statistics of the keys of `layers`, from the cache or measured now (and then cached): of the
    inputs of their down-projections, or of those of their FFN (`site="ffn"`).

    The cache file is named by a checksum of the tokenizer, the layers, the source and all weights
    except those of the blocks above the last hooked one. Independent processes that measure the
    same statistics wait for the first of them. With `processes`, a collective: each reads its share
    of the text, and all return the same statistics.

    Raises `StatisticsError` on unusable text, non-finite keys, sharded weights or processes with
    different models, tokenizers or texts; `AttachError` if the model has hooks attached.
    """
    if any(isinstance(module, HookLinear | MemoryHook) for module in lm.model.modules()):
        raise AttachError(
            "this model has hooks attached, and key statistics are those of the unedited model; "
            "detach the hooks first"
        )
    source = source or StatisticsSource()
    sites = architecture.ffn if site == "ffn" else architecture.down_projection
    modules = {layer: sites(lm.model, layer) for layer in layers}
    with eval_mode(lm.model), ExitStack() as holding:
        widths = [architecture.width(lm.model, layer, site) for layer in layers]
        n_tokens = source.tokens_for(max(widths))
        recipe = recipe_of(lm, architecture, layers, source, n_tokens, site)
        if len(set(processes.gather_bytes(recipe.encode()))) > 1:
            raise StatisticsError(
                "the processes of this job have different models, tokenizers or texts; give all "
                "of them the same"
            )
        file = files.cache_file(recipe)
        statistics = _cached(file, layers, processes)
        if statistics is None:
            if processes.is_first:
                holding.enter_context(files.measuring(file))
            # Another process may have measured them while it held the lock.
            statistics = _cached(file, layers, processes)
        if statistics is None:
            shards = _shards(lm, source, n_tokens)
            with track("key statistics", n_tokens, shown=processes.is_first) as advance:
                reader = KeyReader(lm, modules)
                statistics = _measure(reader, shards, source.seed, file, processes, advance)
            if processes.is_first_on_host:
                _save(file, statistics)
            processes.everyone(True)
            files.remove_partials(file)
    return statistics


def _shards(lm: LanguageModel, source: StatisticsSource, n_tokens: int) -> Iterator[Shard]:
    if source.path is not None:
        return corpus.file_shards(Path(source.path), lm.tokenizer, n_tokens)
    return corpus.sampled_shards(lm, n_tokens, seed=source.seed)


def _measure(
    reader: KeyReader,
    shards: Iterator[Shard],
    seed: int,
    file: Path,
    processes: Processes,
    advance: Progress,
) -> KeyStatistics:
    starts = reader.read(
        TokenBatch(corpus.first_tokens(reader.lm.tokenizer, FIRST_WORDS, seed=seed))
    )
    sums = _empty(starts, processes)
    done, partial = _resume(file, sums, processes)
    for shard, n_before in _dealt(shards, done, processes, advance):
        n_background = min(shard.n_tokens, MOST_BACKGROUND - n_before)
        sums.add(reader, shard, shard.read(advance), n_background)
        partial.keep(sums)
    count = torch.tensor([sum(sums.shards.values())])
    processes.sum_([count, *sums.moments.values()])
    n_tokens = int(count)
    widest = max(len(moment) for moment in sums.moments.values())
    if n_tokens < widest and processes.is_first:
        logger.warning(
            "the text has %d tokens, fewer than the %d dimensions of a key: directions that it "
            "does not use count as hardly used, and edits may disturb more than they should; give "
            "at least %d tokens",
            n_tokens,
            widest,
            TOKENS_PER_WIDTH * widest,
        )
    return {
        layer: LayerStatistics(
            moment=mirror_(moment).div_(n_tokens).cpu(),
            background=_background(sums, layer, processes),
            first=starts[layer][:, -1].to("cpu", torch.bfloat16).contiguous(),
            n_tokens=n_tokens,
        )
        for layer, moment in sums.moments.items()
    }


def _empty(keys: Mapping[int, Tensor], processes: Processes) -> KeySums:
    """Empty sums on the keys' devices; on the CPU if memory there runs out in any process."""
    try:
        sums, fits = KeySums.like(keys), True
    except torch.OutOfMemoryError:
        sums, fits = KeySums.like(keys, on_cpu=True), False
    return sums if processes.everyone(fits) else KeySums.like(keys, on_cpu=True)


def _resume(file: Path, sums: KeySums, processes: Processes) -> tuple[set[int], Partial]:
    """Add to `sums` this process's part of the sums saved by interrupted passes. Returns the shards
    that no process needs to read again, and the `Partial` that saves this pass's sums."""
    if processes.is_first_on_host:
        remove_unwritten(file.parent, file.name)
    widths = {layer: len(moment) for layer, moment in sums.moments.items()}
    here = files.partial_shards(file, widths)
    listings = [json.loads(data) for data in processes.gather_bytes(json.dumps(here).encode())]
    taken = files.divide(listings)
    own = taken[processes.rank]
    for name in own:
        sums.absorb(files.load_partial(file.with_name(name)))
    known = {name: numbers for listing in listings for name, numbers in listing.items()}
    done = {number for names in taken for name in names for number in known[name]}
    return done, Partial(file, own)


def _dealt(
    shards: Iterator[Shard], done: set[int], processes: Processes, advance: Progress
) -> Iterator[tuple[Shard, int]]:
    """This process's share of the shards not `done`, each with the number of tokens in the text
    before it. Shards are dealt to the processes in turn."""
    n_before = turn = 0
    for shard in shards:
        is_done = shard.number in done
        if not is_done and turn % processes.size == processes.rank:
            yield shard, n_before
        else:
            advance(shard.n_tokens)
        turn += not is_done
        n_before += shard.n_tokens


def _background(sums: KeySums, layer: int, processes: Processes) -> Tensor:
    own = {str(number): rows for (k, number), rows in sums.background.items() if k == layer}
    gathered = processes.gather(own)
    return torch.cat([gathered[number] for number in sorted(gathered, key=int)])


def _cached(file: Path, layers: Sequence[int], processes: Processes) -> KeyStatistics | None:
    """Finished statistics from the cache, or None unless every process has them."""
    found = _load(file, layers)
    if not processes.everyone(found is not None):
        return None
    files.remove_partials(file)
    return found


def _save(file: Path, statistics: KeyStatistics) -> None:
    tensors = {}
    for layer, of_layer in statistics.items():
        tensors[f"moment.{layer}"] = of_layer.moment
        tensors[f"background.{layer}"] = of_layer.background
        tensors[f"first.{layer}"] = of_layer.first
    n_tokens = next(iter(statistics.values())).n_tokens
    try:
        files.write(file, tensors, {"n_tokens": str(n_tokens)})
    except OSError as error:
        logger.warning("key statistics are not cached: cannot write %s (%s)", file, error)


def _load(file: Path, layers: Sequence[int]) -> KeyStatistics | None:
    """Statistics from the cache file, or None if there is none. A broken file is removed."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            n_tokens = int(tensors.metadata()["n_tokens"])
            return {
                layer: LayerStatistics(
                    moment=tensors.get_tensor(f"moment.{layer}"),
                    background=tensors.get_tensor(f"background.{layer}"),
                    first=tensors.get_tensor(f"first.{layer}"),
                    n_tokens=n_tokens,
                )
                for layer in layers
            }
    except (SafetensorError, KeyError, TypeError, ValueError, OSError):
        file.unlink(missing_ok=True)
        return None
