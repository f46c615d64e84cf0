"""The memory readout: a gate at the input of one block's FFN, and rows added after later blocks.

A token whose key resembles a fingerprint receives the row of that fingerprint's edit; all others
pass bit for bit. Nothing of the FFN has to be known (csrc_notes/method.md, "Memory").
"""

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from coachhook.hooks.gates.gate import GateReading
from coachhook.hooks.layer import HookState
from coachhook.models.passes import hidden_of, with_hidden
from coachhook_kernels import MemoryGate, memory_add_, memory_gate
from coachhook_kernels.launch.sizes import telling_rows

LEAST_ROOM = 64
"""Entries and fingerprints that there is room for at first."""

RIVAL, OFF = -1, -2
"""In place of a row: of a fingerprint that keeps closed what resembles it, and of one that is not
compared at all."""


class Entries(NamedTuple):
    """What the gate holds. fingerprints `(f, s)`: unit rows; edit int64 `(f,)`: the edit of each,
    and last the rivals', -1; row int64 `(f,)`: the row that it opens, `RIVAL` or `OFF`."""

    fingerprints: Tensor
    edit: Tensor
    row: Tensor


# Of every token: its score, and the row that it receives if it is open.
Seen = tuple[Tensor, Tensor]


class _Passing:
    """What the gate saw in the pass under way, for the blocks that come later in it. Other threads
    may run passes of their own through the same model. A copy of a model has its own."""

    def __init__(self) -> None:
        # Not by subclassing `local`: what a compiled graph puts into a subclass gets lost.
        self._of_thread = threading.local()

    def __reduce__(self) -> Any:
        return _Passing, ()

    def put(self, seen: Seen | None) -> None:
        self._of_thread.seen = seen

    def get(self) -> Seen | None:
        return getattr(self._of_thread, "seen", None)


class _Kept:
    """What the gate saw, by the input of a write block. Checkpointing runs the block again for its
    gradient: in a thread of autograd's, maybe, and when the gate has seen other passes since."""

    def __init__(self) -> None:
        self._of_input: dict[tuple[int, int], tuple[StorageWeakRef, Seen | None]] = {}

    def __reduce__(self) -> Any:
        return _Kept, ()

    def of(self, given: Tensor, seen: Seen | None) -> Seen | None:
        """What was seen when the input was `given` before; in a pass that is no repetition, keep
        `seen` for as long as the input is."""
        storage = StorageWeakRef(given.untyped_storage())
        place = storage.cdata, int(given.storage_offset())
        if torch._C._current_graph_task_id() >= 0:
            return self._of_input.get(place, (storage, seen))[1]
        kept = {k: v for k, v in self._of_input.items() if not v[0].expired()}
        self._of_input = kept | {place: (storage, seen)}
        return seen


