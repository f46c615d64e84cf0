"""The interface of readouts: what a hook set puts on a model, and keeps up to date there."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from coachhook.config import EditConfig
from coachhook.hooks.gates import GateReading
from coachhook.hooks.layer import HookState
from coachhook.hooks.tensor_parallel import check_agreement
from coachhook.journal.journal import EditRecord, Journal
from coachhook.models.architecture import Architecture
from coachhook.models.base import BaseModel


class Hook(Protocol):
    """What stands on a model for one layer: `HookLinear` or `MemoryHook`.

    owner: identifies the hook set that attached it. site: the module whose input the gate reads.
    """

    state: HookState
    owner: str

    @property
    def site(self) -> nn.Module: ...

    @property
    def compared(self) -> str:
        """What a trace compares with the threshold: "score" or "z"."""

    @property
    def alpha(self) -> float:
        """The lowest z-score that opens the gate."""

    def read(self, keys: Tensor) -> GateReading:
        """The gate's reading of `keys`, without gradient."""

    def least_open(self) -> Tensor:
        """The threshold in units of what the gate compares, 0-d float32."""

    def warm_up(self, most_rows: int) -> None:
        """Run every variant of the kernels that up to `most_rows` tokens need, on zeros."""


@dataclass
class Readout:
    """What a set of edits is on a model. sketches: by layer `(F, offset)`, see `KeyedGate`."""

    base: BaseModel
    config: EditConfig
    sketches: Mapping[int, tuple[Tensor, Tensor]]
    journal: Journal

    name: ClassVar[str]

    @property
    def architecture(self) -> Architecture:
        return Architecture(self.base.template)

    @property
    def tells_edits_apart(self) -> bool:
        """Whether an edit is switched by its gate alone, and stays where it is written."""
        raise NotImplementedError

    def unsaid(self) -> list[EditRecord]:
        """Edits in force that tokens receive nothing of."""
        return []

    def agree(self, mesh: DeviceMesh) -> None:
        """Raise `AttachError`, in every process of `mesh`, unless all of them attach the same."""
        thresholds = [batch.thresholds for batch in self.journal.batches]
        state = (self.base.checksums, self.config, self.journal.edits(), thresholds)
        check_agreement(mesh, repr(state))

    def check(self, model: nn.Module) -> None:
        """Raise `AttachError` if hooks cannot follow how processes share `model`, or if these are
        about to attach different ones."""

    def attach(self, model: nn.Module, owner: str) -> None:
        """Put hooks on `model`, in place. Raises `AttachError` where they cannot follow it."""
        raise NotImplementedError

    def detach(self, model: nn.Module, owner: str) -> None:
        """Take the hooks of `owner` off; the model is what it was before, bit for bit."""
        raise NotImplementedError

    def hooks(self, model: nn.Module) -> Mapping[int, Any]:
        """The hook of each layer on `model`, see `Hook`; layers without one are left out."""
        raise NotImplementedError

    def refresh(self, model: nn.Module, layers: Sequence[int]) -> None:
        """Bring the hooks of some layers on `model` up to the journal."""
        raise NotImplementedError

    def switch(self, model: nn.Module) -> None:
        """Bring the hooks on `model` up to which edits are in force. Only where
        `tells_edits_apart`."""
        raise NotImplementedError

    def merge(self, keep: int) -> None:
        """Merge all batches of the journal but the last `keep`."""
        raise NotImplementedError

    def weights(self, model: nn.Module) -> Iterable[Tensor]:
        """The weights that identify the base model, one at a time. Raises
        `BaseModelMismatchError` where one cannot be compared."""
        raise NotImplementedError
