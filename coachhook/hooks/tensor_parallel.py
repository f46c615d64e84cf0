"""Down-projections whose input is split over processes (row-parallel, in tensor parallelism).

Each process holds some columns of the weight and the same slice of every key. `A` and `F` are split
into the same columns, so that `A k` and `F k` are sums over the processes, like the layer's own
output, and are summed with it in one collective.
"""

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from coachhook.errors import AttachError


@dataclass(frozen=True)
class RowParallel:
    """This process's share of a row-parallel layer: the columns `start:stop` of `d_in`.

    mesh: the processes that share the layer, in one dimension. sums_alone: whether the base's own
    forward is known to do nothing but multiply, sum over the processes and add the bias.
    """

    mesh: DeviceMesh
    d_in: int
    start: int
    stop: int
    sums_alone: bool

    @classmethod
    def of(cls, base: nn.Module) -> "RowParallel | None":
        """How `base` is split; None if each process runs it on whole keys.

        Raises `AttachError` for a split that hooks cannot follow.
        """
        weight: Any = getattr(base, "weight", None)
        style = _style(base)
        split = isinstance(weight, DTensor) and any(map(_splits_keys, weight.placements))
        if not split and style is None:
            return None
        if not split or not _along_input(base, weight):
            raise AttachError(
                f"processes share a {type(base).__name__} in a way that hooks cannot follow; they "
                "follow a Linear whose unquantised weight is split along its input over one "
                "dimension of processes, as DistributedConfig(tp_plan='auto') does it"
            )
        if style is not None and style.output_layouts != Replicate():
            raise AttachError(
                "the output of a hooked layer must be whole in every process, not "
                f"{style.output_layouts}; use the plan 'rowwise' for it"
            )
        mesh = weight.device_mesh
        d_in = weight.shape[1]
        width = -(-d_in // mesh.size())
        start = min(mesh.get_local_rank() * width, d_in)
        stop = min(start + width, d_in)
        held = weight.to_local().shape[1]
        if held != stop - start:
            raise AttachError(
                f"this process holds {held} of {d_in} columns of a hooked layer's weight, not "
                f"{stop - start}; load the model with DistributedConfig(tp_plan='auto')"
            )
        return cls(mesh, d_in, start, stop, style is not None)

    def columns(self, matrix: Tensor) -> Tensor:
        """A copy of this process's columns of a whole matrix `(rows, d_in)`."""
        return matrix[:, self.start : self.stop].clone(memory_format=torch.contiguous_format)

    def own(self, keys: Tensor) -> Tensor:
        """This process's slice `(..., stop - start)` of keys: as given, or cut from whole keys
        `(..., d_in)`, which some plans pass to every process."""
        if keys.shape[-1] != self.d_in:
            return keys
        if torch.is_grad_enabled() and keys.requires_grad:
            whole = DTensor.from_local(keys, self.mesh, [Replicate()], run_check=False)
            return whole.redistribute(placements=[Shard(keys.ndim - 1)]).to_local()
        return keys[..., self.start : self.stop]

    def partial_weight(self, base: nn.Module) -> Tensor | None:
        """This process's columns of the weight if `base` only multiplies by them and sums over the
        processes; None if it may do more, so that its own forward must run."""
        if not self.sums_alone or type(base) is not nn.Linear:
            return None
        return local(base.weight)

    def sum(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each of `parts` `(..., n_i)` summed over the processes, by one collective for all.

        Every process gets the same numbers, and so opens the same gates. The sum is taken in the
        widest dtype among the parts; each part is returned in its own dtype. Over more than two
        processes, a part may round differently when summed with others than when summed alone.
        """
        flat = torch.cat(list(parts), dim=-1)
        if torch.is_grad_enabled() and flat.requires_grad:
            partial = DTensor.from_local(flat, self.mesh, [Partial()], run_check=False)
            flat = partial.redistribute(placements=[Replicate()]).to_local()
        else:
            dist.all_reduce(flat, group=self.mesh.get_group())
        pieces = flat.split([part.shape[-1] for part in parts], dim=-1)
        return [piece.to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]


def check_agreement(mesh: DeviceMesh, state: str) -> None:
    """Raise `AttachError`, in every process of `mesh`, unless all of them pass the same `state`."""
    digest = hashlib.sha256(state.encode()).digest()
    mine = torch.tensor(list(digest), device=mesh.device_type)
    found = [torch.empty_like(mine) for _ in range(mesh.size())]
    dist.all_gather(found, mine, group=mesh.get_group())
    differing = [i for i, other in enumerate(found) if not torch.equal(other, found[0])]
    if differing:
        raise AttachError(
            f"of the {len(found)} processes that share this model, number {differing[0]} is "
            "attaching other hooks than number 0; load the same folder in all of them, and "
            "enable and disable edits in all of them alike"
        )


def shared_by(model: nn.Module) -> DeviceMesh | None:
    """The processes that share the weights of `model`; None if they are whole in this one."""
    sharded = (p for p in model.parameters() if isinstance(p, DTensor))
    return next((parameter.device_mesh for parameter in sharded), None)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the weights of `model`."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(weight: Tensor) -> Tensor:
    """The whole of a weight. For a sharded weight this is a collective: every process must call it
    and gets a copy."""
    if not isinstance(weight, DTensor):
        return weight
    with torch.no_grad():
        return weight.full_tensor()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the tensor itself unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _splits_keys(placement: Any) -> bool:
    """Whether `placement` splits the input dimension of a `(d_out, d_in)` weight."""
    return getattr(placement, "dim", None) in (1, -1)


def _along_input(base: nn.Module, weight: DTensor) -> bool:
    """Whether `weight` is `base`'s unpacked weight, sharded in one dimension of processes."""
    if weight.device_mesh.ndim != 1 or type(weight.placements[0]) is not Shard:
        return False
    return isinstance(base, nn.Linear) and weight.shape == (base.out_features, base.in_features)


def _style(base: nn.Module) -> Any:
    """The row-parallel style of transformers that runs `base`, found through the forward that the
    style installed; None if no such forward is installed."""
    forward = base.__dict__.get("forward")
    if not inspect.isfunction(forward):
        return None
    style = inspect.getclosurevars(forward).nonlocals.get("self")
    return style if type(style).__name__ == "RowwiseParallel" else None
