"""Counters that the programs of one launch share: zero before a launch, and zero again after it.

Two launches that may overlap must not share them, nor two series of launches that may interleave.
Launches of one stream never overlap, and one thread's series follow each other, so a thread owns
one set on each stream; a launch captured into a CUDA graph owns one for good, since the graph may
be replayed on any stream.
"""

import threading

import torch
from torch import Tensor

SET = 8
"""Counters in a set: one 32-byte sector each, so that sets do not share one."""

SETS_A_BLOCK = 4096

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
            return _take(device)
        key = (device, stream, threading.get_ident())
        if key not in _of_stream:
            _of_stream[key] = _take(device)
        return _of_stream[key]


def discard() -> None:
    """Forget the streams' counters: a series of launches broke off and may have left them used."""
    with _lock:
        _of_stream.clear()


def _take(device: torch.device) -> Tensor:
    free = _free.setdefault(device, [])
    if not free:
        if torch.cuda.is_current_stream_capturing():
            # Memory of the graph's own, zeroed by the graph at every replay.
            return torch.zeros(SET, dtype=torch.int32, device=device)
        # In a thread of its own: this one's allocations may be going to the pool of a CUDA graph
        # that is being warmed up, which takes its memory back.
        thread = threading.Thread(target=_add_block, args=(device,))
        thread.start()
        thread.join()
    return free.pop()


def _add_block(device: torch.device) -> None:
    block = torch.zeros(SETS_A_BLOCK, SET, dtype=torch.int32, device=device)
    # Another stream may use its set before this one's zeros are written.
    torch.cuda.current_stream(device).synchronize()
    _blocks.append(block)
    _free[device].extend(block.unbind())
