"""Tensors that share memory, where parallel programs would read what others have written."""

from torch import Tensor


def share_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may hold the same bytes: the extents of both within one storage meet."""
    memory = one.untyped_storage().data_ptr()
    # Tensors without memory are all at zero.
    if memory == 0 or memory != other.untyped_storage().data_ptr():
        return False
    (first, last), (start, stop) = _extent(one), _extent(other)
    return bool(one.numel() and other.numel() and first < stop and start < last)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First byte of a tensor in its storage, and the first byte past its end."""
    first = int(tensor.storage_offset())
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((size - 1) * stride for size, stride in steps) + 1
    return first * tensor.element_size(), last * tensor.element_size()
