"""The most memory held since one last looked."""

import re
import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes held since the last call: by the GPU's allocator, or resident in the process. On
    other systems than Linux a process has one mark, which is never set back."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    # The mark is then what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    return int(found[1]) * 1024
