"""`HookLinear`: a drop-in for a down-projection that swaps in edited outputs token by token."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from coachhook.gates import Gate, GateReading
from coachhook_kernels import Delta, hook_correction


class HookState(StrEnum):
    """What a hook does: nothing, correct whatever it is told to (while an edit is under way), or
    correct the tokens its gate lets through."""

    OFF = "off"
    TEMPORARY = "temporary"
    VALIDATED = "validated"


class HookLinear(nn.Module):
    """`base(k)`, plus `Δ k` for the tokens whose gate is open (paper Eq. 15-20).

    base: the original module, of any kind; it is shared, never changed, and its own forward gives
    the unedited output. keys `(..., d_in)` in, outputs `(..., d_out)` out, whatever the leading
    shape. The forward has no host synchronisation. A `state_dict` of the surrounding model holds
    what it would hold without the hook.
    """

    down: Tensor
    up: Tensor | None

    def __init__(self, base: nn.Module, delta: Delta, gate: Gate) -> None:
        super().__init__()
        self.base = base
        self.gate = gate
        self.state = HookState.VALIDATED
        # The hook set that put it here.
        self.owner = ""
        # In the temporary state: which tokens to correct, bool of the keys' leading shape, or all.
        self.open_at: Tensor | None = None
        self.register_buffer("down", delta.down, persistent=False)
        self.register_buffer("up", delta.up, persistent=False)
        self.training = base.training
        self.register_state_dict_post_hook(_drop_base_prefix)
        self.register_load_state_dict_pre_hook(_add_base_prefix)

    @property
    def delta(self) -> Delta:
        return Delta(self.down, self.up)

    @property
    def weight(self) -> Any:
        """The base module's weight: some models look at its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base, "bias", None)

    def forward(self, keys: Tensor) -> Tensor:
        output: Tensor = self.base(keys)
        if self.state is HookState.OFF or self.down.shape[0] == 0:
            return output
        projected = self.delta.project(keys)
        return hook_correction(output, self.delta.expand(projected), self._open(keys, projected))

    def _open(self, keys: Tensor, projected: Tensor) -> Tensor:
        if self.state is HookState.TEMPORARY:
            if self.open_at is not None:
                return self.open_at.reshape(keys.shape[:-1])
            return torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device)
        return self.read(keys, projected).is_open

    def read(self, keys: Tensor, projected: Tensor | None = None) -> GateReading:
        """What the gate says of `keys`, without gradient: the gate is a constant to autograd."""
        with torch.no_grad():
            reading: GateReading = self.gate(
                keys, self.delta.project(keys) if projected is None else projected
            )
        return reading

    def extra_repr(self) -> str:
        form = "dense" if self.up is None else f"rank {self.down.shape[0]}"
        return f"gate={self.gate.name}, delta={form}, state={self.state}"


def _drop_base_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}base.")]:
        state[prefix + key[len(prefix) + len("base.") :]] = state.pop(key)


def _add_base_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(f"{prefix}base.")]:
        state[f"{prefix}base.{key[len(prefix) :]}"] = state.pop(key)
