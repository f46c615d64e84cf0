"""Peak memory since the last reading."""

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the last call: by the GPU's allocator, or resident in the process. On
    systems other than Linux, since the process started, in that system's unit."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    # Resets the peak to the memory resident now.
    Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) * 1024
