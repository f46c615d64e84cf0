"""Counters that the programs of one launch share: zero before a launch, and zero again after it.

Launches that may overlap must not share a set of counters, nor may series of launches that may
interleave. Launches on one stream never overlap, and a thread issues one series after another, so
each thread has one set for each stream. A launch captured into a CUDA graph keeps a set for good,
since the graph may be replayed on any stream.
"""

import threading
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

TILE_COUNTERS = 508
"""Tiles that a product in slices may have. Each has a counter, which goes back to zero with the
last slice."""

SET = 8 + 2 * TILE_COUNTERS
"""Counters in a set: eight for a series of launches as a whole, and those of two products."""

SETS_A_BLOCK = 1024


class _Thread(threading.local):
    captured: Tensor | None = None
    """The set that the present series of launches took for a graph."""


_thread = _Thread()
_lock = threading.Lock()
# Kept for good: a graph holds the address of its set, not the tensor.
_blocks: list[Tensor] = []
_free: dict[torch.device, list[Tensor]] = {}
_of_stream: dict[tuple[torch.device, int, int], Tensor] = {}


def counters(device: torch.device) -> Tensor:
    """int32 `(SET,)`, all zero, for a launch on the current stream of `device`."""
    if device.type != "cuda":
        return torch.zeros(SET, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device).cuda_stream
    with _lock:
        if torch.cuda.is_current_stream_capturing():
            _thread.captured = _take(device)
            return _thread.captured
        key = (device, stream, threading.get_ident())
        if key not in _of_stream:
            _of_stream[key] = _take(device)
        return _of_stream[key]


def begin_series() -> None:
    """What was taken for a graph before is not this series': that graph may be whole, and running,
    by the time this one breaks off."""
    _thread.captured = None


def discard() -> None:
    """Forget the streams' counters, because a series of launches broke off and may have left them
    above zero; a graph that is being captured sets its own to zero here at every replay."""
    with _lock:
        _of_stream.clear()
    captured, _thread.captured = _thread.captured, None
    if captured is not None and torch.cuda.is_current_stream_capturing():
        captured.zero_()


def _take(device: torch.device) -> Tensor:
    free = _free.setdefault(device, [])
    if not free:
        if torch.cuda.is_current_stream_capturing():
            # The graph owns this memory and zeroes it at every replay.
            return torch.zeros(SET, dtype=torch.int32, device=device)
        # In a new thread: this thread may be allocating from the pool of a CUDA graph that is being
        # warmed up, and the pool takes its memory back.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_add_block, device).result()
    return free.pop()


def _add_block(device: torch.device) -> None:
    block = torch.zeros(SETS_A_BLOCK, SET, dtype=torch.int32, device=device)
    # Another stream may use its set before this one's zeros are written.
    torch.cuda.current_stream(device).synchronize()
    _blocks.append(block)
    _free[device].extend(block.unbind())
