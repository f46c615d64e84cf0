"""`HookLinear`: a drop-in down-projection that adds `Δ k` at the tokens its gate selects."""

from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from transformers.pytorch_utils import Conv1D

from coachhook.hooks.gates import Gate, GateReading
from coachhook.hooks.tensor_parallel import RowParallel, local
from coachhook_kernels import (
    Delta,
    TokenGate,
    hook_correction,
    hook_correction_,
)
from coachhook_kernels.launch.sizes import MATCHED_ALONE, telling_rows


class HookState(StrEnum):
    """What a hook does: nothing (off), correct the tokens of `HookLinear.open_at` while a batch is
    written (temporary), or correct the tokens its gate opens at (validated)."""

    OFF = "off"
    TEMPORARY = "temporary"
    VALIDATED = "validated"


class HookLinear(nn.Module):
    """`base(k)`, plus `Δ k` for the tokens whose gate is open (paper Eq. 15-20).

    base: the original module, of any kind; it is shared, never changed, and its own forward gives
    the unedited output. Takes keys `(..., d_in)`, returns outputs `(..., d_out)`, for any leading
    shape, without host synchronisation. The surrounding model's `state_dict` is the same as without
    the hook.
    """

    down: Tensor
    up: Tensor | None

    def __init__(self, base: nn.Module, delta: Delta, gate: Gate) -> None:
        super().__init__()
        self.base = base
        self.gate = gate
        self.state = HookState.VALIDATED
        # Identifies the hook set that attached this hook.
        self.owner = ""
        # In the temporary state: the tokens to correct, bool in the keys' leading shape; None: all.
        self.open_at: Tensor | None = None
        # How processes share the base; None if each holds all of it.
        self.row_parallel: RowParallel | None = None
        self.register_buffer("down", delta.down, persistent=False)
        self.register_buffer("up", delta.up, persistent=False)
        self.training = base.training
        self.register_state_dict_post_hook(_drop_base_prefix)
        self.register_load_state_dict_pre_hook(_add_base_prefix)

    @property
    def delta(self) -> Delta:
        return Delta(self.down, self.up)

    @property
    def site(self) -> nn.Module:
        """The module whose input the gate reads."""
        return self

    @property
    def compared(self) -> str:
        """What a trace compares with the threshold: "score" or "z"."""
        return self.gate.compared

    @property
    def alpha(self) -> float:
        """The lowest z-score that opens the gate."""
        return float(self.gate.alpha)

    def least_open(self) -> Tensor:
        """The threshold in units of what the gate compares, 0-d float32."""
        return self.gate.least_open()

    @property
    def weight(self) -> Any:
        """The base module's weight: some models look at its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        return getattr(self.base, "bias", None)

    def forward(self, keys: Tensor) -> Tensor:
        if self.state is HookState.OFF or self.down.shape[0] == 0:
            unedited: Tensor = self.base(keys)
            return unedited
        if self.row_parallel is not None:
            return self._summed(keys, self.row_parallel)
        plain = not self._is_recast(keys) and not _differentiated_forward()
        if plain and self.state is HookState.VALIDATED:
            gated = self._gated(keys)
            if gated is not None:
                return gated
        output: Tensor = self.base(keys)
        projected = self.delta.project(keys)
        return hook_correction(output, self.delta.expand(projected), self._open(keys, projected))

    def _is_recast(self, keys: Tensor) -> bool:
        """Whether autocast changes the dtype of the keys, of Δ or of the bias for a product."""
        device = keys.device.type
        if not torch.is_autocast_enabled(device):
            return False
        dtype = torch.get_autocast_dtype(device)
        bias = self.bias
        return any(t.dtype != dtype for t in (keys, self.down)) or (
            isinstance(bias, Tensor) and bias.dtype != dtype
        )

    @torch.no_grad()
    def warm_up(self, most_rows: int) -> None:
        """Run every variant of the kernels that up to `most_rows` tokens need, on zeros. A Δ that
        further edits turn from factors to dense has others."""
        for rows in telling_rows(most_rows):
            for _ in self.gate.passes(rows):
                self(self.down.new_zeros(1, rows, self.down.shape[1]))
        gate = self.gate.per_token()
        if gate is None or gate.fingerprints is None or _plain_weight(self.base) is not None:
            return
        # Beside a base that runs by itself, many fingerprints are matched by a kernel of their own.
        crowded = gate._replace(
            fingerprints=gate.fingerprints.new_zeros(MATCHED_ALONE + 1, len(gate.fingerprints.T)),
            enabled=gate.fingerprints.new_zeros(MATCHED_ALONE + 1, dtype=torch.bool),
        )
        for rows in telling_rows(min(most_rows, 64)):
            keys = self.down.new_zeros(1, rows, self.down.shape[1])
            width = self.down.shape[0] if self.up is None else self.up.shape[0]
            hook_correction_(keys.new_zeros(1, rows, width), keys, self.delta, crowded)

    def split_over_processes(self) -> None:
        """If the base's keys are split over processes, keep only this process's columns of `A` and
        `F`. Raises `AttachError` for a split that hooks cannot follow."""
        self.row_parallel = RowParallel.of(self.base)
        if self.row_parallel is None:
            return
        self.down = self.row_parallel.columns(self.down)
        self.gate.split(self.row_parallel.columns)

    def _summed(self, keys: Tensor, shared: RowParallel) -> Tensor:
        """The output where processes share the base: the partial `W k`, `A k` and `F k` of all
        processes are summed in one collective, and all processes correct the same tokens."""
        own = shared.own(keys)
        products = self._products(own)
        weight = None if _is_watched(self.base) else shared.partial_weight(self.base)
        if weight is None:
            output: Tensor = self.base(keys)
            products = shared.sum(products)
        else:
            output, *products = shared.sum([linear(own, weight), *products])
            output = output if self.bias is None else output + local(self.bias)
        projected, *sketch = products
        is_open = self._open(own, projected, *sketch)
        return hook_correction(output, self.delta.expand(projected), is_open)

    def _products(self, keys: Tensor) -> list[Tensor]:
        """`A k`; and, without gradient, `F k` if the gate reads it."""
        with torch.no_grad():
            sketch = self.gate.sketch(keys)
        projected = self.delta.project(keys)
        return [projected] if sketch is None else [projected, sketch]

    def _gated(self, keys: Tensor) -> Tensor | None:
        """The validated output by one fused operation, or by two where the base must run by itself;
        None for a gate that the fused operations do not support."""
        weight = _plain_weight(self.base)
        if weight is not None and weight.dtype == keys.dtype:
            fused = self.gate.fused(keys, weight, self.bias, self.delta)
            if fused is not None:
                return fused
        gate = self.gate.per_token()
        return None if gate is None else self._corrected(keys, gate)

    def _corrected(self, keys: Tensor, gate: TokenGate) -> Tensor:
        """The base's own output, corrected."""
        output: Tensor = self.base(keys)
        if torch.is_grad_enabled() and (output.requires_grad or keys.requires_grad):
            score, _ = gate.read(keys.detach(), self.delta)
            corrected = self.delta.expand(self.delta.project(keys))
            return hook_correction(output, corrected, gate.is_open(score))
        # Another module, a watching hook or a forward put in place of the module's own may keep the
        # output: then it must not change in place.
        replaced = "forward" in self.base.__dict__
        watched = replaced or self.base._forward_hooks or has_any_global_hook()
        output = output.clone() if watched or not _gives_away(self.base) else output
        hook_correction_(output, keys, self.delta, gate)
        return output

    def _open(self, keys: Tensor, projected: Tensor, sketch: Tensor | None = None) -> Tensor:
        if self.state is HookState.TEMPORARY:
            if self.open_at is not None:
                return self.open_at.reshape(keys.shape[:-1])
            return torch.ones(keys.shape[:-1], dtype=torch.bool, device=keys.device)
        with torch.no_grad():
            reading: GateReading = self.gate(keys, projected, sketch)
        return reading.is_open

    def read(self, keys: Tensor) -> GateReading:
        """The gate's reading of `keys`, as passed to `forward`, without gradient: the gate is a
        constant to autograd. A collective where processes share the base."""
        with torch.no_grad():
            own = keys if self.row_parallel is None else self.row_parallel.own(keys)
            products = self._products(own)
            if self.row_parallel is not None:
                products = self.row_parallel.sum(products)
            reading: GateReading = self.gate(own, *products)
        return reading

    def extra_repr(self) -> str:
        form = "dense" if self.up is None else f"rank {self.down.shape[0]}"
        return f"gate={self.gate.name}, delta={form}, state={self.state}"


