"""Depthwise convolution: forward, input gradient (dgrad), weight gradient (wgrad).

    y[n, o, i, j]        = b[o] + sum over kh, kw of x[n, o // m, i SH - PH + kh DH, j SW - PW + kw DW] w[o, kh, kw]
    dx[n, c, h, w]       = sum over o // m = c and the taps with h + PH - kh DH = i SH, w + PW - kw DW = j SW
                           of dy[n, o, i, j] w[o, kh, kw]
    dw[o, kh, kw]        = sum over n, i, j of dy[n, o, i, j] x[n, o // m, i SH - PH + kh DH, j SW - PW + kw DW]

Shapes: x (N, C, H, W), w (C m, 1, KH, KW), y (N, C m, OH, OW); any strides. Saved for backward: x, w. Least traffic: x + y
for each of the three. FLOPs of each: 2 N C m OH OW KH KW.

**One kernel for both memory formats.** A program owns a tile of ROWS x LANES, whose lanes lie next to each other in memory,
and slides along the third axis: every element of the input that the tile needs is loaded once per filter line and multiplied
into all T results that use it, in registers. In channels_last the lanes are channels, the rows are image rows of all images,
and the tile slides along W. In contiguous tensors the lanes are columns, the rows are planes (n, c), and the tile slides
along H. So the kernels know two spatial axes only by their role: `a`, across, which the tile covers, and `s`, along which it
slides.

Contiguous results of images whose columns are neighbours in memory come from `depthwise_planes_kernel`: the forward
and, where the stride is 1, dgrad, which then is the forward with flipped weights. There a lane owns V neighbouring
columns: it reads them in one piece, and the V + KW - 1 columns that its results need stay in registers for all taps
across. With lanes of one column every row is read KW times, two bytes at a time: 67 instructions a result in bfloat16
on sm_90 at 3x3 instead of 19. `depthwise_planes_wgrad_kernel` does the same for the weight gradient: 20 instead of 53.

Taps along `s` are unrolled, lines of taps along `a` are a loop. That loop must not be pipelined (num_stages=1): every tap's
load would get a buffer in shared memory. Kernels without reuse along `s` (long, or dilated by more than a tile) run with
TAPS=1: both loops at run time.

dgrad is polyphase: with stride S only every S-th tap meets a gradient. Along `s` the phases are unrolled: T groups of S
results. Across, each lane or row finds its own first tap and steps by the period, so that nothing is multiplied in vain and
stores stay contiguous. Stride 1 is the case of one phase.

wgrad holds one accumulator per tap and lane, adds up its share of the images and writes partial sums, which are added in a
fixed order: bitwise deterministic, one read of x and dy.

Masked taps multiply 0 by the weight (in wgrad by the gradient): where that is inf or NaN, results near the border are NaN where
torch skips the tap.

Sources: the two reuse ideas are those of CUTLASS example 46 (sliding in registers) and of two-stage split sums; polyphase
transposed convolution is textbook signal processing.
"""

# ruff: noqa: RUF005  (Triton concatenates tuples, it does not unpack them)
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dlaccel.memory_format import empty, suggests_channels_last

from . import config
from .config import Config, Target, cdiv, meta, power_of_two
from .launch import Prepared

Ints = Sequence[int]
Layout = tuple[torch.Size, tuple[int, ...]]  # shape and strides

UNROLLED_TAPS = 9  # longer filters loop over their taps
ACCUMULATORS = 49  # taps of one wgrad program
UNROLLED_PLANE_TAPS = 49  # of a whole filter, in depthwise_planes_kernel
WAVES = 4  # wgrad programs per multiprocessor
HALO = 8  # columns and rows beyond its own that a tile of planes reads at most


def _slides(size: int, most: int) -> int:
    """How many results along `s` one program makes: few left over, then many."""
    return min((t for t in (8, 7, 4) if t <= most), key=lambda t: (cdiv(size, t) * t, -t))


def _most(channels: int) -> int:
    """Results along `s` in channels_last, at most: without wide loads every element's address takes registers."""
    return 7 if channels % 8 == 0 else 4


