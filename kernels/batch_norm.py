"""batch_norm: y = act((x - mean) rstd w + b + residual) per channel, rstd = 1 / sqrt(var + eps), act none, ReLU or ReLU6.

    forward    mean = sum x / M, var = sum (x - mean)^2 / M over the M = N S values of a channel; the running variance takes
               M / (M - 1) var
    backward   g = dy where act does not clip, else 0;  db = sum g,  dw = rstd sum g (x - mean)
               training    dx = w rstd (g - db / M - (x - mean) rstd dw / M)
               evaluation  dx = w rstd g
               d residual = g

A dense tensor of any layout is three sizes, (R, C, S): what lies outside the channels, the channels, what lies inside them.
Contiguous (N, C, *): R = N, S the positions. channels_last and (N, C): R = N S, S = 1. A program owns a block of channels
and a slice of their values, cut into tiles. With S = 1 the columns of a tile are channels; else (RUNS) a program has one
channel, and the columns are positions. Strides are in elements: r along the rows of a tile, n along its columns, b from one
program's channel to the next. Inputs may have strides of their own; outputs are dense, in the layout of empty_like(x).

Forward: `statistics_kernel` writes each slice's sums of x - K and (x - K)^2, with K the mean of some values of the channel, so
that nothing cancels; `normalise_kernel` adds them up in float64, in a fixed order and in every program alike (there are no
atomics: results are deterministic), and writes y. Backward: `reduce_kernel` and `gradient_kernel` do the same with the sums of
g and g (x - mean). The mask of the activation is recomputed from x; with a residual it is read from y, and the first kernel
writes g, the residual's gradient, for the second to read.

With TICKET in the configuration, which is none's default, both passes are one launch: `forward_kernel`, `backward_kernel`. The
second pass over some channels comes so soon after the first that it finds them in the L2: a pass over memory less, two in the
backward. An experiment until a GPU has shown it faster.

Saved for backward: x, mean, rstd (float32), w, b, and y with an activation. Passes over a tensor of x's size: forward 3,
backward 5; with a residual and an activation 4 and 7 (plain torch, in place: 8 and 8).
"""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import Config, Target, cdiv, meta, power_of_two
from .launch import Prepared

SAMPLES = 64  # values behind the shift K
TILES = 4  # a program has as many at least, to pay for what it does once per channel
RESIDENT = 8  # programs per multiprocessor aimed for
DIRECT = 64  # slices whose sums every program adds up itself; more of them take a launch of their own to GROUPS
GROUPS = 16
LAG = 2  # groups of blocks between the two passes, where they are one launch


