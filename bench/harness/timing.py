"""Timings of contenders against each other, and the machine's peak rates.

Contenders take turns within every round, so that other work on the machine affects all of them
alike; a ratio is the median over the rounds of the ratio within a round.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

Step = Callable[[], object]


@dataclass(frozen=True)
class Timings:
    """Seconds of one contender, one number for each round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The shortest round, which other work on the machine disturbed least."""
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        return _quartile_range(self.seconds) / self.median

    def over(self, other: "Timings") -> tuple[float, float]:
        """Time as a multiple of `other`'s: median and interquartile range over the rounds."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), _quartile_range(ratios)


def _quartile_range(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def seconds(step: Step, device: torch.device) -> float:
    """Seconds of one call of `step`; on a GPU those of the device."""
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def take_turns(
    steps: Mapping[str, Step],
    rounds: int,
    device: torch.device,
    before: Callable[[str], object] = lambda name: None,
) -> dict[str, Timings]:
    """Time every step once in each round; each round starts with another step.

    before: called untimed with the name of the step that comes next.
    """
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            before(name)
            found[name].append(seconds(steps[name], device))
        order.append(order.pop(0))
    return {name: Timings(values) for name, values in found.items()}


def in_a_row(steps: Sequence[Step]) -> Step:
    """All `steps` as one step."""
    return lambda: [step() for step in steps]


def captured(steps: list[Step], device: torch.device, warmups: int = 3) -> Step:
    """All `steps` in a row: one CUDA graph on a GPU, a loop elsewhere.

    Steps that read different tensors push each other's out of the last cache.
    """
    if device.type != "cuda":
        return in_a_row(steps)
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # Compilation and the choice of algorithms happen here, where the host may still wait.
        for step, _ in zip(cycle(steps), range(max(warmups, len(steps))), strict=False):
            step()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    return graph.replay


def _best(step: Step, device: torch.device, rounds: int) -> float:
    step()
    return min(seconds(step, device) for _ in range(rounds))


def copy_bandwidth(device: torch.device, rounds: int = 20) -> float:
    """Bytes a second of a large copy; bytes read and bytes written both count."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, rounds)


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 10) -> float:
    """Operations a second of a large square product."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product: Tensor = left @ right
    return 2 * size**3 / _best(lambda: torch.mm(left, right, out=product), device, rounds)
