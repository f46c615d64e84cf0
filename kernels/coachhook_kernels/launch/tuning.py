"""Launch configurations: measured ones in JSON files by device, a default where none is near.

`configs/<device>/<kernel>.json` is a list of `{"when": {...}, "config": {...}}`. `when` describes a
problem: sizes (integers) and kinds (strings, such as a layout or a gate). `config` is null where
the default was fastest; `measured` may say with what. Nothing is tuned at run time.
"""

import functools
import json
import logging
import math
import re
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parents[1] / "configs"
REACH = 2.0
"""Farthest entry that is taken: the sum over its sizes of the distances in powers of two."""

Config = dict[str, int]
Described = tuple[tuple[str, int | str], ...]


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The entries of one file of configurations. Raises ValueError where it is not what
    `lookup` understands."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list):
        raise ValueError("not a list of entries")
    for entry in entries:
        if not isinstance(entry, dict) or not {"when", "config"} <= entry.keys():
            raise ValueError(f"{entry!r} has no `when` and `config`")
        unknown = entry.keys() - {"when", "config", "measured"}
        if unknown:
            raise ValueError(f"nothing is known of {sorted(unknown)}")
        _require_values(entry["when"], "when", (int, str))
        if entry["config"] is not None:
            _require_values(entry["config"], "config", (int,))
    return entries


def _require_values(found: Any, name: str, kinds: tuple[type, ...]) -> None:
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{name} is {found!r}")
    for key, value in found.items():
        # A bool is an int to Python, and a negative size has no logarithm.
        if type(value) not in kinds or (type(value) is int and value < 0):
            raise ValueError(f"{name} has {key} = {value!r}")


@functools.cache
def _entries(folder: str, kernel: str) -> list[dict[str, Any]]:
    path = CONFIGS / folder / f"{kernel}.json"
    if not path.exists():
        log.info("no measured configurations of %s for %s: defaults are used", kernel, folder)
        return []
    try:
        return read_entries(path)
    except (OSError, ValueError) as error:
        log.warning("coachhook_kernels uses default configurations, not %s: %s", path, error)
        return []


@functools.cache
def device_folder(device: torch.device) -> str:
    """Folder name of a device's configurations: `nvidia_h200`, or `cpu` under the interpreter."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


@functools.lru_cache(maxsize=4096)
def _nearest(folder: str, kernel: str, described: Described) -> Config | None:
    wanted = dict(described)

    def distance(entry: dict[str, Any]) -> float:
        when = entry["when"]
        if when.keys() != wanted.keys():
            return math.inf
        total = 0.0
        for name, value in wanted.items():
            if isinstance(value, str) or isinstance(when[name], str):
                total += 0.0 if value == when[name] else math.inf
            else:
                total += abs(math.log2((value + 1) / (when[name] + 1)))
        return total

    best = min(_entries(folder, kernel), key=distance, default=None)
    if best is None or distance(best) > REACH:
        return None
    config: Config | None = best["config"]
    return config


@functools.cache
def _log_keys_once(folder: str, kernel: str, found: tuple[str, ...]) -> None:
    log.warning(
        "coachhook_kernels uses the default configuration of %s: those measured on %s are of "
        "another version, with %s",
        kernel,
        folder,
        ", ".join(found),
    )


def _measured(folder: str, kernel: str, described: Described, default: Config) -> Config | None:
    """The nearest measured configuration, if it has the default's parameters."""
    found = _nearest(folder, kernel, described)
    if found is None or found.keys() == default.keys():
        return found
    _log_keys_once(folder, kernel, tuple(found))
    return None


def lookup(kernel: str, device: torch.device, default: Config, **described: int | str) -> Config:
    """The measured configuration nearest to the problem described, or `default`.

    Strings must be equal; the default is taken where the factors between the sizes multiply to more
    than 4, and within a `Series` in which what was measured does not fit.
    """
    folder = device_folder(device)
    measured = _measured(folder, kernel, tuple(sorted(described.items())), default)
    series = _thread.series
    if series is None:
        return default if measured is None else measured
    return series.fitting(kernel, measured, default)


def launchable(config: Config) -> Config:
    """The configuration to launch: at most two stages on an AMD GPU, whose local memory holds no
    more."""
    if torch.version.hip is None:
        return config
    return config | {"num_stages": min(config["num_stages"], 2)}


class Use(NamedTuple):
    """A configuration that a series of launches, by its name, took for one of its kernels."""

    series: str
    kernel: str
    config: tuple[tuple[str, int], ...]


refused: set[Use] = set()
"""Those that want more of a GPU than it has."""


class _Thread(threading.local):
    series: "Series | None" = None


_thread = _Thread()


class Series:
    """A context in which `lookup` passes over configurations that do not fit on the GPU.

    After a launch inside it has failed, `refuse` chooses one to do without, and the launch can be
    tried again. name: of the launches that share what is found out.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.refused: list[Use] = []
        # Kernel, configuration, whether it was measured: the latest last.
        self._used: list[tuple[str, Config, bool]] = []
        self._cleared: set[Use] = set()
        self._required: int | None = None

    def __enter__(self) -> "Series":
        self._outer, _thread.series = _thread.series, self
        return self

    def __exit__(self, *_: object) -> None:
        _thread.series = self._outer

    def fitting(self, kernel: str, measured: Config | None, default: Config) -> Config:
        """The first that was not refused of: measured, default, the default with fewer stages."""
        config = default if measured is None else measured
        if refused:
            stages = range(default.get("num_stages", 1) - 1, 0, -1)
            possible = [config, default, *(default | {"num_stages": n} for n in stages)]
            fit = (c for c in possible if self._use(kernel, c) not in refused)
            config = next(fit, possible[-1])
        self._used.append((kernel, config, config is measured))
        return config

    def refuse(self, required: int) -> bool:
        """Pass over one more of the configurations used, since a launch wanted `required` of what
        the GPU has too little of. Whether there is one left to pass over."""
        if self.refused and required == self._required:
            # As much is wanted without it: another's launch it was.
            innocent = self.refused.pop()
            refused.discard(innocent)
            self._cleared.add(innocent)
        self._required = required
        # Measured ones first, then the latest look-up, which most likely is the one that failed.
        used, self._used = self._used[::-1], []
        for kernel, config, _ in sorted(used, key=lambda one: one[2], reverse=True):
            use = self._use(kernel, config)
            if use not in refused and use not in self._cleared:
                refused.add(use)
                self.refused.append(use)
                return True
        return False

    def _use(self, kernel: str, config: Config) -> Use:
        return Use(self.name, kernel, tuple(config.items()))
