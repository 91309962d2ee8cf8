"""Depthwise convolution in plain torch, for any device.

On the CPU aten runs oneDNN, whose fast depthwise kernels cover the forward with padding up to 6, the input gradient without
dilation (in bfloat16 also without stride), and the weight gradient of undilated kernels up to 3 wide. The rest takes generic
paths, 3 to 300 times slower than memory. Both gradients are themselves depthwise forward convolutions, so here, for float32
and bfloat16 on the CPU, they are asked for as such where that is faster:

    forward    padding > 6 is made by F.pad; a channel multiplier by repeating the channels; images go into the channels where
               those do not fill oneDNN's blocks of 16 (contiguous)
    dgrad      convolution of dy with flipped weights and padding dilation * (K - 1) - padding; a stride puts zeros into dy
    wgrad      convolution of x with dy as the filter, stride and dilation exchanged; N goes into the channels (contiguous),
               or one convolution per image (channels_last)

The rules below are measured (docs/ops/depthwise_conv2d.md; torch 2.13 with oneDNN 3.12 on Zen 5) and look at sizes only, so
that the same call always runs the same way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dlaccel.memory_format import empty, finished, suggests_channels_last

MAX_PADDING = 6  # of oneDNN's fast kernels
HANGS = 15  # width of a kernel from which oneDNN may never return, see _never_returns
SMALL = 2**17  # multiply-adds of a forward, below which being an operator costs more than the faster gradients save
TERMS = 1700  # that one float32 chain adds up in a weight gradient: more lose accuracy against aten's blocked sums
IMAGE = 2**19  # multiply-adds of an image, from which its own convolution is faster than aten's channels_last gradient
BLOCK, PIXELS, VALUES = 16, 576, 2**19  # oneDNN's block of channels; the results that it unpacks slowly from ragged ones

_unsafe_view = torch.ops.aten._unsafe_view.default  # as a view, but a tensor of its own for autograd: its base is dropped
_backward = torch.ops.aten.convolution_backward.default
Ints = Sequence[int]


@functools.cache
def _onednn_takes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        return bool(supported())
    return dtype == torch.float32


def _onednn(t: Tensor) -> bool:
    return t.is_cpu and _onednn_takes(t.dtype) and bool(torch.backends.mkldnn.enabled) and t.numel() > 0


def _ragged(x: Tensor, shape: Ints, stride: Ints, channels_last: bool) -> bool:
    """Whether a result of about shape / stride comes faster with images in the channels, whose blocks then are full."""
    n, c, *size = shape
    if not c % BLOCK or n * c % BLOCK or channels_last or x.dtype != torch.float32:
        return False
    pixels = math.prod(size) // math.prod(stride)
    return pixels >= PIXELS and n * c * pixels >= VALUES and _onednn(x)


def _one_image(t: Tensor) -> Tensor:
    return t.reshape(1, -1, *t.shape[2:])


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _never_returns(x: Tensor, weight: Tensor, padding: Ints) -> bool:
    """oneDNN 3.12 generates code without end for narrow bfloat16 images in channels_last under wide kernels."""
    width = x.shape[3] + padding[2] + padding[3] - weight.shape[3] + 1
    return x.dtype == torch.bfloat16 and weight.shape[0] <= 16 and weight.shape[3] >= HANGS and width >= 31


def _conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> Tensor:
    """aten's convolution of as many filters as channels, in a form that oneDNN's fast kernels take.

    padding: (top, bottom, left, right); a negative one crops.
    """
    if channels_last and _onednn(x) and _never_returns(x, weight, padding):
        channels_last = False
    memory_format = _format(channels_last)
    top, bottom, left, right = padding
    if min(padding) < 0:
        h, w = x.shape[2:]
        x = x[:, :, max(-top, 0) : h - max(-bottom, 0), max(-left, 0) : w - max(-right, 0)]
        top, bottom, left, right = (max(p, 0) for p in padding)
    x = x.contiguous(memory_format=memory_format)
    refused = max(top, left) > MAX_PADDING and (not channels_last or max(dilation) > 1) and _onednn(x)
    if refused or (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    n, channels = x.shape[:2]
    weight = weight.contiguous()  # in aten a channels_last weight would decide the format too
    if _ragged(x, x.shape, stride, channels_last):
        weight, bias = weight.repeat(n, 1, 1, 1), None if bias is None else bias.repeat(n)
        folded = F.conv2d(_one_image(x), weight, bias, stride, (top, left), dilation, n * channels)
        y: Tensor = _unsafe_view(folded, (n, channels, *folded.shape[2:]))
        return y
    return F.conv2d(x, weight, bias, stride, (top, left), dilation, channels)


def _repeated(x: Tensor, multiplier: int, channels_last: bool) -> Tensor:
    """Each channel `multiplier` times, in place."""
    if multiplier == 1:
        return x
    if channels_last:
        return x.movedim(1, -1).repeat_interleave(multiplier, -1).movedim(-1, 1)
    return x.repeat_interleave(multiplier, 1)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    if _onednn(x):
        x = _repeated(x, weight.shape[0] // x.shape[1], channels_last)
        return finished(_conv(x, weight, bias, stride, padding, dilation, channels_last), channels_last)
    top, bottom, left, right = padding
    groups = x.shape[1]
    if (top, left) != (bottom, right):
        x = F.pad(x, (left, right, top, bottom))
        top = left = 0
    return finished(F.conv2d(x, weight, bias, stride, (top, left), dilation, groups), channels_last)


def _native(dy: Tensor, x: Tensor, weight: Tensor, stride: Ints, padding: Ints, dilation: Ints, mask: list[bool]) -> Tensor:
    """aten's own gradient: of x or of weight, of which the other is only asked for its shape."""
    top, bottom, left, right = padding
    groups, symmetric = x.shape[1], (top, left) == (bottom, right)
    if not symmetric:
        h, w = x.shape[2:]
        x = F.pad(x, (left, right, top, bottom)) if mask[1] else x.new_empty((*x.shape[:2], h + top + bottom, w + left + right))
    pads = [top, left] if symmetric else [0, 0]
    gradients = _backward(dy, x, weight, None, stride, pads, dilation, False, [0, 0], groups, mask)
    if mask[1]:
        dweight: Tensor = gradients[1]
        return dweight
    dx: Tensor = gradients[0]
    return dx if symmetric else dx[:, :, top : top + h, left : left + w]


