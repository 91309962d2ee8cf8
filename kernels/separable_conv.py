"""Depthwise-separable convolution in one kernel, for inference: y = act(W act(depthwise(x) + b1) + b2).

    mid[n, c, i, j] = act(b1[c] + sum over kh, kw of x[n, c // m, i SH - PH + kh DH, j SW - PW + kw DW] dw[c, kh, kw])
    y[n, f, i, j]   = act(b2[f] + sum over c of mid[n, c, i, j] pw[f, c])            act none, ReLU or ReLU6

Shapes: x (N, C, H, W), dw (C m, 1, KH, KW), b1 (C m,), pw (F, C m, 1, 1), b2 (F,), y (N, F, OH, OW); any strides. mid is
rounded to x's dtype, as by two operators. FLOPs: 2 N OH OW C m (KH KW + F). Training, whose gradients need mid, is left to two
operators.

A program owns ROWS image rows, T columns and FILTERS filters. It goes through the channels in blocks: slides along the image
rows as kernels/depthwise_conv.py does, which leaves T tiles of mid in registers, and multiplies each by the block's pointwise
weights on the tensor cores. mid never goes to memory.

**When one kernel pays.** Two kernels move x + 2 mid + y elements, one moves x + y: programs that share x are neighbours, it
comes from the L2. But every block of FILTERS filters computes mid again. Counted in compiled code (bf16, sm_90, stride 1), an
element of mid takes about 3 KH KW + 14 thread-instructions here (41 at 3x3, 87 at 5x5, 161 at 7x7), in the depthwise kernel
2 KH KW + 8. An H100 issues 8.9 of them in the time in which it moves a byte (0.8 of 33.5e12/s over 0.9 of 3.35e12/s). So with
s bytes an element, in units of one instruction,

    one kernel   max(8.9 s (x + y), blocks (3 KH KW + 14) mid)
    two          max(8.9 s (x + mid), (2 KH KW + 8) mid) + 8.9 s (mid + y)

and one kernel runs where that is GAIN times shorter: for x = mid = y at 3x3 and up to 256 filters (1.7 times in bfloat16 by
this model), in TF32 also at 5x5; not at 5x5 in bfloat16. Two kernels run otherwise, and in contiguous tensors, whose rows no
program could read in pieces of 16 bytes; in float32 without TF32, which the vendor's library multiplies at the rate of the
hardware; for more than 9 taps in a line; and for grids that leave multiprocessors idle. `explain` says which. It is a model:
not yet run on a GPU.
"""

# ruff: noqa: RUF005  (Triton concatenates tuples, it does not unpack them)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlaccel.memory_format import empty, finished, suggests_channels_last

from . import config, depthwise_conv
from .batch_norm import activated
from .config import Config, Target, cdiv, meta, power_of_two
from .depthwise_conv import UNROLLED_TAPS, divided, forward_line, geometry_of, multiple_of, offset, output_size
from .launch import Prepared

Ints = Sequence[int]

ISSUED_PER_BYTE = 8.9  # thread-instructions that an H100 issues in the time of a byte of memory traffic
GAIN = 1.25
TWO_KERNELS: Config = {}


@config.choice("separable_conv.forward")
def forward_config(
    target: Target, dtype: torch.dtype, direct: bool, rows: int, width: int, inputs: int, channels: int, filters: int,
    kernel_height: int, kernel_width: int,
) -> Config:  # fmt: skip
    """rows, width: image rows of y in all images, and their length; inputs: elements of x; channels: of the depthwise result.

    direct: the kernel reads in pieces of 16 bytes and multiplies on tensor cores. TWO_KERNELS: it does not pay.
    """
    if kernel_width > UNROLLED_TAPS:
        return TWO_KERNELS
    if target.interpreted:
        return {"ROWS": 16, "T": 2, "CHANNELS": 16, "FILTERS": 16}
    one = _blocks(dtype, power_of_two(filters, 16, 256))
    programs = cdiv(rows, one["ROWS"]) * cdiv(width, one["T"]) * cdiv(filters, one["FILTERS"])
    if not direct or programs < target.sms:
        return TWO_KERNELS
    taps, mid, outputs = kernel_height * kernel_width, rows * width * channels, rows * width * filters
    moved = ISSUED_PER_BYTE * dtype.itemsize
    one_kernel = max(moved * (inputs + outputs), cdiv(filters, one["FILTERS"]) * (3 * taps + 14) * mid)
    two = max(moved * (inputs + mid), (2 * taps + 8) * mid) + moved * (mid + outputs)
    return one if GAIN * one_kernel < two else TWO_KERNELS


