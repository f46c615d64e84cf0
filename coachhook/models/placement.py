"""Weights that accelerate keeps on the CPU or on disk until a layer runs (`device_map`)."""

import torch
from torch import Tensor, nn

from coachhook.errors import ModelError


def fetched(module: nn.Module, name: str = "weight") -> Tensor:
    """The tensor `name` of a module, fetched onto the CPU if it is kept elsewhere.

    Raises `ModelError` if it has no values anywhere.
    """
    tensor: Tensor = getattr(module, name)
    if not tensor.is_meta:
        return tensor
    # Imported here, because commands without a model should start at once.
    from accelerate.utils import align_module_device, has_offloaded_params

    if not has_offloaded_params(module):
        raise ModelError(
            f"a {type(module).__name__} has a {name} without values (it is on torch's meta "
            "device); load the model with its weights"
        )
    with align_module_device(module, torch.device("cpu")):
        here: Tensor = getattr(module, name).detach()
    return here


def parameters_of(model: nn.Module) -> list[Tensor]:
    """Every parameter once. Tied parameters are separate tensors while one is offloaded, so they
    are recognised by name."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name not in tied or parameter is model.get_parameter(tied[name])
    ]


def device_of(module: nn.Module) -> torch.device:
    """The device a module computes on; for an offloaded module, not where its weights are."""
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and not tensors[0].is_meta:
        return tensors[0].device
    placing = getattr(module, "_hf_hook", None)
    where = getattr(placing, "execution_device", None)
    return torch.device("cpu" if where is None else where)