def _macs(y: Ints, kernel: Ints) -> int:
    return math.prod(y) * math.prod(kernel)


def _dgrad_by_convolution(
    dy: Tensor, kernel: Ints, multiplier: int, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> bool:
    if not _onednn(dy):
        return False
    if multiplier > 1:
        return not channels_last
    if max(dilation) > 1:
        return True
    if max(stride) > 1:
        return dy.dtype == torch.bfloat16
    if channels_last:
        return kernel[1] > 3 and not 11 <= kernel[1] <= 14  # oneDNN unrolls a forward of 11 to 14 taps too far
    return kernel[1] > 3 and all(k - 1 - padding[2 * d] <= MAX_PADDING for d, k in enumerate(kernel))


def _wgrad_by_convolution(dy: Tensor, kernel: Ints, dilation: Ints, channels_last: bool) -> bool:
    if not _onednn(dy) or (kernel[1] <= 3 and max(dilation) == 1):
        return False
    # aten's channels_last gradient: 3e9 multiply-adds a second, half of it with dilation, a quarter in bfloat16.
    slowness = 4 if dy.dtype == torch.bfloat16 else 2 if max(dilation) > 1 else 1
    return not channels_last or _macs(dy.shape[1:], kernel) * slowness >= IMAGE


def forward_is_atens(x: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether the forward below is one call of aten's with the same arguments, by sizes alone."""
    channels, one, _, width = weight.shape
    ragged = channels % BLOCK > 0 and x.dim() == 4 and x.is_contiguous() and _ragged(x, x.shape, (1, 1), False)
    return one == 1 and x.shape[-3] == channels and padding <= MAX_PADDING and width < HANGS and not ragged


def beats_aten(x: Tensor, weight: Tensor, y: Ints, stride: Ints, padding: Ints, dilation: Ints) -> bool:
    """Whether the functions below run something else than aten would, and gain more than an operator costs. y: its shape."""
    kernel = weight.shape[2:]
    if not _onednn(x):
        return False
    if x.shape[1] != weight.shape[0] or max(padding) > MAX_PADDING or _never_returns(x, weight, padding):
        return True
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    if _ragged(x, x.shape, stride, channels_last):
        return True
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad) or _macs(y, kernel) <= SMALL:
        return False
    if kernel[1] > 3 or max(dilation) > 1 or (max(stride) > 1 and x.dtype == torch.bfloat16):
        return True
    return x.requires_grad and _ragged(x, x.shape, (1, 1), channels_last)


def _spread(dy: Tensor, size: Ints, start: Ints, step: Ints, channels_last: bool) -> Tensor:
    """Zeros of this size, in which dy's pixel (i, j) stands at start + step * (i, j), where that is inside."""
    first = [max(0, -(start[d] // step[d])) for d in (0, 1)]
    last = [min(dy.shape[2 + d], (size[d] - 1 - start[d]) // step[d] + 1) for d in (0, 1)]
    grid = empty(dy, (*dy.shape[:2], *size), channels_last).zero_()
    if first[0] < last[0] and first[1] < last[1]:
        rows, columns = (slice(start[d] + first[d] * step[d], None, step[d]) for d in (0, 1))
        inside = dy[:, :, first[0] : last[0], first[1] : last[1]]
        grid[:, :, rows, columns][:, :, : inside.shape[2], : inside.shape[3]] = inside
    return grid


def depthwise_conv2d_dgrad(
    dy: Tensor, weight: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> Tensor:
    n, c, *size = shape
    multiplier = weight.shape[0] // c
    if not _dgrad_by_convolution(dy, weight.shape[2:], multiplier, stride, padding, dilation, channels_last):
        ragged = _ragged(dy, shape, (1, 1), channels_last)
        if ragged:
            dy, weight = _one_image(dy), weight.repeat(n, 1, 1, 1)
        x = empty(dy, (1, n * c, *size) if ragged else shape, channels_last)
        dx = _native(dy, x, weight, stride, padding, dilation, [True, False, False])
        return finished(_unsafe_view(dx, shape) if ragged else dx, channels_last)
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    before = [reach[d] - padding[2 * d] for d in (0, 1)]
    if max(stride) > 1:
        dy = _spread(dy, [size[d] + reach[d] for d in (0, 1)], before, stride, channels_last)
        pads = (0, 0, 0, 0)
    else:
        after = [size[d] + padding[2 * d] - dy.shape[2 + d] for d in (0, 1)]
        pads = (before[0], after[0], before[1], after[1])
    dx = _conv(dy, weight.flip(2, 3), None, (1, 1), pads, dilation, channels_last)
    if multiplier > 1:
        dx = dx.unflatten(1, (c, multiplier)).sum(2)
    return finished(dx, channels_last)


def _row_parts(
    x: Tensor, dy: Tensor, kernel_height: int, stride: Ints, padding: Ints, dilation: Ints, terms: int
) -> Iterator[tuple[Tensor, Tensor, Ints, int]]:
    """dy in parts of about `terms` pixels, with the rows of x and the padding for each, and the first row of the product."""
    height, (oh, ow) = x.shape[2], dy.shape[2:]
    if oh * ow <= terms:
        yield x, dy, padding, 0
        return
    rows = -(-oh // max(2, oh * ow // terms))
    for row in range(0, oh, rows):
        part = dy[:, :, row : row + rows]
        start = row * stride[0] - padding[0]
        stop = start + (part.shape[2] - 1) * stride[0] + (kernel_height - 1) * dilation[0] + 1
        if start >= height or stop <= 0:
            continue  # it sees padding only
        top, bottom, first = max(-start, 0), max(stop - height, 0), 0
        if (larger := max(top, bottom)) <= MAX_PADDING and (larger - top) % dilation[0] == 0:
            first, top, bottom = (larger - top) // dilation[0], larger, larger  # aten pads both sides alike: saves a copy
        yield x[:, :, max(start, 0) : min(stop, height)], part, (top, bottom, *padding[2:]), first


def depthwise_conv2d_wgrad(
    dy: Tensor, x: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> Tensor:
    n, filters = dy.shape[:2]
    kh, kw = shape[2:]
    if _onednn(x):
        x = _repeated(x, filters // x.shape[1], channels_last)
    if not _wgrad_by_convolution(dy, (kh, kw), dilation, channels_last):
        weight = x.new_empty(shape)
        x, dy = (t.contiguous(memory_format=_format(channels_last)) for t in (x, dy))
        return finished(_native(dy, x, weight, stride, padding, dilation, [False, True, False]), channels_last)
    # aten adds up by blocks, and is most accurate for wide kernels, least in channels_last: there the whole image will do.
    terms = TERMS // 2 if kh * kw >= 150 else dy.numel() if channels_last else TERMS
    dw = x.new_zeros(shape, dtype=torch.float32)
    for x_rows, dy_rows, pads, first in _row_parts(x, dy, kh, stride, padding, dilation, terms):
        if channels_last:
            for image, filter in zip(x_rows.split(1), dy_rows, strict=True):
                # .contiguous(): oneDNN wants the filter in this order first; aten's own copy into it is slower.
                products = _conv(image, filter.unsqueeze(1).contiguous(), None, dilation, pads, stride, True)
                dw += products[0, :, None, first : first + kh, :kw]
        else:
            images = x_rows.reshape(1, n * filters, *x_rows.shape[2:])
            products = _conv(images, dy_rows.reshape(n * filters, 1, *dy_rows.shape[2:]), None, dilation, pads, stride, False)
            dw += products[0, :, first : first + kh, :kw].reshape(n, *shape).sum(0, dtype=torch.float32)
    return finished(dw.to(x.dtype), channels_last)


def explain(name: str, *args: Any) -> str:
    if name == "depthwise_conv2d":
        x, weight, _, stride, padding, _ = args
        how = "aten.convolution"
        if _onednn(x) and max(padding) > MAX_PADDING:
            how += " behind F.pad"
        if _onednn(x) and weight.shape[0] > x.shape[1]:
            how += " of repeated channels"
        y = (len(x), len(weight), *x.shape[2:])
        ragged = _ragged(x, y, stride, suggests_channels_last(x) or suggests_channels_last(weight))
        return how + (", images in the channels" if ragged else "")
    dy, other, shape, stride, padding, dilation, channels_last = args
    if name == "depthwise_conv2d_dgrad":
        multiplier = dy.shape[1] // shape[1]
        composed = _dgrad_by_convolution(dy, other.shape[2:], multiplier, stride, padding, dilation, channels_last)
        how = "aten.convolution of dy with flipped weights" if composed else "aten.convolution_backward"
        result = (shape[0], dy.shape[1], *shape[2:])  # before the filters of a channel are added up
        return how + (", images in the channels" if _ragged(dy, result, (1, 1), channels_last) else "")
    composed = _wgrad_by_convolution(dy, shape[2:], dilation, channels_last)
    return "aten.convolution of x with dy as its filter" if composed else "aten.convolution_backward"
