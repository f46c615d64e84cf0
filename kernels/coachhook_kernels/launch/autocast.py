"""What autocast asks of an operation that stands for a linear layer."""

import torch
from torch import Tensor


def autocast_dtype(keys: Tensor) -> torch.dtype | None:
    """The dtype that autocast casts the keys of a linear layer to; None where it leaves them."""
    # Of meta tensors torch knows no autocast, and raises when asked.
    if keys.is_meta or keys.dtype == torch.float64:
        return None
    device = keys.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
