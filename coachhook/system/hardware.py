"""What this machine has to offer now: free memory, and arithmetic per second."""

import logging
import time
from functools import cache
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)

_PROBE_SECONDS = 0.1
_CGROUPS = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int:
    """Memory that `device` can still give to this process, in bytes.

    On a CPU: what the machine has left, or what the process's cgroup leaves of its limit if that is
    less. On a GPU: what the driver reports free, and what torch holds there without using it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    available = int(psutil.virtual_memory().available)
    return min([available, *_cgroup_room(Path("/proc/self/cgroup"))])


def arithmetic_device(asked: str | None, own: torch.device) -> torch.device:
    """Where to compute in float64: where `asked`, else on `own` if that is a GPU, else on the CPU.
    A GPU that is not here is replaced with a warning."""
    own = own if own.type == "cuda" else torch.device("cpu")
    if asked is None:
        return own
    wanted = torch.device(asked)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        logger.warning("there is no %s here; %s is used in its place", wanted, own)
        return own
    return wanted


def _cgroup_room(membership: Path, root: Path = _CGROUPS) -> list[int]:
    """What every memory cgroup that this process is in (versions 1 and 2) leaves of its limit."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            base, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            # In a container the path may be that of the host, where only the root can be read.
            if place == base.parent:
                break
            try:
                most = int((place / limit).read_text())  # "max" where there is no limit
                used = int((place / usage).read_text())
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            # Cached files are given back before anything is refused.
            rooms.append(most - used + int(stat.get(cached, 0)))
    return rooms


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations a second of `rows @ (width, width)`, measured now."""
    width = min(max(width, 64), 2048)
    rows = torch.ones(256 if device.type == "cpu" else 4096, width, device=device, dtype=dtype)
    weight = torch.ones(width, width, device=device, dtype=dtype)
    torch.mm(rows, weight)
    best, started = float("inf"), _now(device)
    while (before := _now(device)) - started < _PROBE_SECONDS:
        torch.mm(rows, weight)
        # The fastest of them: others shared the machine with something else.
        best = min(best, _now(device) - before)
    return 2 * len(rows) * width**2 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
