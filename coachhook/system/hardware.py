"""What this machine offers now: free memory and arithmetic throughput."""

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

    On a CPU: the machine's available memory, or what is left of the process's cgroup limit if that
    is less. On a GPU: what the driver reports free, plus what torch has reserved but not allocated.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    available = int(psutil.virtual_memory().available)
    return min([available, *_cgroup_room(Path("/proc/self/cgroup"))])


def arithmetic_device(asked: str | None, own: torch.device) -> torch.device:
    """The device to compute in float64 on: `asked`, or if that is None `own` if it is a GPU, else
    the CPU. If `asked` is a GPU that does not exist, it is ignored with a warning."""
    own = own if own.type == "cuda" else torch.device("cpu")
    if asked is None:
        return own
    wanted = torch.device(asked)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        logger.warning("there is no %s here; %s is used in its place", wanted, own)
        return own
    return wanted


def _cgroup_room(membership: Path, root: Path = _CGROUPS) -> list[int]:
    """Bytes left below the limit of each memory cgroup (v1 or v2) that this process is in."""
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
            # In a container the path may be the host's; then only the root can be read here.
            if place == base.parent:
                break
            try:
                most = int((place / limit).read_text())  # "max" where there is no limit
                used = int((place / usage).read_text())
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue
            # The kernel drops cached files before it refuses memory.
            rooms.append(most - used + int(stat.get(cached, 0)))
    return rooms


@cache
def matmul_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Floating-point operations per second of `rows @ (width, width)`, measured once.

    width: clipped to 64 to 2,048.
    """
    width = min(max(width, 64), 2048)
    rows = torch.ones(256 if device.type == "cpu" else 4096, width, device=device, dtype=dtype)
    weight = torch.ones(width, width, device=device, dtype=dtype)
    torch.mm(rows, weight)
    best, started = float("inf"), _now(device)
    while (before := _now(device)) - started < _PROBE_SECONDS:
        torch.mm(rows, weight)
        # The fastest run: slower ones shared the machine with something else.
        best = min(best, _now(device) - before)
    return 2 * len(rows) * width**2 / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
