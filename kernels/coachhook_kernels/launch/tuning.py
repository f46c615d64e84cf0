"""Launch configurations: measured ones in JSON files by device, a default where none is near.

`configs/<device>/<kernel>.json` is a list of `{"when": {...}, "config": {...}}`; `when` names the
problem's sizes, and the entry nearest in log size wins. Nothing is tuned at run time.
"""

import functools
import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
CONFIGS = Path(__file__).parents[1] / "configs"
Config = dict[str, int]


@functools.cache
def _entries(folder: str, kernel: str) -> list[dict[str, Any]]:
    path = CONFIGS / folder / f"{kernel}.json"
    if not path.exists():
        log.info("no measured configurations of %s for %s: defaults are used", kernel, folder)
        return []
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


@functools.cache
def device_folder(device: torch.device) -> str:
    """Folder name of a device's configurations: `nvidia_h200`, or `cpu` under the interpreter."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")


@functools.lru_cache(maxsize=4096)
def _nearest(folder: str, kernel: str, sizes: tuple[tuple[str, int], ...]) -> Config | None:
    wanted = dict(sizes)

    def distance(entry: dict[str, Any]) -> float:
        when = entry["when"]
        if when.keys() != wanted.keys():
            return math.inf
        return sum(abs(math.log2((wanted[k] + 1) / (when[k] + 1))) for k in when)

    entries = _entries(folder, kernel)
    best = min(entries, key=distance, default=None)
    if best is None or distance(best) > 2.0:
        return None
    config: Config = best["config"]
    return config


def lookup(kernel: str, device: torch.device, default: Config, **sizes: int) -> Config:
    """The measured configuration nearest to `sizes`, or `default` where the factors between its
    sizes and these multiply to more than 4."""
    found = _nearest(device_folder(device), kernel, tuple(sorted(sizes.items())))
    return default if found is None else found


def launchable(config: Config) -> Config:
    """The configuration to launch: at most two stages on an AMD GPU, whose local memory holds no
    more."""
    if torch.version.hip is None:
        return config
    return config | {"num_stages": min(config["num_stages"], 2)}
