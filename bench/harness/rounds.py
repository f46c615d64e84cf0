"""Rounds of one operation under pytest-benchmark, on a GPU if there is one.

On a GPU a round is ten calls and one wait, and layers below some 50 MB stay in the last cache.
"""

from collections.abc import Callable
from typing import Any

import torch

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
CALLS = 10 if GPU else 1


def time_rounds(benchmark: Any, group: str, step: Callable[[], object]) -> None:
    """Time `step` as part of `group`, after one round that is not counted."""
    benchmark.group = group

    def run() -> None:
        for _ in range(CALLS):
            step()
        if GPU:
            torch.cuda.synchronize()

    with torch.no_grad():
        run()
        benchmark(run)
    benchmark.extra_info["calls_a_round"] = CALLS
