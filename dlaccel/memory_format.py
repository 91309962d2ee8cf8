"""The memory format of an image tensor, for fakes, fallbacks and kernels alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def suggests_channels_last(t: Tensor) -> bool:
    """Whether aten calls a 4-d tensor channels_last: its strides decide, also where several formats fit the sizes."""
    sizes, strides = t.shape, t.stride()
    if strides[1] == 0 or 0 in sizes:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        if strides[dim] < least or (dim == 0 and least == strides[1]):  # the second: (N, 1, 1, 1) counts as contiguous
            return False
        least = strides[dim] * sizes[dim]
    return True


def empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """An uninitialised 4-d tensor with like's dtype and device in one of the two memory formats."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def finished(t: Tensor, channels_last: bool) -> Tensor:
    """t as a fresh tensor with the strides of `empty`, also where a size of 1 leaves them open."""
    _, c, h, w = t.shape
    if t.stride() == ((c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1)) and not t._is_view():
        return t
    return empty(t, t.shape, channels_last).copy_(t)