@config.choice("depthwise_conv.forward")
def forward_config(
    target: Target, dtype: torch.dtype, channels_last: bool, channels: int, across: int, along: int, taps: int
) -> Config:
    """channels, across, along: sizes of the output; taps: of a line along `s`."""
    if target.interpreted:
        return {"ROWS": 16, "LANES": 16, "T": 4}
    if channels_last:
        return {"ROWS": 16, "LANES": power_of_two(channels, 16, 64), "T": _slides(along, _most(channels)), "num_warps": 4}
    lanes = power_of_two(across, 8, 64)
    return {"ROWS": 256 // lanes, "LANES": lanes, "T": _slides(along, 8), "num_warps": 4}


@config.choice("depthwise_conv.planes")
def planes_config(target: Target, dtype: torch.dtype, aligned: bool, height: int, groups: int, taps: int) -> Config:
    """height, groups: rows of an image of the result, and blocks of columns in a row; aligned: they are read in one piece."""
    if target.interpreted:
        return {"ROWS": 16, "LANES": 2, "T": 4}
    lanes = power_of_two(groups, 1, 16)
    t = _slides(height, 8) if aligned and taps <= 9 else 4 if taps <= 25 else 2
    return {"ROWS": 128 // lanes, "LANES": lanes, "T": t, "num_warps": 4}


@config.choice("depthwise_conv.planes_wgrad")
def planes_wgrad_config(target: Target, dtype: torch.dtype, aligned: bool, height: int, groups: int, taps: int) -> Config:
    """height, groups: rows of an image of dy, and blocks of columns in a row; aligned: they are read in one piece."""
    if target.interpreted:
        return {"ROWS": 16, "LANES": 2, "T": 4}
    lanes = power_of_two(groups, 1, 16)
    t = 2 if taps > 25 else 7 if not aligned and height % 7 == 0 else 4  # Triton compiles many taps in tens of seconds
    return {"ROWS": 128 // lanes, "LANES": lanes, "T": t, "num_warps": 4}


@config.choice("depthwise_conv.dgrad")
def dgrad_config(
    target: Target, dtype: torch.dtype, channels_last: bool, channels: int, across: int, along: int, taps: int, stride: int
) -> Config:
    """channels, across, along: sizes of dx; a program makes T * stride results along `s`."""
    if target.interpreted:
        return {"ROWS": 16, "LANES": 16, "T": 4 if stride == 1 else 2}
    if channels_last:
        t = _slides(along, _most(channels)) if stride == 1 else 2
        return {"ROWS": 16, "LANES": power_of_two(channels, 16, 64), "T": t, "num_warps": 4}
    lanes = power_of_two(across, 8, 64)
    return {"ROWS": 256 // lanes, "LANES": lanes, "T": _slides(along, 8) if stride == 1 else 4, "num_warps": 4}


@config.choice("depthwise_conv.wgrad")
def wgrad_config(
    target: Target, dtype: torch.dtype, channels_last: bool, channels: int, across: int, along: int, taps: int, dilation: int
) -> Config:
    """across, along: sizes of dy; taps: accumulators of a program; dilation: along `s`."""
    if target.interpreted:
        return {"ROWS": 8, "LANES": 16, "T": 4}
    few, even = taps <= 9, along % 4 == 0
    elements = 512 if few else 256
    if channels_last:  # the loads of all lines are hoisted, and their addresses fill the registers
        elements = 256 if taps > 25 or dilation > 1 else 1024 if few and even else 512
    lanes = power_of_two(channels if channels_last else across, 8, 64)
    t = 4 if few or (taps <= 25 and even) else 2
    return {"ROWS": elements // lanes, "LANES": lanes, "T": t, "num_warps": 4}


def _around(chosen: Config, slides: Sequence[int]) -> list[Config]:
    """Other slides, and half or twice the tile or the warps."""
    rows = chosen["ROWS"]
    changes = [{"T": t} for t in slides if t != chosen["T"]]
    changes += [{"num_warps": 8}, {"ROWS": 2 * rows, "num_warps": 8}, *([{"ROWS": rows // 2}] if rows > 1 else [])]
    return [chosen | change for change in changes]


def forward_candidates(
    target: Target, dtype: torch.dtype, channels_last: bool, channels: int, across: int, along: int, taps: int
) -> list[Config]:
    chosen = forward_config.static(target, dtype, channels_last, channels, across, along, taps)
    return _around(chosen, (4, 7) if channels_last else (4, 7, 8))


def dgrad_candidates(
    target: Target, dtype: torch.dtype, channels_last: bool, channels: int, across: int, along: int, taps: int, stride: int
) -> list[Config]:
    chosen = dgrad_config.static(target, dtype, channels_last, channels, across, along, taps, stride)
    return _around(chosen, (1, 2) if stride > 1 else (4, 7) if channels_last else (4, 7, 8))


def planes_candidates(target: Target, dtype: torch.dtype, aligned: bool, height: int, groups: int, taps: int) -> list[Config]:
    chosen = planes_config.static(target, dtype, aligned, height, groups, taps)
    return _around(chosen, (4, 7, 8) if aligned and taps <= 9 else (2, 4) if taps <= 25 else (1, 2))


def wgrad_candidates(
    target: Target, dtype: torch.dtype, channels_last: bool, channels: int, across: int, along: int, taps: int, dilation: int
) -> list[Config]:
    chosen = wgrad_config.static(target, dtype, channels_last, channels, across, along, taps, dilation)
    return _around(chosen, (2, 4) if taps <= 25 else (1, 2))


def planes_wgrad_candidates(
    target: Target, dtype: torch.dtype, aligned: bool, height: int, groups: int, taps: int
) -> list[Config]:
    chosen = planes_wgrad_config.static(target, dtype, aligned, height, groups, taps)
    return _around(chosen, (2, 4, 7) if taps <= 25 else (1, 2))


forward_config.candidates = forward_candidates
planes_config.candidates = planes_candidates
planes_wgrad_config.candidates = planes_wgrad_candidates
dgrad_config.candidates = dgrad_candidates
wgrad_config.candidates = wgrad_candidates


@triton.jit
def tile_of_program(
    images, channels, across, along,
    CHANNELS_LAST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """(image, channel, position across, first position along, mask) of this program's tile.

    The first three have the shape (ROWS, 1) or (1, LANES). Neighbouring programs work on neighbouring memory.
    """
    lane_blocks = tl.cdiv(channels, LANES) if CHANNELS_LAST else tl.cdiv(across, LANES)
    segments = tl.cdiv(along, T)
    program = tl.program_id(0)
    lanes = (program % lane_blocks * LANES + tl.arange(0, LANES))[None, :]
    start = program // lane_blocks % segments * T
    rows = (program // lane_blocks // segments * ROWS + tl.arange(0, ROWS))[:, None]
    if CHANNELS_LAST:
        return rows // across, lanes, rows % across, start, (rows < images * across) & (lanes < channels)
    else:
        return rows // channels, rows % channels, lanes, start, (rows < images * channels) & (lanes < across)


@triton.jit
def offset(index, stride, VEC: tl.constexpr = 1):
    """Of an index along an axis across the lanes, whose stride comes divided by VEC: so Triton sees that it is a multiple."""
    return index.to(tl.int64) * stride * VEC


@triton.jit
def load_along(line, position, size, stride, mask, zero, VEC: tl.constexpr, ACCUMULATOR: tl.constexpr):
    """The tile's elements at a scalar position along `s`. `zero`: a block of zeros, which makes the comparison a block."""
    inside = (position + zero >= 0) & (position + zero < size)
    return tl.load(line + offset(position, stride, VEC), mask=mask & inside, other=0.0).to(ACCUMULATOR)


@triton.jit
def forward_line(
    acc, x_line, w_line, start, along, stride_xs, stride_ws, mask, w_mask, zero,
    TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Adds one line of taps: every element along `s` is loaded once and goes to all results that use it."""
    taps = ()
    for k in tl.static_range(TAPS):
        taps = taps + (tl.load(w_line + k * stride_ws, mask=w_mask, other=0.0).to(ACCUMULATOR),)
    for j in tl.static_range((T - 1) * STRIDE + (TAPS - 1) * DILATION + 1):
        value = load_along(x_line, start + j, along, stride_xs, mask, zero, VEC, ACCUMULATOR)
        added = ()
        for t in tl.static_range(T):
            if j - t * STRIDE >= 0 and (j - t * STRIDE) % DILATION == 0 and j - t * STRIDE < TAPS * DILATION:
                added = added + (acc[t] + value * taps[(j - t * STRIDE) // DILATION],)
            else:
                added = added + (acc[t],)
        acc = added
    return acc


@triton.jit
def depthwise_forward_kernel(
    x, w, y, b, images, channels, x_across, x_along, across, along,
    stride_xn, stride_xc, stride_xa, stride_xs, stride_yn, stride_yc, stride_ya, stride_ys,
    stride_wc, stride_wa, stride_ws, stride_b,
    KA: tl.constexpr, KS: tl.constexpr, STRIDE_A: tl.constexpr, STRIDE_S: tl.constexpr,
    PAD_A: tl.constexpr, PAD_S: tl.constexpr, DILATION_A: tl.constexpr, DILATION_S: tl.constexpr,
    MULTIPLIER: tl.constexpr, TAPS: tl.constexpr, HAS_BIAS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    channels *= VEC
    n, o, a, start, inside = tile_of_program(images, channels, across, along, CHANNELS_LAST, ROWS, LANES, T)
    zero = tl.zeros((ROWS, 1), dtype=tl.int32)
    acc = ()
    for _ in tl.static_range(T):
        acc = acc + (tl.zeros((ROWS, LANES), dtype=ACCUMULATOR),)
    image = x + offset(n, stride_xn, VEC) + offset(o // MULTIPLIER, stride_xc)
    w_mask = o < channels
    for i in tl.range(0, KA * (KS // TAPS), num_stages=1):
        ka, ks = i // (KS // TAPS), i % (KS // TAPS) * TAPS
        xa = a * STRIDE_A - PAD_A + ka * DILATION_A
        acc = forward_line(
            acc, image + offset(xa, stride_xa, VEC), w + offset(o, stride_wc) + ka * stride_wa + ks * stride_ws,
            start * STRIDE_S - PAD_S + ks * DILATION_S, x_along, stride_xs, stride_ws,
            inside & (xa >= 0) & (xa < x_across), w_mask, zero, TAPS, STRIDE_S, DILATION_S, VEC, T, ACCUMULATOR,
        )  # fmt: skip
    line = y + offset(n, stride_yn, VEC) + offset(o, stride_yc) + offset(a, stride_ya, VEC)
    if HAS_BIAS:
        bias = tl.load(b + offset(o, stride_b), mask=w_mask, other=0.0).to(ACCUMULATOR)
    for t in tl.static_range(T):
        result = acc[t] + bias if HAS_BIAS else acc[t]
        mask = inside & (start + t + zero < along)
        tl.store(line + offset(start + t, stride_ys, VEC), result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def split_columns(block, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """(LANES, COLUMNS) as so many blocks (LANES,): the first, second, ... of each lane's neighbours. COLUMNS: 2, 4 or 8."""
    if COLUMNS == 2:
        c0, c1 = tl.split(block)
        return (c0, c1)
    elif COLUMNS == 4:
        even, odd = tl.split(tl.reshape(block, (LANES, 2, 2)))
        c0, c2 = tl.split(even)
        c1, c3 = tl.split(odd)
        return (c0, c1, c2, c3)
    else:
        even, odd = tl.split(tl.reshape(block, (LANES, 2, 2, 2)))
        even04, even26 = tl.split(even)
        odd15, odd37 = tl.split(odd)
        c0, c4 = tl.split(even04)
        c2, c6 = tl.split(even26)
        c1, c5 = tl.split(odd15)
        c3, c7 = tl.split(odd37)
        return (c0, c1, c2, c3, c4, c5, c6, c7)


@triton.jit
def join_columns(c, first: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr):
    """The inverse, of the V blocks from c[first] on. V: 4 or 8."""
    if V == 4:
        even, odd = tl.join(c[first], c[first + 2]), tl.join(c[first + 1], c[first + 3])
    else:
        even = tl.join(tl.join(c[first], c[first + 4]), tl.join(c[first + 2], c[first + 6]))
        odd = tl.join(tl.join(c[first + 1], c[first + 5]), tl.join(c[first + 3], c[first + 7]))
    return tl.reshape(tl.join(even, odd), (LANES, V))


@triton.jit
def load_columns(row, column, width, mask, LANES: tl.constexpr, COLUMNS: tl.constexpr):
    """Neighbouring columns from this one on, in one piece, as a tuple."""
    if COLUMNS == 1:
        return (tl.load(row + column, mask=mask & (column >= 0) & (column < width), other=0.0),)
    else:
        block = column[:, None] + tl.arange(0, COLUMNS)[None, :]
        inside = mask[:, None] & (block >= 0) & (block < width)
        return split_columns(tl.load(row[:, None] + block, mask=inside, other=0.0), LANES, COLUMNS)


@triton.jit
def load_row(
    row, lane, width, mask, PAD: tl.constexpr, HALO: tl.constexpr, LANES: tl.constexpr, COLUMNS: tl.constexpr,
    PIECE: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Each lane's columns from PAD before its COLUMNS own to HALO behind them, as a tuple. Its own come PIECE at a time, those
    before FRONT, those behind BACK at a time."""
    BEFORE: tl.constexpr = (PAD + FRONT - 1) // FRONT * FRONT
    line = ()
    for i in tl.static_range(BEFORE // FRONT):
        line = line + load_columns(row, lane * COLUMNS + (i * FRONT - BEFORE), width, mask, LANES, FRONT)
    for i in tl.static_range(COLUMNS // PIECE):
        line = line + load_columns(row, lane * COLUMNS + i * PIECE, width, mask, LANES, PIECE)
    for i in tl.static_range((HALO + BACK - 1) // BACK):
        line = line + load_columns(row, lane * COLUMNS + (i * BACK + COLUMNS), width, mask, LANES, BACK)
    wide = ()
    for i in tl.static_range(PAD + COLUMNS + HALO):
        wide = wide + (line[BEFORE - PAD + i].to(ACCUMULATOR),)
    return wide


@triton.jit
def add_taps(z, line, taps, column: tl.constexpr, kh: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr):
    """Adds the taps of one filter line to a result, whose first column this is in `line`."""
    for kw in tl.static_range(KW):
        z += line[column + kw * DILATION] * taps[kh * KW + kw]
    return z


@triton.jit
def depthwise_planes_kernel(
    x, w, y, b, images, channels, x_height, x_width, height, width,
    stride_xn, stride_xc, stride_xh, stride_yn, stride_yc, stride_yh, stride_wc, stride_wh, stride_ww, stride_b,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, VEC: tl.constexpr, V: tl.constexpr,
    PIECE: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """T rows of results of ROWS planes (n, channel), V columns each of LANES lanes a row. The widths come divided by VEC, too.

    Planes and lanes share one axis of blocks: with two, Triton 3.6 lays them out differently for loads of V columns and of
    one, and moves all values between through shared memory.
    """
    x_width, width = x_width * VEC, width * VEC
    blocks, segments = tl.cdiv(width, LANES * V), tl.cdiv(height, T)
    program = tl.program_id(0)
    position = tl.arange(0, ROWS * LANES)
    lane = program % blocks * LANES + position % LANES
    start = program // blocks % segments * T
    plane = program // blocks // segments * ROWS + position // LANES
    n, o, exists = plane // channels, plane % channels, plane < images * channels
    w += offset(o, stride_wc)
    taps = ()
    for i in tl.static_range(KH * KW):
        tap = w + (KH - 1 - i // KW if FLIP else i // KW) * stride_wh + (KW - 1 - i % KW if FLIP else i % KW) * stride_ww
        taps = taps + (tl.load(tap, mask=exists, other=0.0).to(ACCUMULATOR),)
    image = x + offset(n, stride_xn, VEC) + offset(o // MULTIPLIER, stride_xc, VEC)
    zero = tl.zeros((ROWS * LANES,), dtype=tl.int32)
    REACH: tl.constexpr = (KW - 1) * DILATION_W - PAD_W - STRIDE_W + 1  # columns behind a lane's own
    acc = ()
    for _ in tl.static_range(T * V):
        acc = acc + (tl.zeros((ROWS * LANES,), dtype=ACCUMULATOR),)
    for j in tl.static_range((T - 1) * STRIDE_H + (KH - 1) * DILATION_H + 1):
        h = start * STRIDE_H - PAD_H + j
        line = load_row(
            image + offset(h, stride_xh, VEC), lane, x_width, exists & (h + zero >= 0) & (h + zero < x_height),
            PAD_W, REACH if REACH > 0 else 0, ROWS * LANES, V * STRIDE_W, PIECE, FRONT, BACK, ACCUMULATOR,
        )  # fmt: skip
        added = ()
        for i in tl.static_range(T * V):
            if (
                j - i // V * STRIDE_H >= 0
                and (j - i // V * STRIDE_H) % DILATION_H == 0
                and j - i // V * STRIDE_H < KH * DILATION_H
            ):
                z = add_taps(acc[i], line, taps, i % V * STRIDE_W, (j - i // V * STRIDE_H) // DILATION_H, KW, DILATION_W)
                added = added + (z,)
            else:
                added = added + (acc[i],)
        acc = added
    if HAS_BIAS:
        bias = tl.load(b + offset(o, stride_b), mask=exists, other=0.0).to(ACCUMULATOR)
    column = lane[:, None] * V + tl.arange(0, V)[None, :]
    line = y + offset(n, stride_yn, VEC) + offset(o, stride_yc, VEC)
    for t in tl.static_range(T):
        result = join_columns(acc, t * V, ROWS * LANES, V)
        if HAS_BIAS:
            result += bias[:, None]
        mask = (exists & (start + t + zero < height))[:, None] & (column < width)
        row = line + offset(start + t, stride_yh, VEC)
        tl.store(row[:, None] + column, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def dgrad_line(
    acc, dy_line, w_line, group, along, stride_dys, stride_ws, mask, w_mask, zero,
    KS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Adds one line of taps to T groups of STRIDE results. Result u meets dy's element e, both counted from the first group's,
    with tap (u + PAD - e STRIDE) / DILATION where that is one."""
    taps = ()
    for k in tl.static_range(KS):
        taps = taps + (tl.load(w_line + k * stride_ws, mask=w_mask, other=0.0).to(ACCUMULATOR),)
    for e in tl.static_range((PAD - (KS - 1) * DILATION) // STRIDE, (PAD + T * STRIDE - 1) // STRIDE + 1):
        value = load_along(dy_line, group + e, along, stride_dys, mask, zero, VEC, ACCUMULATOR)
        added = ()
        for u in tl.static_range(T * STRIDE):
            if u + PAD - e * STRIDE >= 0 and (u + PAD - e * STRIDE) % DILATION == 0 and u + PAD - e * STRIDE < KS * DILATION:
                added = added + (acc[u] + value * taps[(u + PAD - e * STRIDE) // DILATION],)
            else:
                added = added + (acc[u],)
        acc = added
    return acc


@triton.jit
def dgrad_tap(
    acc, dy_line, w_tap, first, along, stride_dys, mask, w_mask, zero,
    STRIDE: tl.constexpr, VEC: tl.constexpr, T: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Adds one tap to T * STRIDE results; result u meets dy's element (first + u) / STRIDE where that is whole."""
    tap = tl.load(w_tap, mask=w_mask, other=0.0).to(ACCUMULATOR)
    added = ()
    for u in tl.static_range(T * STRIDE):
        whole = (first + u + zero) % STRIDE == 0
        value = load_along(dy_line, (first + u) // STRIDE, along, stride_dys, mask & whole, zero, VEC, ACCUMULATOR)
        added = added + (acc[u] + value * tap,)
    return added


@triton.jit
def depthwise_dgrad_kernel(
    dy, w, dx, images, channels, across, along, dy_across, dy_along,
    stride_dyn, stride_dyc, stride_dya, stride_dys, stride_dxn, stride_dxc, stride_dxa, stride_dxs,
    stride_wc, stride_wa, stride_ws,
    KA: tl.constexpr, KS: tl.constexpr, STRIDE_A: tl.constexpr, STRIDE_S: tl.constexpr,
    PAD_A: tl.constexpr, PAD_S: tl.constexpr, DILATION_A: tl.constexpr, DILATION_S: tl.constexpr,
    MULTIPLIER: tl.constexpr, TAPS: tl.constexpr, PERIOD: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """PERIOD: STRIDE_A / gcd(STRIDE_A, DILATION_A), after which the phases of taps across repeat."""
    channels *= VEC
    n, c, a, start, inside = tile_of_program(images, channels, across, along, CHANNELS_LAST, ROWS, LANES, T * STRIDE_S)
    zero = tl.zeros((ROWS, 1), dtype=tl.int32)
    acc = ()
    for _ in tl.static_range(T * STRIDE_S):
        acc = acc + (tl.zeros((ROWS, LANES), dtype=ACCUMULATOR),)
    if STRIDE_A == 1:
        first = 0
    else:  # the first tap that meets a gradient; none: KA
        first = a * 0 + KA
        for k in tl.static_range(PERIOD - 1, -1, -1):
            first = tl.where((a + PAD_A + (STRIDE_A - 1) * DILATION_A * k) % STRIDE_A == 0, k, first)
    STEPS: tl.constexpr = (KA + PERIOD - 1) // PERIOD
    for i in tl.range(0, MULTIPLIER * STEPS * (KS // TAPS), num_stages=1):
        o = c if MULTIPLIER == 1 else c * MULTIPLIER + i // (STEPS * (KS // TAPS))
        ka = first + i // (KS // TAPS) % STEPS * PERIOD
        dya = (a + PAD_A - ka * DILATION_A) // STRIDE_A
        dy_line = dy + offset(n, stride_dyn, VEC) + offset(o, stride_dyc) + offset(dya, stride_dya, VEC)
        w_line = w + offset(o, stride_wc) + ka * stride_wa
        # Blocks on both sides of each &: Triton 3.9's interpreter makes no mask of a block and a scalar.
        w_mask = (c < channels) & (c * 0 + ka < KA)
        mask = inside & (a * 0 + ka < KA) & (a + PAD_A >= ka * DILATION_A) & (dya < dy_across)
        if TAPS == KS:
            acc = dgrad_line(
                acc, dy_line, w_line, start // STRIDE_S, dy_along, stride_dys, stride_ws, mask, w_mask, zero,
                KS, STRIDE_S, PAD_S, DILATION_S, VEC, T, ACCUMULATOR,
            )  # fmt: skip
        else:
            ks = i % KS
            acc = dgrad_tap(
                acc, dy_line, w_line + ks * stride_ws, start + PAD_S - ks * DILATION_S, dy_along, stride_dys,
                mask, w_mask, zero, STRIDE_S, VEC, T, ACCUMULATOR,
            )  # fmt: skip
    line = dx + offset(n, stride_dxn, VEC) + offset(c, stride_dxc) + offset(a, stride_dxa, VEC)
    for u in tl.static_range(T * STRIDE_S):
        mask = inside & (start + u + zero < along)
        tl.store(line + offset(start + u, stride_dxs, VEC), acc[u].to(dx.dtype.element_ty), mask=mask)


@triton.jit
def depthwise_wgrad_kernel(
    dy, x, partial, images, channels, across, along, x_across, x_along, steps_per_split,
    stride_dyn, stride_dyc, stride_dya, stride_dys, stride_xn, stride_xc, stride_xa, stride_xs,
    KA: tl.constexpr, KS: tl.constexpr, STRIDE_A: tl.constexpr, STRIDE_S: tl.constexpr,
    PAD_A: tl.constexpr, PAD_S: tl.constexpr, DILATION_A: tl.constexpr, DILATION_S: tl.constexpr,
    MULTIPLIER: tl.constexpr, TAPS_A: tl.constexpr, TAPS_S: tl.constexpr, EVEN_T: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Partial sums of TAPS_A x TAPS_S taps of one block of channels, over this split's share of the positions.

    grid (blocks of channels, groups of taps, splits); partial (splits, KA * KS, channels).
    """
    channels *= VEC
    CHANNELS: tl.constexpr = LANES if CHANNELS_LAST else ROWS
    block = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    ka0 = tl.program_id(1) // (KS // TAPS_S) * TAPS_A
    ks0 = tl.program_id(1) % (KS // TAPS_S) * TAPS_S
    split = tl.program_id(2)
    zero = tl.zeros((ROWS, 1), dtype=tl.int32)
    acc = ()
    for _ in tl.static_range(TAPS_A * TAPS_S):
        acc = acc + (tl.zeros((ROWS, LANES), dtype=ACCUMULATOR),)
    segments = tl.cdiv(along, T)
    lane_blocks = 1 if CHANNELS_LAST else tl.cdiv(across, LANES)
    steps = (tl.cdiv(images * across, ROWS) if CHANNELS_LAST else images * lane_blocks) * segments
    for step in tl.range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, steps), num_stages=1):
        start = step % segments * T
        if CHANNELS_LAST:
            rows = (step // segments * ROWS + tl.arange(0, ROWS))[:, None]
            n, o, a = rows // across, block[None, :], rows % across
            inside = (rows < images * across) & (o < channels)
        else:
            n, o = step // segments // lane_blocks, block[:, None]
            a = (step // segments % lane_blocks * LANES + tl.arange(0, LANES))[None, :]
            inside = (o < channels) & (a < across)
        dy_line = dy + offset(n, stride_dyn, VEC) + offset(o, stride_dyc) + offset(a, stride_dya, VEC)
        image = x + offset(n, stride_xn, VEC) + offset(o // MULTIPLIER, stride_xc)
        gradients = ()
        for t in tl.static_range(T):
            gradients = gradients + (load_along(dy_line, start + t, along, stride_dys, inside, zero, VEC, ACCUMULATOR),)
        for p in tl.static_range(TAPS_A):
            xa = a * STRIDE_A - PAD_A + (ka0 + p) * DILATION_A
            x_line = image + offset(xa, stride_xa, VEC)
            mask = inside & (xa >= 0) & (xa < x_across)
            for j in tl.static_range((T - 1) * STRIDE_S + (TAPS_S - 1) * DILATION_S + 1):
                position = start * STRIDE_S - PAD_S + ks0 * DILATION_S + j
                value = load_along(x_line, position, x_along, stride_xs, mask, zero, VEC, ACCUMULATOR)
                added = ()
                for i in tl.static_range(TAPS_A * TAPS_S):
                    if (
                        i // TAPS_S == p
                        and j - i % TAPS_S * DILATION_S >= 0
                        and (j - i % TAPS_S * DILATION_S) % STRIDE_S == 0
                        and j - i % TAPS_S * DILATION_S < T * STRIDE_S
                    ):
                        product = value * gradients[(j - i % TAPS_S * DILATION_S) // STRIDE_S]
                        if not EVEN_T:  # no gradient is 0, and 0 times an infinite x is not
                            exists = start + (j - i % TAPS_S * DILATION_S) // STRIDE_S + zero < along
                            product = tl.where(exists, product, 0.0)
                        added = added + (acc[i] + product,)
                    else:
                        added = added + (acc[i],)
                acc = added
    for i in tl.static_range(TAPS_A * TAPS_S):
        tap = (ka0 + i // TAPS_S) * KS + ks0 + i % TAPS_S
        total = tl.sum(acc[i], axis=0 if CHANNELS_LAST else 1)
        tl.store(partial + (split.to(tl.int64) * KA * KS + tap) * channels + block, total, mask=block < channels)


@triton.jit
def add_products(
    z, line, gradients, rest, row: tl.constexpr, column: tl.constexpr, STRIDE: tl.constexpr, V: tl.constexpr,
    EVEN_V: tl.constexpr,
):  # fmt: skip
    """Adds one row's products of a tap to its sum, whose first column in `line` this is. rest: a lane's columns in the row."""
    for v in tl.static_range(V):
        value = line[column + v * STRIDE]
        if not EVEN_V:  # no gradient is 0, and 0 times an infinite x is not
            value = tl.where(v < rest, value, 0.0)
        z += value * gradients[row * V + v]
    return z


@triton.jit
def depthwise_planes_wgrad_kernel(
    dy, x, partial, images, channels, height, width, x_height, x_width, steps_per_split,
    stride_dyn, stride_dyc, stride_dyh, stride_xn, stride_xc, stride_xh,
    KH: tl.constexpr, KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    MULTIPLIER: tl.constexpr, EVEN_T: tl.constexpr, EVEN_V: tl.constexpr, VEC: tl.constexpr, V: tl.constexpr,
    PIECE: tl.constexpr, FRONT: tl.constexpr, BACK: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, T: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Partial sums of all taps of ROWS channels, over LANES * V columns and this split's share of the rows, T at a time.

    grid (blocks of channels, blocks of columns, splits); partial (splits, blocks of columns, KW * KH, channels).
    """
    width, x_width = width * VEC, x_width * VEC
    position = tl.arange(0, ROWS * LANES)
    o = tl.program_id(0) * ROWS + position // LANES
    lane = tl.program_id(1) * LANES + position % LANES
    rest = width - lane * V  # columns from a lane's first to the end of the row
    split = tl.program_id(2)
    zero = tl.zeros((ROWS * LANES,), dtype=tl.int32)
    REACH: tl.constexpr = (KW - 1) * DILATION_W - PAD_W - STRIDE_W + 1  # columns behind a lane's own
    acc = ()
    for _ in tl.static_range(KH * KW):
        acc = acc + (tl.zeros((ROWS * LANES,), dtype=ACCUMULATOR),)
    segments = tl.cdiv(height, T)
    for step in tl.range(split * steps_per_split, tl.minimum((split + 1) * steps_per_split, images * segments), num_stages=1):
        n, start = step // segments, step % segments * T
        gradients = ()
        for t in tl.static_range(T):
            gradients = gradients + load_row(
                dy + offset(n, stride_dyn, VEC) + offset(o, stride_dyc, VEC) + offset(start + t, stride_dyh, VEC),
                lane, width, (o < channels) & (start + t + zero < height),
                0, 0, ROWS * LANES, V, PIECE if PIECE < V else V, 1, 1, ACCUMULATOR,
            )  # fmt: skip
        image = x + offset(n, stride_xn, VEC) + offset(o // MULTIPLIER, stride_xc, VEC)
        for j in tl.static_range((T - 1) * STRIDE_H + (KH - 1) * DILATION_H + 1):
            h = start * STRIDE_H - PAD_H + j
            line = load_row(
                image + offset(h, stride_xh, VEC), lane, x_width,
                (o < channels) & (h + zero >= 0) & (h + zero < x_height),
                PAD_W, REACH if REACH > 0 else 0, ROWS * LANES, V * STRIDE_W, PIECE, FRONT, BACK, ACCUMULATOR,
            )  # fmt: skip
            added = ()
            for i in tl.static_range(KH * KW):
                if (
                    j - i // KW * DILATION_H >= 0
                    and (j - i // KW * DILATION_H) % STRIDE_H == 0
                    and j - i // KW * DILATION_H < T * STRIDE_H
                ):
                    z = add_products(
                        acc[i], line, gradients, rest, (j - i // KW * DILATION_H) // STRIDE_H, i % KW * DILATION_W,
                        STRIDE_W, V, EVEN_V,
                    )  # fmt: skip
                    if not EVEN_T:
                        z = tl.where(start + (j - i // KW * DILATION_H) // STRIDE_H + zero < height, z, acc[i])
                    added = added + (z,)
                else:
                    added = added + (acc[i],)
            acc = added
    block = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    line = partial + ((split * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * KW * KH) * channels + block
    for i in tl.static_range(KH * KW):
        total = tl.where(rest > 0, acc[i], 0.0)  # lanes past the row have multiplied 0 by what is there
        total = tl.sum(tl.reshape(total, (ROWS, LANES)), axis=1)
        tl.store(line + (i % KW * KH + i // KW) * channels, total, mask=block < channels)


def _by_role(channels_last: bool, pair: Ints) -> tuple[int, int]:
    """(across, along) of (height, width)."""
    height, width = pair
    return (height, width) if channels_last else (width, height)


def multiple_of(channels_last: bool, channels: int, *tensors: Tensor) -> int:
    """What divides the number of channels and all strides but theirs, where channels are lanes: see `offset`; 16 needs none."""
    strides = [s for t in tensors for d, s in enumerate(t.stride()) if d != 1 and t.shape[d] > 1]
    divisor = math.gcd(16, channels, *strides)
    return divisor if channels_last and divisor < 16 else 1


def divided(t: Tensor, vec: int) -> list[int]:
    """The strides as `offset` takes them."""
    return [s if d == 1 else s // vec for d, s in enumerate(t.stride())]


def _strides(t: Tensor, channels_last: bool, vec: int) -> tuple[int, ...]:
    n, c, *spatial = divided(t, vec)
    return (n, c, *_by_role(channels_last, spatial))


def output_size(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> list[int]:
    """Height and width of y."""
    return [
        (x.shape[2 + d] + padding[2 * d] + padding[2 * d + 1] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
        for d in (0, 1)
    ]


def geometry_of(kernel: Ints, stride: Ints, front: Ints, dilation: Ints, axes: str = "HW") -> dict[str, int]:
    """The constants that all kernels share. Only the padding in front matters: sizes say the rest."""
    pairs = {"K": kernel, "STRIDE_": stride, "PAD_": front, "DILATION_": dilation}
    return {name + axis: value for name, pair in pairs.items() for axis, value in zip(axes, pair, strict=True)}


def _geometry(channels_last: bool, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> dict[str, int]:
    """The same, by role."""
    return geometry_of(*(_by_role(channels_last, pair) for pair in (kernel, stride, padding[::2], dilation)), axes="AS")


def _unrolls(geometry: dict[str, int], results: int) -> bool:
    """Whether neighbouring results share elements, and the taps along `s` are few enough to unroll."""
    return geometry["KS"] <= UNROLLED_TAPS and (geometry["KS"] == 1 or geometry["DILATION_S"] < results)


def _programs(shape: Ints, channels_last: bool, chosen: Config, results: int) -> int:
    n, c, *spatial = shape
    across, along = _by_role(channels_last, spatial)
    rows, lanes = (n * across, c) if channels_last else (n * c, across)
    return cdiv(rows, chosen["ROWS"]) * cdiv(lanes, chosen["LANES"]) * cdiv(along, results)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints) -> Tensor:
    start, layout = _forward(x, weight, bias, stride, padding, dilation)
    y = x.new_empty_strided(*layout)
    start(x, weight, y, bias)
    return y


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Ints, padding: Ints, dilation: Ints
) -> tuple[Prepared, Layout]:
    return _forward_plan(
        x.device, x.dtype, x.shape, x.stride(), weight.shape, weight.stride(), None if bias is None else bias.stride(0),
        tuple(stride), tuple(padding), tuple(dilation),
    )  # fmt: skip


@config.plan
def _forward_plan(
    device: torch.device, dtype: torch.dtype, shape: Ints, x_stride: Ints, weight_shape: Ints, weight_stride: Ints,
    bias_stride: int | None, stride: Ints, padding: Ints, dilation: Ints,
) -> tuple[Prepared, Layout]:  # fmt: skip
    """The launch, and the layout of y."""
    x, weight = meta(shape, x_stride), meta(weight_shape, weight_stride)
    channels_last = suggests_channels_last(x) or suggests_channels_last(weight)
    kernel = weight.shape[2:]
    size = output_size(x, kernel, stride, padding, dilation)
    y = empty(x, (x.shape[0], weight.shape[0], *size), channels_last)
    if not channels_last and _in_planes(x, kernel, stride, padding, dilation):
        start = _planes(device, dtype, x, y, weight, bias_stride, stride, padding[::2], dilation, flip=False)
        return start, (y.shape, y.stride())
    geometry = _geometry(channels_last, kernel, stride, padding, dilation)
    chosen = forward_config(device, dtype, channels_last, y.shape[1], *_by_role(channels_last, size), geometry["KS"])
    taps = geometry["KS"] if _unrolls(geometry, (chosen["T"] - 1) * geometry["STRIDE_S"] + 1) else 1
    images, channels = y.shape[:2]
    vec = multiple_of(channels_last, channels, x, y)
    return Prepared(
        depthwise_forward_kernel, (_programs(y.shape, channels_last, chosen, chosen["T"]),),
        images, channels // vec, *_by_role(channels_last, x.shape[2:]), *_by_role(channels_last, size),
        *_strides(x, channels_last, vec), *_strides(y, channels_last, vec), *_weight_strides(weight, channels_last),
        1 if bias_stride is None else bias_stride,
        **geometry, MULTIPLIER=channels // x.shape[1], TAPS=taps, HAS_BIAS=bias_stride is not None,
        CHANNELS_LAST=channels_last, VEC=vec, ACCUMULATOR=config.accumulator(dtype), **chosen,
    ), (y.shape, y.stride())  # fmt: skip


def _in_planes(x: Tensor, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> bool:
    """Whether depthwise_planes_kernel takes contiguous results from these images: neighbours in a row, few taps and strides."""
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    return (
        (x.stride(3) == 1 or x.shape[3] == 1)
        and math.prod(kernel) <= UNROLLED_PLANE_TAPS
        and max(*reach, *stride) <= HALO
        and stride[1] <= 2
        and padding[0] <= reach[0]
        and padding[2] <= reach[1]
    )


def _pieces(
    dtype: torch.dtype, x: Tensor, y: Tensor, kernel: int, stride: int, front: int, dilation: int
) -> tuple[int, int, dict[str, int]]:
    """What divides the strides and widths, how many results a lane has, and how many columns come at once: its own, those
    before, and those behind. The last four are about the axis across."""
    width = y.shape[3]
    vec = math.gcd(16, x.shape[3], width, *[s for t in (x, y) for s in t.stride()[:3]])
    # A lane's own columns are 16 bytes, where they are aligned; else as many as make the others few.
    piece = math.gcd(vec, 16 // min(dtype.itemsize, 4))
    behind = (kernel - 1) * dilation - front - stride + 1
    pieces = {"PIECE": piece, "FRONT": power_of_two(front, 1, piece), "BACK": power_of_two(behind, 1, piece)}
    return vec, 4 if piece == 4 or stride == 2 or width <= 4 else 8, pieces


def _planes(
    device: torch.device, dtype: torch.dtype, x: Tensor, y: Tensor, weight: Tensor, bias_stride: int | None,
    stride: Ints, front: Ints, dilation: Ints, *, flip: bool,
) -> Prepared:  # fmt: skip
    """The launch of depthwise_planes_kernel. front: the padding in front; flip: for dgrad, whose launch is given no bias."""
    images, channels, height, width = y.shape
    vec, v, pieces = _pieces(dtype, x, y, weight.shape[3], stride[1], front[1], dilation[1])
    chosen = planes_config(device, dtype, pieces["PIECE"] >= 4, height, cdiv(width, v), math.prod(weight.shape[2:]))
    programs = cdiv(images * channels, chosen["ROWS"]) * cdiv(height, chosen["T"]) * cdiv(width, chosen["LANES"] * v)
    return Prepared(
        depthwise_planes_kernel, (programs,), *([None] if flip else []),
        images, channels, x.shape[2], x.shape[3] // vec, height, width // vec,
        *[s // vec for t in (x, y) for s in t.stride()[:3]], weight.stride(0), *weight.stride()[2:],
        1 if bias_stride is None else bias_stride,
        **geometry_of(weight.shape[2:], stride, front, dilation), FLIP=flip, MULTIPLIER=channels // x.shape[1],
        HAS_BIAS=bias_stride is not None, VEC=vec, V=v, **pieces, ACCUMULATOR=config.accumulator(dtype), **chosen,
    )  # fmt: skip


def _weight_strides(weight: Tensor, channels_last: bool) -> tuple[int, ...]:
    return (weight.stride(0), *_by_role(channels_last, weight.stride()[2:]))


def depthwise_conv2d_dgrad(
    dy: Tensor,
    weight: Tensor,
    shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    channels_last: bool,
) -> Tensor:
    dx = empty(dy, shape, channels_last)
    start = _dgrad(dy, weight, dx.shape, stride, padding, dilation, channels_last)
    start(dy, weight, dx)
    return dx


def _dgrad(
    dy: Tensor, weight: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> Prepared:
    return _dgrad_plan(
        dy.device, dy.dtype, dy.shape, dy.stride(), weight.shape, weight.stride(), tuple(shape),
        tuple(stride), tuple(padding), tuple(dilation), channels_last,
    )  # fmt: skip


@config.plan
def _dgrad_plan(
    device: torch.device, dtype: torch.dtype, dy_shape: Ints, dy_stride: Ints, weight_shape: Ints, weight_stride: Ints,
    shape: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool,
) -> Prepared:  # fmt: skip
    dy, weight = meta(dy_shape, dy_stride), meta(weight_shape, weight_stride)
    dx = empty(dy, shape, channels_last)
    kernel = weight.shape[2:]
    behind = [(k - 1) * d - p for k, d, p in zip(kernel, dilation, padding[::2], strict=True)]
    same_channels = weight.shape[0] == dx.shape[1]
    if not channels_last and same_channels and max(stride) == 1 and _in_planes(dy, kernel, stride, padding, dilation):
        return _planes(device, dtype, dy, dx, weight, None, stride, behind, dilation, flip=True)
    geometry = _geometry(channels_last, weight.shape[2:], stride, padding, dilation)
    across, along = _by_role(channels_last, dx.shape[2:])
    step = geometry["STRIDE_S"]
    chosen = dgrad_config(device, dtype, channels_last, dx.shape[1], across, along, geometry["KS"], step)
    taps = geometry["KS"] if _unrolls(geometry, chosen["T"] * step) else 1
    period = geometry["STRIDE_A"] // math.gcd(geometry["STRIDE_A"], geometry["DILATION_A"])
    images, channels = dx.shape[:2]
    vec = multiple_of(channels_last, channels, dy, dx)
    return Prepared(
        depthwise_dgrad_kernel, (_programs(dx.shape, channels_last, chosen, chosen["T"] * step),),
        images, channels // vec, across, along, *_by_role(channels_last, dy.shape[2:]),
        *_strides(dy, channels_last, vec), *_strides(dx, channels_last, vec), *_weight_strides(weight, channels_last),
        **geometry, MULTIPLIER=weight.shape[0] // channels, TAPS=taps, PERIOD=period,
        CHANNELS_LAST=channels_last, VEC=vec, ACCUMULATOR=config.accumulator(dtype), **chosen,
    )  # fmt: skip


def depthwise_conv2d_wgrad(
    dy: Tensor,
    x: Tensor,
    shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    channels_last: bool,
) -> Tensor:
    start, partial_shape = _wgrad(dy, x, shape, stride, padding, dilation, channels_last)
    partial = dy.new_empty(partial_shape, dtype=torch.promote_types(dy.dtype, torch.float32))
    start(dy, x, partial)
    dw = empty(dy, shape, channels_last)
    total = partial.sum(0).view(*_by_role(channels_last, shape[2:]), partial_shape[-1])
    dw[:, 0].copy_(total.permute(2, 0, 1) if channels_last else total.permute(2, 1, 0))
    return dw


def _wgrad(
    dy: Tensor, x: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool
) -> tuple[Prepared, tuple[int, int, int]]:
    return _wgrad_plan(
        dy.device, dy.dtype, dy.shape, dy.stride(), x.shape, x.stride(), tuple(shape),
        tuple(stride), tuple(padding), tuple(dilation), channels_last,
    )  # fmt: skip


@config.plan
def _wgrad_plan(
    device: torch.device, dtype: torch.dtype, dy_shape: Ints, dy_stride: Ints, x_shape: Ints, x_stride: Ints,
    shape: Ints, stride: Ints, padding: Ints, dilation: Ints, channels_last: bool,
) -> tuple[Prepared, tuple[int, int, int]]:  # fmt: skip
    """The launch, and the shape of its partial sums."""
    dy, x = meta(dy_shape, dy_stride), meta(x_shape, x_stride)
    images, channels = dy.shape[:2]
    if not channels_last and dy.stride(3) == 1 and _in_planes(x, shape[2:], stride, padding, dilation):
        return _planes_wgrad(device, dtype, dy, x, shape[2:], stride, padding[::2], dilation)
    geometry = _geometry(channels_last, shape[2:], stride, padding, dilation)
    across, along = _by_role(channels_last, dy.shape[2:])
    ka, ks = geometry["KA"], geometry["KS"]
    taps_s = ks if ks <= ACCUMULATORS else 1
    taps_a = ka if ka * taps_s <= ACCUMULATORS else 1
    chosen = wgrad_config(device, dtype, channels_last, channels, across, along, taps_a * taps_s, geometry["DILATION_S"])
    rows, lanes = chosen["ROWS"], chosen["LANES"]
    blocks = cdiv(channels, lanes if channels_last else rows)
    groups = (ka // taps_a) * (ks // taps_s)
    tiles = cdiv(images * across, rows) if channels_last else images * cdiv(across, lanes)
    steps = tiles * cdiv(along, chosen["T"])
    splits = min(steps, cdiv(WAVES * config.target_of(device).sms, blocks * groups))
    vec = multiple_of(channels_last, channels, dy, x)
    return Prepared(
        depthwise_wgrad_kernel, (blocks, groups, splits),
        images, channels // vec, across, along, *_by_role(channels_last, x.shape[2:]),
        cdiv(steps, max(splits, 1)), *_strides(dy, channels_last, vec), *_strides(x, channels_last, vec),
        **geometry, MULTIPLIER=channels // x.shape[1], TAPS_A=taps_a, TAPS_S=taps_s,
        EVEN_T=along % chosen["T"] == 0, CHANNELS_LAST=channels_last, VEC=vec, ACCUMULATOR=config.accumulator(dtype), **chosen,
    ), (splits, ka * ks, channels)  # fmt: skip


def _planes_wgrad(
    device: torch.device, dtype: torch.dtype, dy: Tensor, x: Tensor, kernel: Ints, stride: Ints, front: Ints, dilation: Ints
) -> tuple[Prepared, tuple[int, int, int]]:
    images, channels, height, width = dy.shape
    taps = math.prod(kernel)
    vec, v, pieces = _pieces(dtype, x, dy, kernel[1], stride[1], front[1], dilation[1])
    v = v if pieces["PIECE"] >= 4 else 4  # every column that comes alone is a load in flight, and a register
    chosen = planes_wgrad_config(device, dtype, pieces["PIECE"] >= 4, height, cdiv(width, v), taps)
    blocks, parts = cdiv(channels, chosen["ROWS"]), cdiv(width, chosen["LANES"] * v)
    steps = images * cdiv(height, chosen["T"])
    splits = min(steps, cdiv(WAVES * config.target_of(device).sms, blocks * parts))
    return Prepared(
        depthwise_planes_wgrad_kernel, (blocks, parts, splits),
        images, channels, height, width // vec, x.shape[2], x.shape[3] // vec, cdiv(steps, max(splits, 1)),
        *[s // vec for t in (dy, x) for s in t.stride()[:3]],
        **geometry_of(kernel, stride, front, dilation), MULTIPLIER=channels // x.shape[1],
        EVEN_T=height % chosen["T"] == 0, EVEN_V=width % v == 0, VEC=vec, V=v, **pieces,
        ACCUMULATOR=config.accumulator(dtype), **chosen,
    ), (splits * parts, taps, channels)  # fmt: skip


def explain(name: str, *args: Any) -> str:
    if name == "depthwise_conv2d":
        kernel = _forward(*args)[0].name
        channels_last = suggests_channels_last(args[0]) or suggests_channels_last(args[1])
    else:
        kernel = (_wgrad(*args)[0] if name == "depthwise_conv2d_wgrad" else _dgrad(*args)).name
        channels_last = args[-1]
    return f"{kernel}, {'channels_last' if channels_last else 'contiguous'}"