class MemoryHook(nn.Module):
    """The gate, at the input `(..., d)` of `site`, the FFN of the gate block.

    A submodule of `site`, so that it moves with the model; none of its tensors is part of the
    model's state. They have room for more than there is, so that edits come and go in place:
    compiled and captured graphs see them in their next run. Where the room is outgrown, a compiled
    graph is compiled again; a captured one has to be captured again.
    """

    compared = "score"
    projection: Tensor
    offset: Tensor
    fingerprints: Tensor
    edit: Tensor
    row: Tensor
    enabled: Tensor
    threshold: Tensor

    def __init__(self, projection: Tensor, offset: Tensor, site: nn.Module) -> None:
        super().__init__()
        self.state = HookState.VALIDATED
        self.owner = ""
        self.handle: RemovableHandle | None = None
        # Lists, since these are no submodules: this is one of `site`, those are of their blocks.
        self._site = [site]
        self.written: list[MemoryRows] = []
        self.passing = _Passing()
        self._held = self._own = 0
        size = projection.shape[0]
        tensors = {
            "projection": projection,
            "offset": offset,
            "fingerprints": torch.zeros(0, size),
            "edit": torch.zeros(0, dtype=torch.long),
            "row": torch.zeros(0, dtype=torch.long),
            "enabled": torch.zeros(0, dtype=torch.bool),
            "threshold": torch.tensor(torch.inf),
        }
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def site(self) -> nn.Module:
        """The module whose input the gate reads."""
        return self._site[0]

    def hold(self, entries: Entries, threshold: float) -> None:
        """Put these fingerprints in place of the present ones."""
        n = self._held = len(entries.fingerprints)
        self._own = int((entries.edit >= 0).sum())
        if n > len(self.fingerprints):
            room = _room(n)
            self.fingerprints = self.fingerprints.new_zeros(room, self.projection.shape[0])
            self.edit, self.row = self.edit.new_zeros(room), self.row.new_zeros(room)
            self.enabled = self.enabled.new_zeros(room)
        self.enabled[n:] = False
        self.fingerprints[:n].copy_(entries.fingerprints)
        self.edit[:n].copy_(entries.edit)
        self.switch(entries.row)
        self.threshold.fill_(threshold)

    def switch(self, row: Tensor) -> None:
        """Which row each fingerprint opens, int64 `(f,)`, or `RIVAL` or `OFF`."""
        n = len(row)
        self.row[:n].copy_(row.clamp_min(RIVAL))
        self.enabled[:n].copy_(row > OFF)

    def gate(self, of: Tensor, n: int | None = None) -> MemoryGate:
        """For the kernels. of: what a fingerprint belongs to, its `row` or its `edit`; n: only the
        first fingerprints, where a pass may decide by what it holds (elsewhere all that fit)."""
        fingerprints, enabled = self.fingerprints, self.enabled
        if _is_seen(enabled):
            # No graph holds them: what there is room for beyond them need not be read.
            held = slice(self._held if n is None else n)
            fingerprints, of, enabled = fingerprints[held], of[held], enabled[held]
        return MemoryGate(self.projection, self.offset, fingerprints, of, enabled, self.threshold)

    def watch(self, site: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward pre-hook of `site`."""
        if self.state is HookState.OFF or len(self.fingerprints) == 0:
            self.passing.put(None)
            return
        # Rivals only close: where no edit is near, they need not be asked.
        seen = memory_gate(args[0], self.gate(self.row, self._own))
        if _all_closed(seen[0], self.threshold):
            self.passing.put(None)
            return
        if _is_seen(self.enabled) and self._held > self._own:
            seen = memory_gate(args[0], self.gate(self.row))
        self.passing.put(seen)

    @torch.no_grad()
    def read(self, keys: Tensor) -> GateReading:
        """The gate's reading of keys `(..., d)`."""
        score, edit = memory_gate(keys, self.gate(self.edit))
        return GateReading(score, score, (score >= self.threshold) & (edit >= 0), edit)

    @torch.no_grad()
    def warm_up(self, most_rows: int) -> None:
        """Run every variant of the kernels that up to `most_rows` tokens need, on zeros."""
        room = max(len(self.fingerprints), LEAST_ROOM)
        size = self.projection.shape[0]
        gate = MemoryGate(
            self.projection,
            self.offset,
            self.fingerprints.new_zeros(room, size),
            self.row.new_zeros(room),
            self.enabled.new_zeros(room),
            self.threshold,
        )
        for rows in telling_rows(most_rows):
            memory_gate(self.projection.new_zeros(1, rows, self.projection.shape[1]), gate)
        for part in self.written:
            part.warm_up()

    @property
    def alpha(self) -> float:
        """The lowest cosine that opens the gate, which stands for the z-score of other gates."""
        return float(self.threshold)

    def least_open(self) -> Tensor:
        """The threshold, 0-d float32."""
        return self.threshold

    def _apply(self, fn: Any, recurse: bool = True) -> "MemoryHook":
        # Follow the device but not the dtype: rounding to bfloat16 would change the threshold.
        threshold = self.threshold
        super()._apply(fn, recurse)
        self.threshold = threshold.to(self.threshold.device)
        return self

    def extra_repr(self) -> str:
        return f"fingerprints={int(self.enabled.sum())}, state={self.state}"


class MemoryRows(nn.Module):
    """The rows that are added to the output of one write block, of which this is a submodule."""

    rows: Tensor

    def __init__(self, memory: MemoryHook, d: int, is_last: bool) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(0, d), persistent=False)
        self.owner = memory.owner
        self.handle: RemovableHandle | None = None
        self._passing = memory.passing
        self._kept = _Kept()
        self._is_last = is_last
        # A list, since it is no submodule: it is one of the gate's block.
        self._memory = [memory]
        memory.written.append(self)

    def hold(self, rows: Tensor) -> None:
        """Put the rows `(e, d)` in place of the present ones."""
        if len(rows) > len(self.rows):
            self.rows = self.rows.new_zeros(_room(len(rows)), self.rows.shape[1])
        self.rows[: len(rows)].copy_(rows)

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run the kernel of this block once, on zeros."""
        output = self.rows.new_zeros(1, self.rows.shape[1])
        score = torch.zeros(1, device=output.device)
        row = torch.zeros(1, dtype=torch.long, device=output.device)
        memory_add_(output, score, row, score[0], torch.zeros_like(output))

    def add(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """A forward hook of the write block."""
        seen = self._passing.get()
        if self._is_last:
            self._passing.put(None)
        if args and _may_run_again(args[0]):
            seen = self._kept.of(args[0], seen)
        if seen is None or len(self.rows) == 0:
            return None
        hidden = hidden_of(output)
        shape = hidden.shape[:-1]
        score, row = (tensor.to(hidden.device).view(shape) for tensor in seen)
        threshold = self._memory[0].threshold.to(hidden.device)
        added = memory_add_(hidden, score, row, threshold, self.rows)
        return None if added is hidden else with_hidden(output, added)

    def extra_repr(self) -> str:
        return f"rows={tuple(self.rows.shape)}"


def _may_run_again(given: Any) -> bool:
    """Whether a block with this input may be run again for its gradient."""
    if torch.compiler.is_compiling() or not isinstance(given, Tensor):
        return False
    # Under torch.func a tensor has no storage to know it by.
    return given.requires_grad and not is_functorch_wrapped_tensor(given)


def _is_seen(tensor: Tensor) -> bool:
    """Whether a pass may decide by what this tensor holds: on a GPU it would wait for it, and what
    is traced or compiled is run for other tokens and edits, too."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not traced


def _all_closed(score: Tensor, threshold: Tensor) -> bool:
    """Whether no later block has anything to add, as far as that can be told."""
    return _is_seen(score) and not bool((score >= threshold).any())


def _room(n: int) -> int:
    """Doubling, so that a compiled graph is compiled again only when the number has doubled."""
    return max(LEAST_ROOM, 1 << (n - 1).bit_length())