def tile(target: Target, dtype: torch.dtype, R: int, C: int, S: int) -> Config:
    """2048 elements, 16 a thread; half of them where rows are not aligned, and every element has an address of its own."""
    if target.interpreted:
        return {"BLOCK_R": 16, "BLOCK_N": 16} if S == 1 else {"BLOCK_R": 4, "BLOCK_N": 32}
    if S == 1:
        columns = power_of_two(C, 16, 64)
    else:  # the largest block that wastes less than a fifth of its lanes, or the one that wastes least
        blocks = [b for b in (1024, 512, 256, 128, 64, 32, 16) if b < 2 * S] or [16]
        waste = [cdiv(S, b) * b / S for b in blocks]
        columns = next((b for b, w in zip(blocks, waste, strict=True) if w < 1.2), blocks[waste.index(min(waste))])
    elements = 2048 if S == 1 or S % 4 == 0 else 1024
    return {"BLOCK_R": power_of_two(R, 1, elements // columns), "BLOCK_N": columns, "num_warps": 4}


def tile_candidates(tensors: int, target: Target, dtype: torch.dtype, R: int, C: int, S: int) -> list[Config]:
    """tensors: how many the second pass reads again."""
    chosen = tile(target, dtype, R, C, S)
    r, n = chosen["BLOCK_R"], chosen["BLOCK_N"]
    half = (r // 2, n) if r > 1 else (r, n // 2)
    blocks = [
        (r, n, 8),
        (2 * r, n, 8),
        (*half, 4),
        (*half, 2),
    ]  # more than 16 elements a thread spill where rows are not aligned
    if S == 1:
        blocks.append((max(r // 2, 1), 2 * n, 4))
    found = [{"BLOCK_R": r, "BLOCK_N": n, "num_warps": warps} for r, n, warps in blocks]
    # Both passes in one launch, a ticket for so many tiles. Not on AMD, where tl.debug_barrier does not wait for stores.
    if target.backend != "hip" and R * (min(C, n) if S == 1 else S) * dtype.itemsize * tensors <= _slab(target):
        found += [chosen | {"TICKET": elements // (r * n)} for elements in (8192, 16384)]
    return found


def _slab(target: Target) -> int:
    """Bytes of a group of blocks, of which LAG + 1 fit half of the cache; the other half is for what only passes through."""
    return target.l2 // 2 // (LAG + 1)


forward_config = config.choice("batch_norm.forward")(tile)  # statistics_kernel, normalise_kernel
backward_config = config.choice("batch_norm.backward")(tile)  # reduce_kernel, gradient_kernel
forward_config.candidates = functools.partial(tile_candidates, 1)
backward_config.candidates = functools.partial(tile_candidates, 2)


@triton.jit
def channels_of(block, BLOCK_N: tl.constexpr, RUNS: tl.constexpr):
    """The channels of a program: as many as the columns, or one."""
    return block + tl.arange(0, 1) if RUNS else block * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def tile_at(tile, block, R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr):
    """Row (BLOCK_R, 1) and column (1, BLOCK_N) of a tile's elements, and which of them exist. There are N VEC columns."""
    columns = N * VEC
    if RUNS:
        across = tl.cdiv(columns, BLOCK_N)
        row = tile // across * BLOCK_R + tl.arange(0, BLOCK_R)
        column = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    else:
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < R)[:, None] & (column < columns)[None, :]
    return row.to(tl.int64)[:, None], column.to(tl.int64)[None, :], inside


@triton.jit
def sum_per_channel(t, RUNS: tl.constexpr):
    return tl.sum(tl.sum(t, axis=1, keep_dims=True), axis=0) if RUNS else tl.sum(t, axis=0)


@triton.jit
def merged(partial, channel, C, PARTS, MERGE: tl.constexpr):
    """The sum over the slices, in float64 and in a fixed order, MERGE at a time: a larger tile costs registers."""
    total = tl.zeros(channel.shape, dtype=tl.float64)
    for first in range(0, PARTS, MERGE):
        part = first + tl.arange(0, MERGE)
        inside = (part < PARTS)[:, None] & (channel < C)[None, :]
        piece = tl.load(partial + part.to(tl.int64)[:, None] * C + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(piece.to(tl.float64), axis=0)
    return total


@triton.jit
def values_in(rows, S):
    """In 64 bits: a channel may have 2^31 values and more."""
    return (tl.full((), 0, tl.int64) + rows) * S


@triton.jit
def one_in(count):
    """1 / count in float64. Divisions in float64 are long: dividing once and multiplying saves a tenth of the instructions."""
    return 1.0 / (tl.full((), 0.0, tl.float64) + count)


@triton.jit
def of_channel(vector, channel, C, absent: tl.constexpr, ACC: tl.constexpr):
    """A vector's values for the channels, or `absent`."""
    if vector is None:
        values = tl.full(channel.shape, absent, dtype=ACC)
    else:
        values = tl.load(vector + channel, mask=channel < C, other=0.0).to(ACC)
    return values


@triton.jit
def reciprocal_std(rstd_or_var, channel, C, EPS: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr):
    """Saved in training; from the running variance in evaluation, alike in forward and backward."""
    values = tl.load(rstd_or_var + channel, mask=channel < C, other=1.0).to(ACC)
    if not TRAINING:
        values = 1.0 / tl.sqrt(values + EPS)
    return values


@triton.jit
def on_tile(values, RUNS: tl.constexpr):
    """A value for each channel, as tiles take it: a scalar where there is one channel, for a vector of one would be written to
    shared memory as a whole tile to get its layout."""
    return tl.sum(values, axis=0) if RUNS else values[None, :]


@triton.jit
def affine(x, mean, scale, bias):
    """The one place that makes y, so that the recomputed mask is the forward's: explicit fma, no choice for the compiler."""
    return tl.fma(x - mean, tl.broadcast_to(scale, x.shape), tl.broadcast_to(bias, x.shape))


@triton.jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION is not None:
        z = tl.where(z < 0, 0.0, z)  # keeps NaN and -0.0
    if ACTIVATION == "relu6":
        z = tl.where(z > 6, 6.0, z)
    return z


@triton.jit
def gated(g, y, ACTIVATION: tl.constexpr):
    """g where the activation passes it, by its output as rounded; a NaN output passes it."""
    if ACTIVATION == "relu":
        g = tl.where(y <= 0, 0.0, g)
    elif ACTIVATION == "relu6":
        g = tl.where((y <= 0) | (y >= 6), 0.0, g)
    return g


@triton.jit
def statistics_kernel(
    x, sums, squares, shift, counter, R, C, N, TILES, TILES_PER_PROGRAM, stride_xr, stride_xb, stride_xn,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, SAMPLES: tl.constexpr,
    ACC: tl.constexpr, item=None,
):  # fmt: skip
    """Sums of x - K and its square, for one slice: row `part` of sums and squares (slices, C)."""
    block, part = (tl.program_id(0), tl.program_id(1)) if item is None else item
    KEEP: tl.constexpr = "" if item is None else "evict_last"
    channel = channels_of(block, BLOCK_N, RUNS)
    valid = channel < C
    x += block.to(tl.int64) * stride_xb * VEC
    S = N * VEC if RUNS else 1
    count = tl.minimum(values_in(R, S), 2147483647).to(tl.int32)  # enough to draw samples from
    position = tl.arange(0, SAMPLES) * tl.maximum(count // SAMPLES, 1)
    of_row = (position // S).to(tl.int64)[:, None] * stride_xr * VEC
    of_column = ((position % S).to(tl.int64)[:, None] if RUNS else channel.to(tl.int64)[None, :]) * stride_xn
    values = tl.load(x + of_row + of_column, mask=(position < count)[:, None] & valid[None, :], other=0.0)
    k = tl.sum(values.to(ACC), axis=0) / tl.minimum(count, SAMPLES)
    k = tl.where(tl.abs(k) < float("inf"), k, 0.0)  # an infinite mean stays infinite instead of turning into NaN
    k_tile = on_tile(k, RUNS)
    sum1 = tl.zeros((BLOCK_R, BLOCK_N), dtype=ACC)
    sum2 = tl.zeros((BLOCK_R, BLOCK_N), dtype=ACC)
    first = part * TILES_PER_PROGRAM
    for tile in range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES)):
        row, column, inside = tile_at(tile, block, R, N, BLOCK_R, BLOCK_N, RUNS, VEC)
        x_tile = tl.load(x + row * stride_xr * VEC + column * stride_xn, mask=inside, other=0.0, eviction_policy=KEEP)
        z = tl.where(inside, x_tile.to(ACC) - k_tile, 0.0)
        sum1 += z
        sum2 += z * z
    partial = part.to(tl.int64) * C + channel
    tl.store(sums + partial, sum_per_channel(sum1, RUNS), mask=valid)
    tl.store(squares + partial, sum_per_channel(sum2, RUNS), mask=valid)
    if part == 0:
        tl.store(shift + channel, k, mask=valid)
        if counter is not None:  # noqa: SIM102 (`and` evaluates both sides at compile time)
            if block == 0:
                tl.store(counter, tl.load(counter) + 1)


@triton.jit
def collapse_kernel(first, second, first_out, second_out, C, PARTS, GROUP, BLOCK_C: tl.constexpr, MERGE: tl.constexpr):
    """Adds up GROUP slices at a time: row program_id(1) of the outputs (groups, C), in float64."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    start = tl.program_id(1).to(tl.int64) * GROUP
    parts = tl.minimum(GROUP, PARTS - start)
    at = tl.program_id(1).to(tl.int64) * C + channel
    tl.store(first_out + at, merged(first + start * C, channel, C, parts, MERGE), mask=channel < C)
    tl.store(second_out + at, merged(second + start * C, channel, C, parts, MERGE), mask=channel < C)


@triton.jit
def normalise_kernel(
    x, w, b, residual, y, mean, rstd_or_var, sums, squares, shift, running_mean, running_var, counter, momentum, rest,
    R, C, N, PARTS, TILES, TILES_PER_PROGRAM, stride_xr, stride_xb, stride_xn, stride_zr, stride_zb, stride_zn,
    stride_yr, stride_yb, stride_yn, stride_rm, stride_rv,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, TRAINING: tl.constexpr, MERGE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, item=None,
):  # fmt: skip
    """y for one slice; in training the first slice's program also writes the statistics and moves the running ones."""
    # The slices in the other order than statistics_kernel: what it read last is still in the L2.
    block, part = (tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)) if item is None else item
    DROP: tl.constexpr = "" if item is None else "evict_first"
    channel = channels_of(block, BLOCK_N, RUNS)
    valid = channel < C
    if TRAINING:
        per_value = one_in(values_in(R, N * VEC if RUNS else 1))
        delta = merged(sums, channel, C, PARTS, MERGE) * per_value
        var = merged(squares, channel, C, PARTS, MERGE) * per_value - delta * delta
        var = tl.where(var < 0, 0.0, var)  # not maximum: NaN stays
        mean64 = tl.load(shift + channel, mask=valid, other=0.0).to(tl.float64) + delta
        mean_values = mean64.to(ACC)
        rstd = tl.rsqrt(var + EPS).to(ACC)
        if part == 0:
            tl.store(mean + channel, mean_values, mask=valid)
            tl.store(rstd_or_var + channel, rstd, mask=valid)
            if running_mean is not None:
                share = tl.full((), 0.0, tl.float64) + momentum + rest
                if counter is not None:
                    share = 1.0 / tl.load(counter).to(tl.float64)  # statistics_kernel has counted
                old_mean = tl.load(running_mean + channel * stride_rm, mask=valid, other=0.0).to(tl.float64)
                old_var = tl.load(running_var + channel * stride_rv, mask=valid, other=0.0).to(tl.float64)
                new_mean = (1 - share) * old_mean + share * mean64
                new_var = (1 - share) * old_var + share * (var / (1 - per_value))
                tl.store(running_mean + channel * stride_rm, new_mean.to(running_mean.dtype.element_ty), mask=valid)
                tl.store(running_var + channel * stride_rv, new_var.to(running_var.dtype.element_ty), mask=valid)
    else:
        mean_values = of_channel(mean, channel, C, 0.0, ACC)
        rstd = reciprocal_std(rstd_or_var, channel, C, EPS, TRAINING, ACC)
    scale, bias = rstd * of_channel(w, channel, C, 1.0, ACC), of_channel(b, channel, C, 0.0, ACC)
    mean_tile, scale_tile, bias_tile = on_tile(mean_values, RUNS), on_tile(scale, RUNS), on_tile(bias, RUNS)
    x += block.to(tl.int64) * stride_xb * VEC
    y += block.to(tl.int64) * stride_yb * VEC
    if residual is not None:
        residual += block.to(tl.int64) * stride_zb * VEC
    first = part * TILES_PER_PROGRAM
    for tile in range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES)):
        row, column, inside = tile_at(tile, block, R, N, BLOCK_R, BLOCK_N, RUNS, VEC)
        x_tile = tl.load(x + row * stride_xr * VEC + column * stride_xn, mask=inside, other=0.0, eviction_policy=DROP)
        z = affine(x_tile.to(ACC), mean_tile, scale_tile, bias_tile)
        if residual is not None:
            of_z = row * stride_zr * VEC + column * stride_zn
            z += tl.load(residual + of_z, mask=inside, other=0.0, eviction_policy=DROP).to(ACC)
        y_tile = activated(z, ACTIVATION).to(y.dtype.element_ty)
        tl.store(y + row * stride_yr * VEC + column * stride_yn, y_tile, mask=inside, eviction_policy=DROP)


@triton.jit
def seconds_before(step, GROUPS, LAG: tl.constexpr):
    """How many of the first `step` steps are second passes."""
    return tl.maximum(tl.maximum(step + 1 - LAG, 0) // 2, step - GROUPS)


@triton.jit
def draw(tickets, BLOCKS, PARTS, GROUP, LAG: tl.constexpr):
    """What a program of both passes does: whether a slice's second pass, of which block (it may not exist), which slice.

    A step is a pass over a group of GROUP blocks: LAG first passes, then a second and a first in turn, LAG groups apart. What a
    program waits for has earlier tickets, so programs that run do it: however few of them the device holds, none waits forever.
    """
    ticket = tl.atomic_add(tickets, 1, sem="relaxed")
    step, rest = ticket // (GROUP * PARTS), ticket % (GROUP * PARTS)
    groups = tl.cdiv(BLOCKS, GROUP)
    before = seconds_before(step, groups, LAG)
    second = seconds_before(step + 1, groups, LAG) > before
    return second, tl.where(second, before, step - before) * GROUP + rest % GROUP, rest // GROUP


@triton.jit
def add_up_once_complete(arrived, first, second, first_sum, second_sum, channel, C, PARTS, MERGE: tl.constexpr):
    """Counts a slice whose sums are stored; with the last, adds up all slices in their order and counts once more."""
    tl.debug_barrier()  # all threads have stored before one of them counts
    if tl.atomic_add(arrived, 1, sem="acq_rel") == PARTS - 1:
        tl.store(first_sum + channel, merged(first, channel, C, PARTS, MERGE), mask=channel < C)
        tl.store(second_sum + channel, merged(second, channel, C, PARTS, MERGE), mask=channel < C)
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def wait_for_sums(arrived, PARTS):
    """Until add_up_once_complete has counted once more than there are slices."""
    while tl.atomic_add(arrived, 0, sem="acquire") <= PARTS:
        pass


@triton.jit
def forward_kernel(
    tickets, sums, squares, counter, x, w, b, residual, y, mean, rstd, total, total_square, shift,
    running_mean, running_var, cumulative, momentum, rest, BLOCKS, PARTS, GROUP, R, C, N, TILES, TILES_PER_PROGRAM,
    stride_xr, stride_xb, stride_xn, stride_zr, stride_zb, stride_zn, stride_yr, stride_yb, stride_yn, stride_rm, stride_rv,
    LAG: tl.constexpr, SAMPLES: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr,
    MERGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """statistics_kernel and normalise_kernel in one launch: one slice of one of them, by ticket."""
    second, block, part = draw(tickets, BLOCKS, PARTS, GROUP, LAG)
    if block < BLOCKS:
        arrived = tickets + 1 + block
        if second:
            wait_for_sums(arrived, PARTS)
            if cumulative is not None:
                wait_for_sums(tickets + 1, PARTS)  # with the first block's the counter has moved
            normalise_kernel(
                x, w, b, residual, y, mean, rstd, total, total_square, shift, running_mean, running_var,
                cumulative, momentum, rest, R, C, N, 1, TILES, TILES_PER_PROGRAM,
                stride_xr, stride_xb, stride_xn, stride_zr, stride_zb, stride_zn, stride_yr, stride_yb, stride_yn,
                stride_rm, stride_rv, EPS, ACTIVATION, True, 1, BLOCK_R, BLOCK_N, RUNS, VEC, ACC, (block, part),
            )  # fmt: skip
        else:
            statistics_kernel(
                x, sums, squares, shift, counter, R, C, N, TILES, TILES_PER_PROGRAM, stride_xr, stride_xb, stride_xn,
                BLOCK_R, BLOCK_N, RUNS, VEC, SAMPLES, ACC, (block, part),
            )  # fmt: skip
            channel = channels_of(block, BLOCK_N, RUNS)
            add_up_once_complete(arrived, sums, squares, total, total_square, channel, C, PARTS, MERGE)


@triton.jit
def masked_gradient(
    dy, y, x_tile, mean, scale, bias, inside,
    ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, OUT: tl.constexpr, ACC: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """The gradient in front of the activation; dy and y: pointers to the tile."""
    g = tl.load(dy, mask=inside, other=0.0, eviction_policy=HINT).to(ACC)
    if ACTIVATION is not None:
        if RECOMPUTE:
            y_tile = affine(x_tile, mean, scale, bias).to(OUT)
        else:
            y_tile = tl.load(y, mask=inside, other=0.0, eviction_policy=HINT)
        g = gated(g, y_tile.to(ACC), ACTIVATION)
    return g


@triton.jit
def reduce_kernel(
    dy, x, w, b, mean, rstd_or_var, y, dresidual, sums, dots, R, C, N, TILES, TILES_PER_PROGRAM,
    stride_gr, stride_gb, stride_gn, stride_xr, stride_xb, stride_xn, stride_yr, stride_yb, stride_yn,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, TRAINING: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr, item=None,
):  # fmt: skip
    """Sums of g and g (x - mean) for one slice: row `part` of sums and dots (slices, C); and g, if wanted."""
    block, part = (tl.program_id(0), tl.program_id(1)) if item is None else item
    KEEP: tl.constexpr = "" if item is None else "evict_last"
    HINT: tl.constexpr = KEEP if item is None or dresidual is None else "evict_first"  # of dy, y: dresidual is read again
    channel = channels_of(block, BLOCK_N, RUNS)
    valid = channel < C
    mean_values = of_channel(mean, channel, C, 0.0, ACC)
    rstd = reciprocal_std(rstd_or_var, channel, C, EPS, TRAINING, ACC)
    scale, bias = rstd * of_channel(w, channel, C, 1.0, ACC), of_channel(b, channel, C, 0.0, ACC)
    mean_tile, scale_tile, bias_tile = on_tile(mean_values, RUNS), on_tile(scale, RUNS), on_tile(bias, RUNS)
    sum1 = tl.zeros((BLOCK_R, BLOCK_N), dtype=ACC)
    sum2 = tl.zeros((BLOCK_R, BLOCK_N), dtype=ACC)
    dy += block.to(tl.int64) * stride_gb * VEC
    x += block.to(tl.int64) * stride_xb * VEC
    y_base = block.to(tl.int64) * stride_yb * VEC
    first = part * TILES_PER_PROGRAM
    for tile in range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES)):
        row, column, inside = tile_at(tile, block, R, N, BLOCK_R, BLOCK_N, RUNS, VEC)
        to_x = row * stride_xr * VEC + column * stride_xn
        x_tile = tl.load(x + to_x, mask=inside, other=0.0, eviction_policy=KEEP).to(ACC)
        to_dy, to_y = row * stride_gr * VEC + column * stride_gn, y_base + row * stride_yr * VEC + column * stride_yn
        g = masked_gradient(
            dy + to_dy, None if y is None else y + to_y, x_tile, mean_tile, scale_tile, bias_tile, inside,
            ACTIVATION, RECOMPUTE, x.dtype.element_ty, ACC, HINT,
        )  # fmt: skip
        if dresidual is not None:
            tl.store(dresidual + to_y, g.to(dresidual.dtype.element_ty), mask=inside, eviction_policy=KEEP)
        sum1 += g  # 0 outside of the tensor
        sum2 += g * (x_tile - mean_tile)
    partial = part.to(tl.int64) * C + channel
    tl.store(sums + partial, sum_per_channel(sum1, RUNS), mask=valid)
    tl.store(dots + partial, sum_per_channel(sum2, RUNS), mask=valid)


@triton.jit
def gradient_kernel(
    dy, x, w, b, mean, rstd_or_var, y, sums, dots, dx, dw, db, count, R, C, N, PARTS, TILES, TILES_PER_PROGRAM,
    stride_gr, stride_gb, stride_gn, stride_xr, stride_xb, stride_xn, stride_yr, stride_yb, stride_yn,
    EPS: tl.constexpr, ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, TRAINING: tl.constexpr, PROJECT: tl.constexpr,
    MERGE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
    item=None,
):  # fmt: skip
    """dx for one slice, if wanted; the first slice's program also writes dw and db."""
    block, part = (tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)) if item is None else item
    DROP: tl.constexpr = "" if item is None else "evict_first"
    channel = channels_of(block, BLOCK_N, RUNS)
    valid = channel < C
    mean_values = of_channel(mean, channel, C, 0.0, ACC)
    rstd = reciprocal_std(rstd_or_var, channel, C, EPS, TRAINING, ACC)
    scale, bias = rstd * of_channel(w, channel, C, 1.0, ACC), of_channel(b, channel, C, 0.0, ACC)
    if sums is not None:
        total = merged(sums, channel, C, PARTS, MERGE)
        dot = merged(dots, channel, C, PARTS, MERGE) * rstd
        if part == 0:
            if dw is not None:
                tl.store(dw + channel, dot.to(dw.dtype.element_ty), mask=valid)
            if db is not None:
                tl.store(db + channel, total.to(db.dtype.element_ty), mask=valid)
        if PROJECT:
            per_value = one_in(count)
            of_mean, of_rstd = on_tile((total * per_value).to(ACC), RUNS), on_tile((dot * per_value * rstd).to(ACC), RUNS)
    if dx is not None:
        dy += block.to(tl.int64) * stride_gb * VEC
        x += block.to(tl.int64) * stride_xb * VEC
        y_base = block.to(tl.int64) * stride_yb * VEC
        mean_tile, scale_tile, bias_tile = on_tile(mean_values, RUNS), on_tile(scale, RUNS), on_tile(bias, RUNS)
        first = part * TILES_PER_PROGRAM
        for tile in range(first, tl.minimum(first + TILES_PER_PROGRAM, TILES)):
            row, column, inside = tile_at(tile, block, R, N, BLOCK_R, BLOCK_N, RUNS, VEC)
            x_tile = tl.zeros((BLOCK_R, BLOCK_N), dtype=ACC)
            if PROJECT or RECOMPUTE:
                to_x = row * stride_xr * VEC + column * stride_xn
                x_tile = tl.load(x + to_x, mask=inside, other=0.0, eviction_policy=DROP).to(ACC)
            to_dy, to_y = row * stride_gr * VEC + column * stride_gn, y_base + row * stride_yr * VEC + column * stride_yn
            g = masked_gradient(
                dy + to_dy, None if y is None else y + to_y, x_tile, mean_tile, scale_tile, bias_tile, inside,
                ACTIVATION, RECOMPUTE, x.dtype.element_ty, ACC, DROP,
            )  # fmt: skip
            if PROJECT:
                g = g - of_mean - (x_tile - mean_tile) * of_rstd
            tl.store(dx + to_y, (g * scale_tile).to(dx.dtype.element_ty), mask=inside, eviction_policy=DROP)


@triton.jit
def backward_kernel(
    tickets, dy, x, w, b, mean, rstd, y, dresidual, sums, dots, total, total_dot, dx, dw, db,
    BLOCKS, PARTS, GROUP, R, C, N, TILES, TILES_PER_PROGRAM, count,
    stride_gr, stride_gb, stride_gn, stride_xr, stride_xb, stride_xn, stride_yr, stride_yb, stride_yn,
    LAG: tl.constexpr, EPS: tl.constexpr, ACTIVATION: tl.constexpr, RECOMPUTE: tl.constexpr, MERGE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """reduce_kernel and gradient_kernel in one launch, in training: one slice of one of them, by ticket."""
    GIVEN: tl.constexpr = dresidual is not None  # it is the masked gradient
    second, block, part = draw(tickets, BLOCKS, PARTS, GROUP, LAG)
    if block < BLOCKS:
        if second:
            wait_for_sums(tickets + 1 + block, PARTS)
            gradient_kernel(
                dresidual if GIVEN else dy, x, w, b, mean, rstd, y, total, total_dot, dx, dw, db, count,
                R, C, N, 1, TILES, TILES_PER_PROGRAM,
                stride_yr if GIVEN else stride_gr, stride_yb if GIVEN else stride_gb, stride_yn if GIVEN else stride_gn,
                stride_xr, stride_xb, stride_xn, stride_yr, stride_yb, stride_yn,
                EPS, None if GIVEN else ACTIVATION, False if GIVEN else RECOMPUTE, True, True,
                1, BLOCK_R, BLOCK_N, RUNS, VEC, ACC, (block, part),
            )  # fmt: skip
        else:
            reduce_kernel(
                dy, x, w, b, mean, rstd, y, dresidual, sums, dots, R, C, N, TILES, TILES_PER_PROGRAM,
                stride_gr, stride_gb, stride_gn, stride_xr, stride_xb, stride_xn, stride_yr, stride_yb, stride_yn,
                EPS, ACTIVATION, RECOMPUTE, True, BLOCK_R, BLOCK_N, RUNS, VEC, ACC, (block, part),
            )  # fmt: skip
            channel = channels_of(block, BLOCK_N, RUNS)
            add_up_once_complete(tickets + 1 + block, sums, dots, total, total_dot, channel, C, PARTS, MERGE)


class View(NamedTuple):
    """How a dense layout is cut: the dimensions outside and inside the channels, outermost first, and the sizes."""

    outer: tuple[int, ...]
    inner: tuple[int, ...]
    R: int
    C: int
    S: int

    @classmethod
    def of(cls, shape: torch.Size, stride: tuple[int, ...]) -> View:
        order = sorted((d for d in range(len(shape)) if d != 1), key=stride.__getitem__, reverse=True)
        outer = tuple(d for d in order if stride[d] > stride[1] and shape[1] > 1 and shape[d] > 1)
        inner = tuple(d for d in order if d not in outer and shape[d] > 1)
        return cls(outer, inner, math.prod(shape[d] for d in outer), shape[1], math.prod(shape[d] for d in inner))

    def strides(self, shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, int, int] | None:
        """Strides (r, b, n) of a tensor of this shape, or None where they do not exist."""
        r, s = _one_stride(shape, stride, self.outer), _one_stride(shape, stride, self.inner)
        if r is None or s is None:
            return None
        return (r, 0, stride[1]) if self.S == 1 else (r, stride[1], s)


def _one_stride(shape: torch.Size, stride: tuple[int, ...], dims: Sequence[int]) -> int | None:
    """The stride with which these dimensions are walked as one."""
    for d, e in itertools.pairwise(dims):
        if stride[d] != stride[e] * shape[e]:
            return None
    return stride[dims[-1]] if dims else 0


class Walk(NamedTuple):
    """How the tensors of a call are walked; it follows from their layouts alone."""

    view: View
    copied: tuple[bool, ...]  # no single stride, so no kernel: to be brought to the layout of the outputs first
    strides: tuple[int, ...]  # of the inputs and the outputs, three each; those of an absent tensor are not used
    vec: int  # divides the sizes and strides that the kernels multiply by it

    @classmethod
    def of(cls, shape: torch.Size, layout: tuple[int, ...], *layouts: tuple[int, ...] | None) -> Walk:
        """layout: the outputs' strides; layouts: the inputs'."""
        view = View.of(shape, layout)
        found = [None if one is None else view.strides(shape, one) for one in layouts]
        copied = tuple(one is not None and strides is None for one, strides in zip(layouts, found, strict=True))
        of_outputs = view.strides(shape, layout)
        every = [*(of_outputs if copy else strides for copy, strides in zip(copied, found, strict=True)), of_outputs]
        inside = view.S if view.S > 1 else view.C
        vec = math.gcd(16, inside, *[n for s in every if s is not None for n in s[:2]]) if inside < 2**31 else 1
        flat = tuple(n for s in every for r, b, n in [s or (0, 0, 0)] for n in (r // vec, b // vec, n))
        return cls(view, copied, flat, vec)


class Tiling:
    """What the launches of a call have in common, and of all calls with these layouts."""

    def __init__(
        self, choice: config.Choice, device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...],
        *others: tuple[int, ...] | None, twice: int = 0,
    ) -> None:  # fmt: skip
        """shape, stride: of x; others: strides of inputs of x's shape. Outputs are laid out as empty_like(x).

        twice: of two passes that may be one launch, how many tensors of x's size both read.
        """
        self.layout = torch.empty_like(meta(shape, stride)).stride()
        walk = Walk.of(shape, self.layout, stride, *others)
        self.view, self.strides, self.copied = walk.view, walk.strides, walk.copied
        view = self.view
        runs = view.S > 1

        chosen, target = dict(choice(device, dtype, view.R, view.C, view.S)), config.target_of(device)
        ticket = chosen.pop("TICKET", 0)
        self.ticket = ticket if twice else 0
        self.blocks = view.C if runs else cdiv(view.C, chosen["BLOCK_N"])
        tiles = cdiv(view.R, chosen["BLOCK_R"]) * (cdiv(view.S, chosen["BLOCK_N"]) if runs else 1)
        wanted = cdiv(RESIDENT * target.sms, self.blocks)
        least = 1 if target.interpreted else TILES
        per_program = self.ticket or cdiv(tiles, max(1, min(wanted, tiles // least)))
        if self.ticket:
            self.group = min(self.blocks, max(1, _slab(target) * self.blocks // (math.prod(shape) * dtype.itemsize * twice)))
        self.parts = cdiv(tiles, per_program)
        self.sizes = view.R, view.C, (view.S if runs else view.C) // walk.vec
        self.tiles = tiles, per_program
        self.constants: dict[str, Any] = {"RUNS": runs, "VEC": walk.vec, "ACC": config.accumulator(dtype), **chosen}
        self.merge = 64 if runs else 16
        self.merged, self._collapse = self.parts, None
        if self.parts > DIRECT:
            group = cdiv(self.parts, GROUPS)
            self.merged = cdiv(self.parts, group)
            grid, constants = (cdiv(view.C, 64), self.merged), {"BLOCK_C": 64, "MERGE": 16, "num_warps": 4}
            self._collapse = Prepared(collapse_kernel, grid, view.C, self.parts, group, **constants)

    def prepared(self, kernel: Any, *numbers: Any, parts: int | None = None, **constants: Any) -> Prepared:
        grid = self.blocks, self.parts if parts is None else parts
        return Prepared(kernel, grid, *numbers, **self.constants, **constants)

    def prepared_both(self, kernel: Any, *numbers: Any, **constants: Any) -> Prepared:
        """Both passes in one launch, a program for each slice of each."""
        grid = (2 * cdiv(self.blocks, self.group) * self.group * self.parts,)
        common = self.blocks, self.parts, self.group, *self.sizes, *self.tiles
        return Prepared(kernel, grid, *common, *numbers, LAG=LAG, MERGE=self.merge, **self.constants, **constants)

    def tickets(self, like: Tensor) -> Tensor:
        """The next ticket, and the slices of each block that have their sums."""
        return like.new_zeros(1 + self.blocks, dtype=torch.int32)

    def totals(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for two sums per channel."""
        first = like.new_empty(self.view.C, dtype=torch.float64)
        return first, torch.empty_like(first)

    def inputs(self, *tensors: Tensor | None) -> Sequence[Any]:
        """x and the others, those copied that kernels cannot walk."""
        if not any(self.copied):
            return tensors
        return [self.laid_out(t) if copy and t is not None else t for t, copy in zip(tensors, self.copied, strict=True)]

    def laid_out(self, t: Tensor) -> Tensor:
        """t in the layout of the outputs."""
        return t if t.stride() == self.layout else t.new_empty_strided(t.shape, self.layout).copy_(t)

    def partials(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Room for two sums per slice and channel."""
        first = like.new_empty((self.parts, self.view.C), dtype=_wide(like))
        return first, torch.empty_like(first)

    def collapsed(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """The same with few enough slices: `merged`."""
        if self._collapse is None:
            return first, second
        few = first.new_empty((self.merged, self.view.C), dtype=torch.float64)
        fewer = torch.empty_like(few)
        self._collapse(first, second, few, fewer)
        return few, fewer


tiled = config.plan(Tiling)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=64)
def _in_two(number: float) -> tuple[float, float]:
    """A kernel's numbers are float32: this one's rounded value, and what that leaves."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return rounded, number - rounded


def _vector(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    momentum: float | None, eps: float, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x)
    if x.numel() == 0:
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        return y, x.new_zeros(x.shape[1], dtype=_wide(x)), x.new_zeros(x.shape[1], dtype=_wide(x))
    tiling, reduce, normalise = _forward_plan(
        x.device, x.dtype, x.shape, x.stride(), _stride(residual), _stride(running_mean), _stride(running_var),
        eps, activation, 1,
    )  # fmt: skip
    mean = x.new_empty(x.shape[1], dtype=_wide(x))
    rstd, shift = torch.empty_like(mean), torch.empty_like(mean)
    sums, squares = tiling.partials(x)
    x, residual = tiling.inputs(x, residual)
    tensors = x, _vector(weight), _vector(bias), residual, y, mean, rstd
    state = running_mean, running_var, num_batches_tracked if momentum is None else None, *_in_two(momentum or 0.0)
    if tiling.ticket:
        totals = tiling.totals(x)
        normalise(tiling.tickets(x), sums, squares, num_batches_tracked, *tensors, *totals, shift, *state)
        return y, mean, rstd
    reduce(x, sums, squares, shift, num_batches_tracked)
    sums, squares = tiling.collapsed(sums, squares)
    normalise(*tensors, sums, squares, shift, *state)
    return y, mean, rstd


def _stride(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


@config.plan
def _forward_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], of_residual: tuple[int, ...] | None,
    of_mean: tuple[int, ...] | None, of_var: tuple[int, ...] | None, eps: float, activation: str | None, twice: int,
) -> tuple[Tiling, Prepared, Prepared]:  # fmt: skip
    """statistics_kernel and normalise_kernel; the second is forward_kernel where that does both's work."""
    tiling = tiled(forward_config, device, dtype, shape, stride, of_residual, twice=twice)
    strides = [*tiling.strides, *(0 if of_vector is None else of_vector[0] for of_vector in (of_mean, of_var))]
    reduce = tiling.prepared(statistics_kernel, *tiling.sizes, *tiling.tiles, *tiling.strides[:3], SAMPLES=SAMPLES)
    if tiling.ticket:
        return tiling, reduce, tiling.prepared_both(forward_kernel, *strides, SAMPLES=SAMPLES, EPS=eps, ACTIVATION=activation)
    normalise = tiling.prepared(
        normalise_kernel, *tiling.sizes, tiling.merged, *tiling.tiles, *strides,
        EPS=eps, ACTIVATION=activation, TRAINING=True, MERGE=tiling.merge,
    )  # fmt: skip
    return tiling, reduce, normalise


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations per channel, in float64; zeros of an empty tensor."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros(x.shape[1], dtype=torch.float64)
    tiling, reduce, _ = _forward_plan(x.device, x.dtype, x.shape, x.stride(), None, None, None, 0.0, None, 0)
    sums, squares = tiling.partials(x)
    shift = x.new_empty(x.shape[1], dtype=_wide(x))
    reduce(tiling.inputs(x, None)[0], sums, squares, shift, None)
    count = x.numel() // x.shape[1]
    total, square = sums.sum(0, dtype=torch.float64), squares.sum(0, dtype=torch.float64)
    deviations = square - total * total / count
    return shift + total / count, torch.where(deviations < 0, 0.0, deviations)


def batch_norm_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)
    if x.numel():
        tiling, normalise = _inference_plan(x.device, x.dtype, x.shape, x.stride(), _stride(residual), eps, activation)
        x, residual = tiling.inputs(x, residual)
        normalise(x, _vector(weight), _vector(bias), residual, y, _vector(mean), _vector(var))
    return y


@config.plan
def _inference_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], of_residual: tuple[int, ...] | None,
    eps: float, activation: str | None,
) -> tuple[Tiling, Prepared]:  # fmt: skip
    tiling = tiled(forward_config, device, dtype, shape, stride, of_residual)
    return tiling, tiling.prepared(
        normalise_kernel, None, None, None, None, None, None, 0.0, 0.0,
        *tiling.sizes, 0, *tiling.tiles, *tiling.strides, 0, 0,
        EPS=eps, ACTIVATION=activation, TRAINING=False, MERGE=tiling.merge,
    )  # fmt: skip


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd_or_var: Tensor,
    y: Tensor | None, training: bool, eps: float, activation: str | None, mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    like = mean if weight is None else weight
    empty = torch.zeros_like if x.numel() == 0 else torch.empty_like
    dx, dw, db, dresidual = (empty(t) if wanted else None for t, wanted in zip((x, like, like, x), mask, strict=True))
    if x.numel() == 0 or not any(mask):
        return dx, dw, db, dresidual
    recompute = activation is not None and bias is not None
    tiling, reduce, gradient = _backward_plan(
        x.device, x.dtype, x.shape, x.stride(), dy.stride(), training, eps, activation, recompute, tuple(mask)
    )
    sums = dots = None
    if reduce is not None:
        sums, dots = tiling.partials(x)
    x, g = tiling.inputs(x, dy)
    vectors = _vector(weight), _vector(bias), _vector(mean), _vector(rstd_or_var)
    y = None if y is None or recompute else tiling.laid_out(y)  # it shares the strides of the outputs
    if tiling.ticket and gradient is not None:
        gradient(tiling.tickets(x), g, x, *vectors, y, dresidual, sums, dots, *tiling.totals(x), dx, dw, db)
        return dx, dw, db, dresidual
    if reduce is not None:
        reduce(g, x, *vectors, y, dresidual, sums, dots)
        sums, dots = tiling.collapsed(sums, dots)
    if gradient is not None:  # where the residual wants a gradient, that is the masked one
        gradient(g if dresidual is None else dresidual, x, *vectors, y, sums, dots, dx, dw, db)
    return dx, dw, db, dresidual


@config.plan
def _backward_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], of_dy: tuple[int, ...],
    training: bool, eps: float, activation: str | None, recompute: bool, mask: tuple[bool, ...],
) -> tuple[Tiling, Prepared | None, Prepared | None]:  # fmt: skip
    """reduce_kernel and gradient_kernel, where they are wanted; the second is backward_kernel where that does both's work."""
    twice = 2 + (activation is not None and not recompute and not mask[3]) if training and mask[0] else 0
    tiling = tiled(backward_config, device, dtype, shape, stride, of_dy, twice=twice)
    strides, count = _of_backward(tiling), math.prod(shape) // shape[1]
    constants = {"EPS": eps, "TRAINING": training}
    reduce = gradient = None
    if training or any(mask[1:]):
        reduce = tiling.prepared(
            reduce_kernel, *tiling.sizes, *tiling.tiles, *strides, ACTIVATION=activation, RECOMPUTE=recompute, **constants
        )
    if tiling.ticket:
        both = tiling.prepared_both(backward_kernel, count, *strides, EPS=eps, ACTIVATION=activation, RECOMPUTE=recompute)
        return tiling, reduce, both
    if mask[3]:  # gradient_kernel is given the masked gradient
        strides, activation, recompute = [*strides[6:], *strides[3:]], None, False
    if any(mask[:3]):
        parts = 0 if reduce is None else tiling.merged
        gradient = tiling.prepared(
            gradient_kernel, count, *tiling.sizes, parts, *tiling.tiles, *strides,
            ACTIVATION=activation, RECOMPUTE=recompute, PROJECT=training, MERGE=tiling.merge,
            parts=None if mask[0] else 1, **constants,
        )  # fmt: skip
    return tiling, reduce, gradient


def _of_backward(tiling: Tiling) -> list[int]:
    """Strides of dy, x and y, where tiling is for x and dy."""
    of_x, of_g, of_y = (tiling.strides[i : i + 3] for i in (0, 3, 6))
    return [*of_g, *of_x, *of_y]


def projected(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, y: Tensor | None,
    of_mean: Tensor, of_x_hat: Tensor, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """dx = weight rstd (g - of_mean - x_hat of_x_hat), g the gradient in front of the activation: training, with given sums."""
    dx = torch.empty_like(x)
    if x.numel():
        recompute = activation is not None and bias is not None
        tiling = tiled(backward_config, x.device, x.dtype, x.shape, x.stride(), dy.stride())
        x, g = tiling.inputs(x, dy)
        vectors = _vector(weight), _vector(bias), _vector(mean), _vector(var)
        y = None if y is None or recompute else tiling.laid_out(y)
        dot = of_x_hat * (var + eps).sqrt()  # as a sum of g (x - mean) over a count of 1
        gradient = tiling.prepared(
            gradient_kernel, 1, *tiling.sizes, 1, *tiling.tiles, *_of_backward(tiling),
            ACTIVATION=activation, RECOMPUTE=recompute, EPS=eps, TRAINING=False, PROJECT=True, MERGE=tiling.merge,
        )  # fmt: skip
        gradient(g, x, *vectors, y, _vector(of_mean), dot, dx, None, None)
    return dx


def explain(name: str, *args: Any) -> str:
    x: Tensor = args[1] if name == "batch_norm_backward" else args[0]
    kernels = {
        "batch_norm": "statistics_kernel, normalise_kernel",
        "batch_norm_inference": "normalise_kernel",
        "batch_norm_backward": "reduce_kernel, gradient_kernel",
    }
    view = View.of(x.shape, torch.empty_like(x, device="meta").stride())
    sizes = view.R, view.C, view.S
    choice = backward_config if name == "batch_norm_backward" else forward_config
    chosen = choice(x.device, x.dtype, *sizes)
    if "TICKET" in chosen:
        kernels["batch_norm"] = "forward_kernel"
        if name == "batch_norm_backward" and args[7] and args[-1][0]:  # training, and dx is wanted
            kernels["batch_norm_backward"] = "backward_kernel"
    return f"{kernels[name]}, {config.written(chosen)}, {choice.source(x.device, x.dtype, *sizes)}"