PLAIN = (Tensor, nn.Parameter)

# Quantised layers whose output is fresh at every call, by name since nobody has all of them.
QUANTISED = {
    "bitsandbytes.nn.modules.Linear4bit",
    "bitsandbytes.nn.modules.Linear8bitLt",
    "transformers.integrations.finegrained_fp8.FP8Linear",
}


def _gives_away(base: nn.Module) -> bool:
    """Whether this module is known to keep no reference to what it returns."""
    kind = type(base)
    return kind in (nn.Linear, Conv1D) or f"{kind.__module__}.{kind.__qualname__}" in QUANTISED


def _plain_weight(base: Any) -> Tensor | None:
    """The weight `(d_out, d_in)` of a base whose forward is just `W k + b`; None for any other,
    also if it is watched or wrapped (parametrisation, offloading, hooks, quantised or sharded
    weights)."""
    if type(base) not in (nn.Linear, Conv1D) or "forward" in base.__dict__:
        return None
    if _is_watched(base):
        return None
    weight: Tensor = base.weight
    bias: Tensor | None = base.bias
    # Quantised and sharded weights have tensor classes of their own.
    if type(weight) not in PLAIN or (bias is not None and type(bias) not in PLAIN):
        return None
    return weight if type(base) is nn.Linear else weight.mT


def _is_watched(base: nn.Module) -> bool:
    """Whether any of torch's module hooks would run when `base` is called."""
    if base._forward_hooks or base._forward_pre_hooks or has_any_global_hook():
        return True
    return bool(base._backward_hooks or base._backward_pre_hooks)


def _differentiated_forward() -> bool:
    """Whether forward-mode differentiation or another function transform is active, which the fused
    operations do not support."""
    if torch.compiler.is_compiling():
        return False
    return (
        forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _drop_base_prefix(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [k for k in state if k.startswith(f"{prefix}base.")]:
        state[prefix + key[len(prefix) + len("base.") :]] = state.pop(key)


def _add_base_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for key in [k for k in state if k.startswith(prefix) and not k.startswith(f"{prefix}base.")]:
        state[f"{prefix}base.{key[len(prefix) :]}"] = state.pop(key)
