"""A tensor object takes other data, of another shape, and stays the same object."""

import torch
from torch import Tensor

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def set_data(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` the values and shape of ``data``, in its own memory layout; the object stays the same.

    Args:
        tensor: a parameter or buffer. A ``.grad`` of another shape than ``data`` is dropped: it cannot stay.
        data: what it holds from now on; copied only where the layout differs.
    """
    swap_data(tensor, in_layout_of(tensor, data))


def swap_data(tensor: Tensor, data: Tensor) -> None:
    """Give ``tensor`` the very ``data``, layout and all.

    A leaf that requires grad may be watched by a live ``AccumulateGrad`` node (of a retained graph, or of DDP), which
    remembers the shape. ``Tensor.data`` makes torch forget that node only if type or device change, so the data go
    through an empty tensor of another type first. A ``.grad`` of another shape is dropped.
    """
    if tensor.is_leaf and tensor.requires_grad:
        other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
        grad, tensor.grad = tensor.grad, None
        tensor.data = torch.empty(0, dtype=other, device=tensor.device)
        tensor.data = data
        tensor.grad = grad if grad is not None and grad.shape == data.shape else None
    else:
        tensor.data = data


def in_layout_of(tensor: Tensor, data: Tensor) -> Tensor:
    """``data`` with the last dimensions first in memory if ``tensor`` has them so (``channels_last``).

    ``index_select`` loses that layout, and another layout is another kernel: slower, and not the same last bit.
    """
    layout = _FORMATS.get(tensor.ndim)
    if layout is None or data.ndim != tensor.ndim or not tensor.is_contiguous(memory_format=layout):
        return data
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return data
    new = torch.empty(data.shape, dtype=data.dtype, device=data.device, memory_format=layout)
    return new.copy_(data)
