"""A tensor object takes other data, of another shape, and stays the same object."""

import torch
from torch import Tensor


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` the storage and shape of ``data``; whoever holds the object sees the change.

    A leaf that requires grad may be watched by a live ``AccumulateGrad`` node (of a retained graph, or of DDP), which
    remembers the shape. ``Tensor.data`` makes torch forget that node only if type or device change, so the data go
    through an empty tensor of another type first.

    Args:
        tensor: a parameter or buffer. A ``.grad`` of another shape than ``data`` is dropped: it cannot stay.
        data: what it holds from now on; not copied.
    """
    if tensor.is_leaf and tensor.requires_grad:
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        grad, tensor.grad = tensor.grad, None
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = data
        tensor.grad = grad if grad is not None and grad.shape == data.shape else None
    else:
        tensor.data = data