def _blocks(dtype: torch.dtype, filters: int) -> Config:
    channels = 64 if dtype.itemsize == 2 and filters <= 128 else 32
    return {"ROWS": 16, "T": 4, "CHANNELS": channels, "FILTERS": filters, "num_warps": 8 if filters > 128 else 4}


def forward_candidates(target: Target, dtype: torch.dtype, direct: bool, *sizes: int) -> list[Config]:
    if not direct or sizes[-1] > UNROLLED_TAPS:
        return []
    filters = power_of_two(sizes[4], 16, 256)
    blocks = [_blocks(dtype, f) for f in (filters, filters // 2) if f >= 16]
    return [TWO_KERNELS, *blocks, *({**b, "CHANNELS": 96 - b["CHANNELS"]} for b in blocks)]


forward_config.candidates = forward_candidates


@triton.jit
def separable_forward_kernel(
    x, dw, db, pw, pb, y, images, channels, filters, x_height, x_width, height, width,
    stride_xn, stride_xc, stride_xh, stride_xw, stride_yn, stride_yf, stride_yh, stride_yw,
    stride_dwc, stride_dwh, stride_dww, stride_db, stride_pwf, stride_pwc, stride_pb,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, VEC: tl.constexpr,
    ROWS: tl.constexpr, T: tl.constexpr, CHANNELS: tl.constexpr, FILTERS: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    channels, filters = channels * VEC, filters * VEC
    filter_blocks, segments = tl.cdiv(filters, FILTERS), tl.cdiv(width, T)
    program = tl.program_id(0)
    f = (program % filter_blocks * FILTERS + tl.arange(0, FILTERS))[None, :]
    start = program // filter_blocks % segments * T
    rows = (program // filter_blocks // segments * ROWS + tl.arange(0, ROWS))[:, None]
    n, h, inside = rows // height, rows % height, rows < images * height
    zero = tl.zeros((ROWS, 1), dtype=tl.int32)
    out = ()
    for _ in tl.static_range(T):
        out = out + (tl.zeros((ROWS, FILTERS), dtype=ACCUMULATOR),)
    # Not pipelined: every tap's load would get a buffer in shared memory.
    for first in tl.range(0, channels, CHANNELS, num_stages=1):
        c = first + tl.arange(0, CHANNELS)
        valid = (c < channels)[None, :]
        mid = ()
        for _ in tl.static_range(T):
            mid = mid + (tl.zeros((ROWS, CHANNELS), dtype=ACCUMULATOR),)
        image = x + offset(n, stride_xn, VEC) + offset(c // MULTIPLIER, stride_xc)[None, :]
        taps = dw + offset(c, stride_dwc)[None, :]
        for kh in tl.range(0, KH, num_stages=1):
            xh = h * STRIDE_H - PAD_H + kh * DILATION_H
            mid = forward_line(
                mid, image + offset(xh, stride_xh, VEC), taps + kh * stride_dwh, start * STRIDE_W - PAD_W, x_width, stride_xw,
                stride_dww, inside & valid & (xh >= 0) & (xh < x_height), valid, zero, KW, STRIDE_W, DILATION_W, VEC, T,
                ACCUMULATOR,
            )  # fmt: skip
        weights = pw + offset(f, stride_pwf, VEC) + offset(c, stride_pwc)[:, None]
        weights = tl.load(weights, mask=(f < filters) & (c < channels)[:, None], other=0.0)
        if db is not None:
            shift = tl.load(db + offset(c, stride_db), mask=c < channels, other=0.0).to(ACCUMULATOR)[None, :]
        added = ()
        for t in tl.static_range(T):
            z = activated(mid[t] if db is None else mid[t] + shift, ACTIVATION).to(x.dtype.element_ty)
            added = added + (tl.dot(z, weights, out[t], input_precision=PRECISION, out_dtype=ACCUMULATOR),)
        out = added
    if pb is not None:
        bias = tl.load(pb + offset(f, stride_pb), mask=f < filters, other=0.0).to(ACCUMULATOR)
    line = y + offset(n, stride_yn, VEC) + offset(h, stride_yh, VEC) + offset(f, stride_yf)
    for t in tl.static_range(T):
        result = activated(out[t] if pb is None else out[t] + bias, ACTIVATION).to(y.dtype.element_ty)
        mask = inside & (start + t + zero < width) & (f < filters)
        tl.store(line + offset(start + t, stride_yw, VEC), result, mask=mask)


def _prepared(
    x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, pointwise_weight: Tensor, bias: Tensor | None,
    stride: Ints, padding: Ints, dilation: Ints, activation: str | None,
) -> _Plan:  # fmt: skip
    return _plan(
        x.device, x.dtype, x.shape, x.stride(), depthwise_weight.shape, depthwise_weight.stride(), _stride(depthwise_bias),
        pointwise_weight.shape, pointwise_weight.stride(), _stride(bias), tuple(stride), tuple(padding), tuple(dilation),
        activation, x.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32",
    )  # fmt: skip


class _Plan(NamedTuple):
    start: Prepared | None  # None: two kernels
    shape: tuple[int, ...]  # of y
    stride: tuple[int, ...]
    channels_last: bool
    sizes: tuple[int, ...]  # what forward_config was asked


@config.plan
def _plan(
    device: torch.device, dtype: torch.dtype, x_shape: Ints, x_stride: Ints, dw_shape: Ints, dw_stride: Ints, db_stride: int,
    pw_shape: Ints, pw_stride: Ints, pb_stride: int, stride: Ints, padding: Ints, dilation: Ints, activation: str | None,
    tf32: bool,
) -> _Plan:  # fmt: skip
    x, depthwise_weight, pointwise_weight = meta(x_shape, x_stride), meta(dw_shape, dw_stride), meta(pw_shape, pw_stride)
    channels_last = any(suggests_channels_last(t) for t in (x, depthwise_weight, pointwise_weight))
    kernel, (filters, channels) = dw_shape[2:], pw_shape[:2]
    size = output_size(x, kernel, stride, padding, dilation)
    y = empty(x, (x.shape[0], filters, *size), channels_last)
    direct = channels_last and x.stride(1) == 1 and (dtype.itemsize == 2 or tf32)
    sizes = (direct, x.shape[0] * size[0], size[1], x.numel(), channels, filters, *kernel)
    chosen = forward_config(device, dtype, *sizes)
    if chosen == TWO_KERNELS:
        return _Plan(None, y.shape, y.stride(), channels_last, sizes)
    vec = multiple_of(channels_last, math.gcd(filters, channels), x, y, pointwise_weight)
    programs = cdiv(x.shape[0] * size[0], chosen["ROWS"]) * cdiv(size[1], chosen["T"]) * cdiv(filters, chosen["FILTERS"])
    start = Prepared(
        separable_forward_kernel, (programs,), x.shape[0], channels // vec, filters // vec, *x.shape[2:], *size,
        *divided(x, vec), *divided(y, vec), dw_stride[0], *dw_stride[2:], db_stride,
        *divided(pointwise_weight, vec)[:2], pb_stride,
        **geometry_of(kernel, stride, padding[::2], dilation), MULTIPLIER=channels // x.shape[1], ACTIVATION=activation,
        PRECISION="tf32" if tf32 else "ieee", VEC=vec, ACCUMULATOR=config.accumulator(dtype), **chosen,
    )  # fmt: skip
    return _Plan(start, y.shape, y.stride(), channels_last, sizes)


def separable_conv2d(
    x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, pointwise_weight: Tensor, bias: Tensor | None,
    stride: Ints, padding: Ints, dilation: Ints, activation: str | None,
) -> Tensor:  # fmt: skip
    plan = _prepared(x, depthwise_weight, depthwise_bias, pointwise_weight, bias, stride, padding, dilation, activation)
    if plan.start is None:
        mid = depthwise_conv.depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
        y = torch.conv2d(_activated_(mid, activation), pointwise_weight, bias)
        return finished(_activated_(y, activation), plan.channels_last)
    y = x.new_empty_strided(plan.shape, plan.stride)
    plan.start(x, depthwise_weight, depthwise_bias, pointwise_weight, bias, y)
    return y


def _activated_(t: Tensor, activation: str | None) -> Tensor:
    return t if activation is None else t.relu_() if activation == "relu" else torch.nn.functional.hardtanh_(t, 0.0, 6.0)


def _stride(bias: Tensor | None) -> int:
    return 1 if bias is None else bias.stride(0)


def explain(name: str, x: Tensor, *args: Any) -> str:
    plan = _prepared(x, *args)
    source = forward_config.source(x.device, x.dtype, *plan.sizes)
    if plan.start is None:
        depthwise_weight, depthwise_bias, _, _, *geometry, _ = args
        first = depthwise_conv.explain("depthwise_conv2d", x, depthwise_weight, depthwise_bias, *geometry)
        return f"{first}, then the vendor library's 1x1 convolution, {source}"
    return f"separable_forward_kernel, {config.written(forward_config(x.device, x.dtype, *plan.sizes))}, {source}"
