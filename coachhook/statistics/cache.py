"""Files of key statistics in the cache: finished statistics, and partial sums of running passes.

Every file name starts with the recipe, a checksum of everything the statistics depend on. Files
appear whole or not at all.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from coachhook.models.embedded import cache_dir
from coachhook.statistics.sums import KeySums
from coachhook.system.files import file_lock, replacing

logger = logging.getLogger(__name__)

# A partial file is saved once the work since the last save took this many times as long as it.
_WORK_PER_SAVE = 20


def cache_file(recipe: str) -> Path:
    """Where the finished statistics of a recipe are kept."""
    return cache_dir() / "statistics" / f"{recipe}.safetensors"


@contextmanager
def measuring(file: Path) -> Iterator[None]:
    """Lock `file` while it is being measured; another process that measures the same statistics
    waits, and then finds them finished. Where the lock cannot be written, nothing is locked."""
    lock = file.with_suffix(".lock")
    with ExitStack() as holding:
        try:
            try:
                holding.enter_context(file_lock(lock))
            except BlockingIOError:
                logger.warning("another process is measuring these key statistics; waiting for it")
                holding.enter_context(file_lock(lock, wait=True))
        except OSError as error:
            logger.info("key statistics are measured without a lock: %s", error)
        yield


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` to `file`. Raises OSError if that fails."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as staging:
        try:
            save_file(whole, staging, dict(metadata))
        except SafetensorError as error:
            raise OSError(None, str(error)) from error


class Partial:
    """Saves one pass's sums so far beside `file`, so that a later pass can resume from them.

    replaced: names of partial files whose shards this pass's sums include; the next save removes
    them.
    """

    def __init__(self, file: Path, replaced: Sequence[str]) -> None:
        self._file = file
        self._names = set(replaced)
        self._due = 0.0

    def keep(self, sums: KeySums) -> None:
        """Save `sums`, unless saving would take a large share of the time. If writing fails, warns
        once and never tries again."""
        started = time.monotonic()
        if started < self._due:
            return
        try:
            name = _save_partial(self._file, sums)
            for replaced in self._names - {name}:
                self._file.with_name(replaced).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("an interrupted pass would start again: cannot write (%s)", error)
            self._due = math.inf
            return
        self._names = {name}
        ended = time.monotonic()
        self._due = ended + _WORK_PER_SAVE * (ended - started)


def _save_partial(file: Path, sums: KeySums) -> str:
    # The name depends on the shards, so that partial files of different shards do not overwrite
    # each other.
    numbers = json.dumps(sorted(sums.shards))
    tag = hashlib.sha256(numbers.encode()).hexdigest()[:16]
    partial = file.with_name(f"{file.stem}.{tag}.partial")
    tensors = {f"moment.{layer}": moment for layer, moment in sums.moments.items()}
    for (layer, shard), rows in sums.background.items():
        tensors[f"background.{layer}.{shard}"] = rows
    write(partial, tensors, {"shards": json.dumps(list(sums.shards.items()))})
    return partial.name


def partial_shards(file: Path, widths: Mapping[int, int]) -> dict[str, list[int]]:
    """The partial files beside `file`, and the shards in each. Removes files that are broken or
    whose layers do not have these widths (`d_in` by layer)."""
    found = {}
    for partial in sorted(file.parent.glob(f"{file.stem}.*.partial")):
        try:
            with safe_open(partial, framework="pt") as tensors:
                shapes = {
                    layer: tuple(tensors.get_slice(f"moment.{layer}").get_shape())
                    for layer in widths
                }
                if shapes != {layer: (width, width) for layer, width in widths.items()}:
                    raise ValueError(f"{partial} holds moments of shapes {shapes}")
                found[partial.name] = [number for number, _ in _shards(tensors.metadata())]
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            logger.warning("a partial file of key statistics is broken, and removed: %s", error)
            partial.unlink(missing_ok=True)
    return found


def load_partial(partial: Path) -> KeySums:
    """Read what `Partial.keep` wrote."""
    sums = KeySums({})
    with safe_open(partial, framework="pt") as tensors:
        sums.shards = dict(_shards(tensors.metadata()))
        for name in tensors.keys():  # noqa: SIM118 (not a mapping)
            kind, layer, *shard = name.split(".")
            if kind == "moment":
                sums.moments[int(layer)] = tensors.get_tensor(name)
            else:
                sums.background[int(layer), int(shard[0])] = tensors.get_tensor(name)
    return sums


def divide(listings: Sequence[Mapping[str, Sequence[int]]]) -> list[list[str]]:
    """Assign partial files to processes: a list of names for each. listings: by process, the files
    it has and the shards in each. No shard is assigned twice, and a file only to a process that
    has it."""
    taken: list[list[str]] = [[] for _ in listings]
    known = {name: set(shards) for listing in listings for name, shards in listing.items()}
    done: set[int] = set()
    for name in sorted(known, key=lambda name: (-len(known[name]), name)):
        if done.isdisjoint(known[name]):
            done |= known[name]
            holders = [rank for rank, listing in enumerate(listings) if name in listing]
            taken[min(holders, key=lambda rank: len(taken[rank]))].append(name)
    return taken


def remove_partials(file: Path) -> None:
    """Remove the partial files of unfinished passes, not needed once `file` exists."""
    for partial in file.parent.glob(f"{file.stem}.*.partial"):
        partial.unlink(missing_ok=True)


def _shards(metadata: Mapping[str, str]) -> list[tuple[int, int]]:
    return [(int(number), int(n_tokens)) for number, n_tokens in json.loads(metadata["shards"])]
