"""The machine that a script runs on."""

import os
import platform
from typing import Any

import torch


def main_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """The name of `main_device()`, for people."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def machine() -> dict[str, Any]:
    """The properties of the machine that CPU timings depend on, JSON-ready."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def use_threads(threads: int | None) -> None:
    """Compute with this many CPU threads; None leaves the number unchanged."""
    if threads is not None:
        torch.set_num_threads(threads)
