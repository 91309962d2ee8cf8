"""cross_entropy: softmax cross-entropy of logits, for class indices and class probabilities.

With m = max_c x_c, z = x - m, s = sum_c exp z_c, p = exp(z) / s, the loss of a row and its gradients are

    indices         v ((1 - eps) w_t (log s - z_t) + eps/C sum_c w_c (log s - z_c)),  v = [t != ignore_index]
                    dx_c = v ((1 - eps) w_t (p_c - [c = t]) + eps/C (W p_c - w_c)),  W = sum_c w_c
    probabilities   sum_c u_c (log s - z_c),  u_c = w_c (q_c (1 - eps) + eps/C)
                    dx_c = U p_c - u_c,  U = sum_c u_c,  dq_c = (1 - eps) w_c (log s - z_c)

"mean" divides by D = sum of v w_t over the rows, for probabilities by their number. Neither log(sum exp x) nor a sum of x is
ever formed: both lose |m| times the rounding of float32.

Shapes: x (C,), (N, C) or (N, C, *), seen as (N, C, L) with R = N L rows; target (R,), or q in x's shape; w (C,). A tile is
BLOCK_R rows by BLOCK_C classes; its lanes lie along the classes or along the positions, whichever are neighbours in memory.

Saved for backward: x, target, w, and for rows longer than a tile (m, s), so that backward can be split over the classes.
Least traffic, e bytes a logit: forward R C e, backward 2 R C e, and 8 to 24 bytes a row; where forward writes the gradient,
2 R C e in all. FLOPs: about 5 R C forward and 4 R C backward, of them R C exponentials each.

A row with a target out of range has loss and gradient NaN, and nothing is read for it; an ignored row has gradient 0 whatever
it holds. Sums over rows are taken in a fixed order: results repeat bitwise.

Sources: running maximum and sum after Milakov and Gimelshein, arXiv 1805.02867, with one exponential a logit, or rescaled once
for some logits.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import Config, Target, cdiv, power_of_two
from .launch import Prepared

NONE, MEAN, SUM = 0, 1, 2  # torch's numbers
STATISTICS, GRADIENT = 1, 2  # what forward saves
WHOLE = 1024  # classes of the longest row that one tile holds in every kernel
SUM_BLOCK, DIVISOR_BLOCK = 4096, 1024
WHOLE_WITH_GRADIENT = 32768  # and of the longest that forward holds to write its gradient: more does not fit the registers
LOG2_E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


# ---- configurations -------------------------------------------------------------------------------------------------


def _warps(target: Target, elements: int) -> int:
    """About 32 elements a thread, 16 in tiles that would spill otherwise; a block has 1024 threads at most."""
    return min(max(elements // (1024 if elements < 16384 else 512), 4), 1024 // target.warp)


@config.choice("cross_entropy.tile")
def tile_config(target: Target, dtype: torch.dtype, C: int, whole: bool, along_classes: bool) -> Config:
    """The tile of the kernels that go over rows. whole: the tile holds all classes."""
    if target.interpreted:
        return {"BLOCK_R": 16, "BLOCK_C": power_of_two(C, 1, 1 << 20) if whole else 32, "TILES": 1 if whole else 2}
    if not whole and along_classes:  # one row, read in steps
        block = power_of_two(C, 1024, 8192)
        return _row(block, max(block // 2048, 1), _warps(target, block))
    if not whole:
        return {"BLOCK_R": 64, "BLOCK_C": 32, "TILES": 1, "num_warps": 4}
    block = power_of_two(C, 1, WHOLE_WITH_GRADIENT)
    rows = max(2048 // block, 1) if along_classes else max(min(2048 // block, 128), 16)
    return {"BLOCK_R": rows, "BLOCK_C": block, "TILES": 1, "num_warps": _warps(target, rows * block)}


def _one_tile(tile: Config) -> Config:
    """For kernels that take one tile at a time."""
    return {name: value for name, value in tile.items() if name != "TILES"}


def _row(block: int, tiles: int, warps: int) -> Config:
    """`block` classes a step, as so many tiles: a lane rescales its sum once for one element of each."""
    return {"BLOCK_R": 1, "BLOCK_C": block // tiles, "TILES": tiles, "num_warps": warps}


@config.choice("cross_entropy.prob")
def prob_config(target: Target, dtype: torch.dtype, C: int, along_classes: bool) -> Config:
    """The tile of the forward kernel for probabilities, which goes over the classes in steps and keeps four sums a lane."""
    if target.interpreted or not along_classes or C <= 1024:
        return _one_tile(tile_config.static(target, dtype, C, C <= WHOLE, along_classes))
    return {"BLOCK_R": 1, "BLOCK_C": 2048, "num_warps": 4}


@config.choice("cross_entropy.slices")
def slices_config(target: Target, dtype: torch.dtype, R: int, C: int) -> Config:
    """Few rows, many classes: each row is divided among SLICES programs."""
    if target.interpreted:
        return {"SLICES": 4 if C > 64 else 1, "BLOCK_C": 16, "TILES": 2}
    block = power_of_two(C, 1024, 4096)
    wanted = cdiv(4 * target.sms, max(R, 1))
    slices = power_of_two(wanted, 1, 64) if 2 * target.sms > R else 1
    return {"SLICES": min(slices, power_of_two(cdiv(C, block), 1, 64)), "BLOCK_C": 1024, "TILES": block // 1024, "num_warps": 4}


@config.choice("cross_entropy.backward")
def backward_config(target: Target, dtype: torch.dtype, C: int, along_classes: bool) -> Config:
    """The tile of the backward kernel where it is split over the classes."""
    if target.interpreted:
        return {"BLOCK_R": 16, "BLOCK_C": 32}
    if along_classes:
        return {"BLOCK_R": 1, "BLOCK_C": power_of_two(C, 1024, 4096), "num_warps": 4 if C <= 2048 else 8}
    return {"BLOCK_R": 64, "BLOCK_C": 32, "num_warps": 4}


def _tiles(*tiles: tuple[int, int, int]) -> list[Config]:
    return [{"BLOCK_R": rows, "BLOCK_C": classes, "num_warps": warps} for rows, classes, warps in tiles]


def tile_candidates(target: Target, dtype: torch.dtype, C: int, whole: bool, along_classes: bool) -> list[Config]:
    if whole:  # all classes, and no fewer warps than registers want
        chosen = tile_config.static(target, dtype, C, whole, along_classes)
        rows, classes = chosen["BLOCK_R"], chosen["BLOCK_C"]
        most = 1024 // target.warp
        offered = [(n, classes, warps) for n in (rows, 2 * rows, max(rows // 2, 1)) for warps in (4, 8, 16)]
        fitting = [t for t in offered if _warps(target, t[0] * classes) <= t[2] <= min(most, t[0] * classes // target.warp)]
        return [tile | {"TILES": 1} for tile in _tiles(*fitting)]
    if along_classes:
        steps = [(4096, 2, 4), (4096, 4, 4), (8192, 2, 16 if target.warp == 32 else 8), (16384, 8, 8), (16384, 4, 16)]
        return [_row(1024, 1, 4), *(_row(*step) for step in steps if step[2] * target.warp <= 1024)]
    return [tile | {"TILES": 1} for tile in _tiles((32, 32, 4), (64, 16, 4), (128, 16, 4), (128, 32, 8), (64, 64, 8))]


def prob_candidates(target: Target, dtype: torch.dtype, C: int, along_classes: bool) -> list[Config]:
    if along_classes:
        return _tiles((1, 1024, 4), (1, 2048, 8), (1, 4096, 8), (4, 512, 4))
    return _tiles((32, 32, 4), (64, 16, 4), (128, 16, 8), (64, 32, 8))


def slices_candidates(target: Target, dtype: torch.dtype, R: int, C: int) -> list[Config]:
    chosen = slices_config.static(target, dtype, R, C)
    slices, tiles = chosen["SLICES"], chosen["TILES"]
    offered = [(2 * slices, 1024, tiles, 4), (slices // 2, 1024, tiles, 4), (slices, 1024, 1, 4), (slices, 2048, 2, 8),
               (slices, 1024, 8, 4), (2 * slices, 1024, 1, 4)]  # fmt: skip
    return [{"SLICES": n, "BLOCK_C": c, "TILES": k, "num_warps": warps} for n, c, k, warps in offered if 1 <= n <= 64]


def backward_candidates(target: Target, dtype: torch.dtype, C: int, along_classes: bool) -> list[Config]:
    if along_classes:
        return _tiles((1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (1, 4096, 8), (2, 1024, 4))
    return _tiles((32, 32, 4), (64, 16, 4), (128, 16, 4), (128, 32, 8), (64, 64, 8))


tile_config.candidates = tile_candidates
prob_config.candidates = prob_candidates
slices_config.candidates = slices_candidates
backward_config.candidates = backward_candidates


# ---- parts ----------------------------------------------------------------------------------------------------------


@triton.jit
def rows_of_program(L, blocks, BLOCK_R: tl.constexpr):
    """(n, positions, whether they exist, row numbers) of a program's rows, all of one n, which has `blocks` programs."""
    n = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    return n, position, position < L, n * L + position


@triton.jit
def tile_at(start, tensor, stride_c, BLOCK_C: tl.constexpr):
    """(classes, pointers) of a tile, from the pointers of its rows."""
    c = start + tl.arange(0, BLOCK_C)
    return c, tensor[:, None] + c.to(tl.int64)[None, :] * stride_c


@triton.jit
def tiles_at(start, tensor, stride_c, BLOCK_C: tl.constexpr, TILES: tl.constexpr):
    """The same of TILES tiles, one after another: (TILES, BLOCK_C) classes."""
    c = start + tl.arange(0, TILES)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    return c, tensor[:, None, None] + c.to(tl.int64)[None, :, :] * stride_c


@triton.jit
def class_weights(weight, c, C, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """Of the classes, for any row; 0 outside."""
    w = tl.load(weight + c, mask=c < C, other=0.0) if HAS_WEIGHT else tl.where(c < C, 1.0, 0.0)
    return tl.expand_dims(w.to(ACC), 0)


@triton.jit
def absorb_tiles(v, m, s):
    """The lanes' maximum m and sum s of exp(x - m), with tiles v (rows, tiles, lanes) taken in; -inf and NaN as in a sum of
    exponentials. One exponential an element, and one a lane for what is there; see absorb for one tile."""
    top = tl.max(v, 1)
    top = tl.where(top > m, top, m)
    base = tl.where(top == -INF, 0.0, top)
    return top, s * tl.exp2((m - base) * LOG2_E) + tl.sum(tl.exp2((v - base[:, None, :]) * LOG2_E), 1)


@triton.jit
def absorb_tiles_weighted(u, v, inside, m_before, m, a, seen):
    """The lanes' sum a of u (x - m) and sum of u, with tiles u and v taken in after m_before became m."""
    a = tl.where(m_before == -INF, a, a - seen * (m - m_before))
    z = tl.where(v == -INF, -INF, v - m[:, None, :])
    return a + tl.sum(tl.where(inside, u * z, 0.0), 1), seen + tl.sum(u, 1)


@triton.jit
def step_of_tiles(
    start, x_row, exists, stride_c, weight, C, m, s, a, seen,
    BLOCK_C: tl.constexpr, TILES: tl.constexpr, HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The lanes' sums with the tiles from class `start` on taken in."""
    c, pointers = tiles_at(start, x_row, stride_c, BLOCK_C, TILES)
    inside = exists[:, None, None] & (c < C)[None, :, :]
    v = tl.load(pointers, mask=inside, other=-INF).to(ACC)
    before = m
    m, s = absorb_tiles(v, m, s)
    if EPS > 0:
        a, seen = absorb_tiles_weighted(class_weights(weight, c, C, HAS_WEIGHT, ACC), v, inside, before, m, a, seen)
    return m, s, a, seen


@triton.jit
def absorb(v, m, s):
    """The lanes' maximum m and sum s of exp(x - m), with v taken in; -inf and NaN as in a sum of exponentials."""
    d = tl.where(v == -INF, -INF, v - m)
    e = tl.exp2(-tl.abs(d) * LOG2_E)  # rescales s where v is the new maximum, else it is the new term
    return tl.where(v > m, v, m), tl.where(d > 0, s * e + 1.0, s + e)


@triton.jit
def absorb_weighted(u, v, inside, m_before, m, a, seen):
    """The lanes' sum a of u (x - m) and sum of u, with u and v taken in after m_before became m."""
    a = tl.where(m_before == -INF, a, a - seen * (m - m_before))
    z = tl.where(v == -INF, -INF, v - m)
    return a + tl.where(inside, u * z, 0.0), seen + u


@triton.jit
def combine(m, s):
    """(maximum, sum) of the rows from those of their lanes. A row of -inf has maximum 0 and sum 0."""
    top = tl.max(m, 1)
    top = tl.where(top == -INF, 0.0, top)
    return top, tl.sum(s * tl.exp2((m - top[:, None]) * LOG2_E), 1)


@triton.jit
def combine_weighted(m, a, seen, top):
    """(sum of u (x - top), sum of u) of the rows."""
    return tl.sum(tl.where(m == -INF, a, a - seen * (top[:, None] - m)), 1), tl.sum(seen, 1)


@triton.jit
def load_targets(target, weight, rows, exists, C, ignore_index, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr):
    """(classes, whether they count, whether they are classes, their weights: 0 where they are not)."""
    t = tl.load(target + rows, mask=exists, other=0).to(tl.int64)
    counts = exists & (t != ignore_index)
    known = counts & (t >= 0) & (t < C)
    w_t = tl.load(weight + t, mask=known, other=0.0) if HAS_WEIGHT else tl.where(known, 1.0, 0.0)
    return t, counts, known, w_t.to(ACC)


@triton.jit
def index_losses(x_row, stride_xc, t, counts, known, w_t, top, s, a, total, C, EPS: tl.constexpr, ACC: tl.constexpr):
    """The rows' losses. a, total: sums of w (x - top) and w, read where labels are smoothed."""
    log_s = tl.log(s)
    z_t = tl.load(x_row + t * stride_xc, mask=known, other=0.0).to(ACC) - top
    loss = w_t * (log_s - z_t)
    if EPS > 0:
        loss = (1 - EPS) * loss + tl.full((), EPS, ACC) / C * (total * log_s - a)
    return tl.where(counts, tl.where(known, loss, float("nan")), 0.0)


@triton.jit
def store_losses(loss, loss_rows, w_rows, partial, rows, exists, REDUCE: tl.constexpr):
    """The rows' losses, or the program's sums of them and of their weights."""
    if REDUCE:
        tl.store(partial + tl.program_id(0), tl.sum(tl.where(exists, loss_rows, 0.0), 0))
        tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(exists, w_rows, 0.0), 0))
    else:
        tl.store(loss + rows, loss_rows.to(loss.dtype.element_ty), mask=exists)


@triton.jit
def index_gradient(e, scale, t, counts, known, w, w_t, s, total, c, C, EPS: tl.constexpr, ACC: tl.constexpr):
    """dx of a tile, from e = exp(x - m), scaled by the rows' cotangents."""
    if EPS > 0:
        share = tl.full((), EPS, ACC) / C
        a = (1 - EPS) * w_t + share * total
    else:
        a = w_t
    g = e * (scale * a / s)[:, None] - tl.where(c[None, :] == t[:, None], (scale * (1 - EPS) * w_t)[:, None], 0.0)
    if EPS > 0:
        g -= (scale * share)[:, None] * w
    return tl.where(counts[:, None], tl.where(known[:, None], g, float("nan")), 0.0)


# ---- class indices --------------------------------------------------------------------------------------------------


@triton.jit
def cross_entropy_kernel(
    x, target, weight, divisor, parts, loss, partial, statistics, dx,
    C, L, stride_xn, stride_xc, stride_xl, stride_dn, stride_dc, stride_dl, R, blocks, ignore_index,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr,
    ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, SLICED: tl.constexpr, HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, REDUCE: tl.constexpr,
    SAVE: tl.constexpr, GRADIENT: tl.constexpr, DIVIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_R rows; optionally their statistics, and their gradients for the cotangent 1 (WHOLE).

    SLICED: slice_kernel has gone over the logits, and BLOCK_C is the number of its slices.
    """
    C, L = C * ALIGN_C, L * ALIGN_L
    n, position, exists, rows = rows_of_program(L, blocks, BLOCK_R)
    x_row = x + n * (stride_xn * ALIGN) + position * (stride_xl * ALIGN_C)
    m = tl.full((BLOCK_R, BLOCK_C), -INF, ACC)
    s = tl.full((BLOCK_R, BLOCK_C), 0, ACC)
    a, seen = s, s
    if SLICED:
        part = parts + rows[:, None] * (4 * BLOCK_C) + tl.arange(0, BLOCK_C)[None, :]
        m = tl.load(part, mask=exists[:, None], other=-INF)
        s = tl.load(part + BLOCK_C, mask=exists[:, None], other=0.0)
        a = tl.load(part + 2 * BLOCK_C, mask=exists[:, None], other=0.0)
        seen = tl.load(part + 3 * BLOCK_C, mask=exists[:, None], other=0.0)
    elif WHOLE:
        c, pointers = tile_at(0, x_row, stride_xc * ALIGN_L, BLOCK_C)
        inside = exists[:, None] & (c < C)[None, :]
        v = tl.load(pointers, mask=inside, other=-INF).to(ACC)
        w = s
        if EPS > 0:
            w = class_weights(weight, c, C, HAS_WEIGHT, ACC)
            a, seen = absorb_weighted(w, v, inside, m, v, a, seen)
        m, s = v, s + 1.0
    elif TILES == 1:
        for start in range(0, C, BLOCK_C):
            c, pointers = tile_at(start, x_row, stride_xc * ALIGN_L, BLOCK_C)
            inside = exists[:, None] & (c < C)[None, :]
            v = tl.load(pointers, mask=inside, other=-INF).to(ACC)
            before = m
            m, s = absorb(v, m, s)
            if EPS > 0:
                w = class_weights(weight, c, C, HAS_WEIGHT, ACC)
                a, seen = absorb_weighted(w, v, inside, before, m, a, seen)
    else:
        for start in range(0, C, TILES * BLOCK_C):
            m, s, a, seen = step_of_tiles(
                start, x_row, exists, stride_xc * ALIGN_L, weight, C, m, s, a, seen, BLOCK_C, TILES, HAS_WEIGHT, EPS, ACC
            )
    top, sum_row = combine(m, s)
    a_row, w_row = top, top
    if EPS > 0:
        a_row, w_row = combine_weighted(m, a, seen, top)
    t, counts, known, w_t = load_targets(target, weight, rows, exists, C, ignore_index, HAS_WEIGHT, ACC)
    losses = index_losses(x_row, stride_xc * ALIGN_L, t, counts, known, w_t, top, sum_row, a_row, w_row, C, EPS, ACC)
    store_losses(loss, losses, w_t, partial, rows, exists, REDUCE)
    if SAVE:
        tl.store(statistics + rows, top, mask=exists)
        tl.store(statistics + R + rows, sum_row, mask=exists)
    if GRADIENT:
        scale = tl.full((BLOCK_R,), 1.0, ACC)
        if DIVIDE:
            scale = scale / tl.load(divisor)
        e = tl.exp2((m - top[:, None]) * LOG2_E)
        g = index_gradient(e, scale, t, counts, known, w, w_t, sum_row, w_row, c, C, EPS, ACC)
        dx_row = dx + n * (stride_dn * ALIGN) + position * (stride_dl * ALIGN_C)
        c, pointers = tile_at(0, dx_row, stride_dc * ALIGN_L, BLOCK_C)
        tl.store(pointers, g.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def cross_entropy_backward_kernel(
    dy, x, target, weight, total, divisor, statistics, dx,
    C, L, stride_dy, stride_xn, stride_xc, stride_xl, stride_dn, stride_dc, stride_dl, R, blocks, ignore_index,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, DIVIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx of BLOCK_R rows and BLOCK_C classes; WHOLE: all of them, so that maximum and sum are found again."""
    C, L = C * ALIGN_C, L * ALIGN_L
    n, position, exists, rows = rows_of_program(L, blocks, BLOCK_R)
    x_row = x + n * (stride_xn * ALIGN) + position * (stride_xl * ALIGN_C)
    c, pointers = tile_at(tl.program_id(1) * BLOCK_C, x_row, stride_xc * ALIGN_L, BLOCK_C)
    inside = exists[:, None] & (c < C)[None, :]
    v = tl.load(pointers, mask=inside, other=-INF).to(ACC)
    if WHOLE:
        top, s = combine(v, tl.full((BLOCK_R, BLOCK_C), 1.0, ACC))
    else:
        top = tl.load(statistics + rows, mask=exists, other=0.0)
        s = tl.load(statistics + R + rows, mask=exists, other=1.0)
    t, counts, known, w_t = load_targets(target, weight, rows, exists, C, ignore_index, HAS_WEIGHT, ACC)
    scale = tl.load(dy + rows * stride_dy, mask=exists, other=0.0).to(ACC)
    if DIVIDE:
        scale = scale / tl.load(divisor)
    w = v
    if EPS > 0:
        w = class_weights(weight, c, C, HAS_WEIGHT, ACC)
    total_weight = tl.load(total) if HAS_WEIGHT and EPS > 0 else C
    e = tl.exp2((v - top[:, None]) * LOG2_E)
    g = index_gradient(e, scale, t, counts, known, w, w_t, s, total_weight, c, C, EPS, ACC)
    dx_row = dx + n * (stride_dn * ALIGN) + position * (stride_dl * ALIGN_C)
    c, pointers = tile_at(tl.program_id(1) * BLOCK_C, dx_row, stride_dc * ALIGN_L, BLOCK_C)
    tl.store(pointers, g.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def slice_kernel(
    x, weight, parts, C, stride_xn, stride_xc,
    SLICES: tl.constexpr, BLOCK_C: tl.constexpr, TILES: tl.constexpr, ALIGN: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    EPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and, for smoothed labels, weighted sums of a slice of one row: parts (R, 4, SLICES)."""
    C = C * ALIGN
    row = tl.program_id(0).to(tl.int64)
    x_row = x + row * (stride_xn * ALIGN) + tl.full((1,), 0, tl.int64)
    m, s = tl.full((1, BLOCK_C), -INF, ACC), tl.full((1, BLOCK_C), 0, ACC)
    a, seen = tl.full((1, BLOCK_C), 0, ACC), tl.full((1, BLOCK_C), 0, ACC)
    for start in range(tl.program_id(1) * (TILES * BLOCK_C), C, SLICES * TILES * BLOCK_C):
        m, s, a, seen = step_of_tiles(
            start, x_row, tl.full((1,), True, tl.int1), stride_xc, weight, C, m, s, a, seen,
            BLOCK_C, TILES, HAS_WEIGHT, EPS, ACC,
        )  # fmt: skip
    top, sum_ = combine(m, s)
    a_row, w_row = top, top
    if EPS > 0:
        a_row, w_row = combine_weighted(m, a, seen, top)
    part = parts + row * (4 * SLICES) + tl.program_id(1) + tl.full((1,), 0, tl.int64)
    tl.store(part, tl.where(tl.max(m, 1) == -INF, -INF, top))  # a slice of -inf must not set the row's maximum
    tl.store(part + SLICES, sum_)
    tl.store(part + 2 * SLICES, a_row)
    tl.store(part + 3 * SLICES, w_row)


# ---- class probabilities --------------------------------------------------------------------------------------------


@triton.jit
def load_coefficients(pointers, inside, w, C, EPS: tl.constexpr, ACC: tl.constexpr):
    """u = w times the smoothed probabilities, 0 outside."""
    q = tl.load(pointers, mask=inside, other=0.0).to(ACC)
    if EPS > 0:
        q = q * (1 - EPS) + tl.full((), EPS, ACC) / C
    return tl.where(inside, w * q, 0.0)


@triton.jit
def cross_entropy_prob_kernel(
    x, q, weight, loss, partial, statistics,
    C, L, stride_xn, stride_xc, stride_xl, stride_qn, stride_qc, stride_ql, R, blocks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr, ALIGN: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, REDUCE: tl.constexpr, SAVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Losses of BLOCK_R rows, and their statistics with U as a third."""
    C, L = C * ALIGN_C, L * ALIGN_L
    n, position, exists, rows = rows_of_program(L, blocks, BLOCK_R)
    x_row = x + n * (stride_xn * ALIGN) + position * (stride_xl * ALIGN_C)
    q_row = q + n * (stride_qn * ALIGN) + position * (stride_ql * ALIGN_C)
    m = tl.full((BLOCK_R, BLOCK_C), -INF, ACC)
    s = tl.full((BLOCK_R, BLOCK_C), 0, ACC)
    a, seen = s, s
    for start in range(0, C, BLOCK_C):
        c, pointers = tile_at(start, x_row, stride_xc * ALIGN_L, BLOCK_C)
        inside = exists[:, None] & (c < C)[None, :]
        v = tl.load(pointers, mask=inside, other=-INF).to(ACC)
        c, pointers = tile_at(start, q_row, stride_qc * ALIGN_L, BLOCK_C)
        u = load_coefficients(pointers, inside, class_weights(weight, c, C, HAS_WEIGHT, ACC), C, EPS, ACC)
        before = m
        m, s = absorb(v, m, s)
        a, seen = absorb_weighted(u, v, inside, before, m, a, seen)
    top, sum_row = combine(m, s)
    a_row, u_row = combine_weighted(m, a, seen, top)
    losses = u_row * tl.log(sum_row) - a_row
    store_losses(loss, losses, tl.full((BLOCK_R,), 1.0, ACC), partial, rows, exists, REDUCE)
    if SAVE:
        tl.store(statistics + rows, top, mask=exists)
        tl.store(statistics + R + rows, sum_row, mask=exists)
        tl.store(statistics + 2 * R + rows, u_row, mask=exists)


@triton.jit
def cross_entropy_prob_backward_kernel(
    dy, x, q, weight, statistics, dx, dq,
    C, L, stride_dy, stride_xn, stride_xc, stride_xl, stride_qn, stride_qc, stride_ql,
    stride_dxn, stride_dxc, stride_dxl, stride_dqn, stride_dqc, stride_dql, R, blocks,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr, ALIGN: tl.constexpr,
    WHOLE: tl.constexpr, HAS_WEIGHT: tl.constexpr, EPS: tl.constexpr, DIVIDE: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DQ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """dx and dq of BLOCK_R rows and BLOCK_C classes."""
    C, L = C * ALIGN_C, L * ALIGN_L
    start = tl.program_id(1) * BLOCK_C
    n, position, exists, rows = rows_of_program(L, blocks, BLOCK_R)
    x_row = x + n * (stride_xn * ALIGN) + position * (stride_xl * ALIGN_C)
    c, pointers = tile_at(start, x_row, stride_xc * ALIGN_L, BLOCK_C)
    inside = exists[:, None] & (c < C)[None, :]
    v = tl.load(pointers, mask=inside, other=-INF).to(ACC)
    w = class_weights(weight, c, C, HAS_WEIGHT, ACC)
    if WANT_DX:
        q_row = q + n * (stride_qn * ALIGN) + position * (stride_ql * ALIGN_C)
        c, pointers = tile_at(start, q_row, stride_qc * ALIGN_L, BLOCK_C)
        u = load_coefficients(pointers, inside, w, C, EPS, ACC)
    if WHOLE:
        top, s = combine(v, tl.full((BLOCK_R, BLOCK_C), 1.0, ACC))
        if WANT_DX:
            u_row = tl.sum(u, 1)
    else:
        top = tl.load(statistics + rows, mask=exists, other=0.0)
        s = tl.load(statistics + R + rows, mask=exists, other=1.0)
        u_row = tl.load(statistics + 2 * R + rows, mask=exists, other=0.0)
    scale = tl.load(dy + rows * stride_dy, mask=exists, other=0.0).to(ACC)
    if DIVIDE:
        scale = scale / R
    z = v - top[:, None]
    if WANT_DX:
        g = (tl.exp2(z * LOG2_E) * (u_row / s)[:, None] - u) * scale[:, None]
        dx_row = dx + n * (stride_dxn * ALIGN) + position * (stride_dxl * ALIGN_C)
        c, pointers = tile_at(start, dx_row, stride_dxc * ALIGN_L, BLOCK_C)
        tl.store(pointers, g.to(dx.dtype.element_ty), mask=inside)
    if WANT_DQ:
        g = (scale[:, None] * (1 - EPS)) * w * (tl.log(s)[:, None] - z)
        dq_row = dq + n * (stride_dqn * ALIGN) + position * (stride_dql * ALIGN_C)
        c, pointers = tile_at(start, dq_row, stride_dqc * ALIGN_L, BLOCK_C)
        tl.store(pointers, g.to(dq.dtype.element_ty), mask=inside)


# ---- sums over the rows ---------------------------------------------------------------------------------------------


@triton.jit
def divisor_kernel(
    target, weight, partial, C, R, ignore_index,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The weights of BLOCK rows, summed, where forward needs the divisor before it has gone over the logits."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    _, _, _, w_t = load_targets(target, weight, rows, rows < R, C, ignore_index, HAS_WEIGHT, ACC)
    tl.store(partial + tl.program_id(0), tl.full((), 0, ACC))
    tl.store(partial + tl.num_programs(0) + tl.program_id(0), tl.sum(w_t, 0))


@triton.jit
def sum_kernel(
    partial, sums, divisor, loss, P,
    BLOCK: tl.constexpr, LAST: tl.constexpr, DIVIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums BLOCK of P pairs (2, P) -> (2, programs); the last one writes the loss and the divisor."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    losses = tl.sum(tl.load(partial + i, mask=i < P, other=0.0), 0)
    weights = tl.sum(tl.load(partial + P + i, mask=i < P, other=0.0), 0)
    if LAST:
        if DIVIDE:
            losses = losses / weights
            tl.store(divisor, weights)
        tl.store(loss, losses.to(loss.dtype.element_ty))
    else:
        tl.store(sums + tl.program_id(0), losses)
        tl.store(sums + tl.num_programs(0) + tl.program_id(0), weights)


# ---- launchers ------------------------------------------------------------------------------------------------------


def _planes(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one shape (C,), (N, C) or (N, C, *), all seen as (N, C, L); a matrix has N = 1 and its rows along L."""
    shape = tensors[0].shape
    if len(shape) == 1:
        return [t.view(1, -1, 1) for t in tensors]
    if len(shape) == 2:
        return [t.t().unsqueeze(0) for t in tensors]
    L = math.prod(shape[2:])
    planes = [t.reshape(*shape[:2], L) for t in tensors]  # a copy where one stride cannot span the positions
    if all(p.stride(0) == L * p.stride(2) for p in planes):  # channels_last: the positions of all images are one line
        planes = [p.permute(1, 0, 2).reshape(1, shape[1], shape[0] * L) for p in planes]
    return planes


def _meta_planes(shape: torch.Size, *strides: tuple[int, ...]) -> tuple[list[Tensor], bool]:
    """The planes of tensors with these strides, for their layouts; and whether all are views, which begin where these do."""
    tensors = [config.meta(shape, stride) for stride in strides]
    planes = _planes(*tensors)
    views = all(p.untyped_storage()._cdata == t.untyped_storage()._cdata for p, t in zip(planes, tensors, strict=True))
    return planes, views


def _stride_of_gradient(shape: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty_like(config.meta(shape, stride)).stride()


def _along_classes(planes: Tensor) -> bool:
    """Whether classes, not positions, are neighbours in memory."""
    return planes.stride(1) == 1


def _aligned(*planes: Tensor) -> tuple[dict[str, int], tuple[int, ...]]:
    """(ALIGN constants; C, L and all strides, divided by what the kernel multiplies them with).

    Triton derives the width of loads from the divisors that it can see, and looks for none but 16 in an argument.
    """
    N, C, L = planes[0].shape
    strides = [(p.stride(0) if N > 1 else 0, p.stride(1), p.stride(2)) for p in planes]
    align_c = align_l = 1
    if all(c == 1 for _, c, _ in strides):
        align_c = math.gcd(16, C, *[s for n, _, p in strides for s in (n, p)])
    elif all(p == 1 for _, _, p in strides):
        align_l = math.gcd(16, L, *[s for n, c, _ in strides for s in (n, c)])
    align = align_c * align_l
    divided = [s for n, c, p in strides for s in (n // align, c // align_l, p // align_c)]
    return {"ALIGN_C": align_c, "ALIGN_L": align_l, "ALIGN": align}, (C // align_c, L // align_l, *divided)


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _written(dx: Tensor, planes: Tensor) -> Tensor:
    """dx, once the kernel has filled its planes: where they could not be a view, a contiguous copy was filled."""
    if planes.data_ptr() != dx.data_ptr():
        dx.copy_(planes.reshape(dx.shape))
    return dx


def _loss_shape(x: Tensor, reduction: int) -> tuple[int, ...]:
    return () if reduction or x.dim() == 1 else (*x.shape[:1], *x.shape[2:])


def _gradient_reduction(dtype: torch.dtype, reduction: int) -> int:
    """The reduction whose gradient forward writes: float16 leaves the mean's divisor to backward."""
    return SUM if reduction == MEAN and dtype == torch.float16 else reduction


def _row_cotangents(dy: Tensor, x: Tensor, reduction: int) -> tuple[Tensor, int]:
    """The cotangents as one line, and its stride: 0 where all rows share one."""
    if reduction or x.dim() == 1:
        return dy, 0
    dy = dy.reshape(-1)
    return dy, dy.stride(0)


def _sum(partial: Tensor, loss: Tensor, divisor: Tensor, mean: bool) -> None:
    """loss (and divisor) from the programs' sums (2, P): a tree of fixed shape."""
    while True:
        start, programs = _sum_plan(partial.dtype, partial.shape[1], mean)
        sums = None if programs == 1 else partial.new_empty((2, programs))
        start(partial, sums, divisor, loss)
        if sums is None:
            return
        partial = sums


@config.plan
def _sum_plan(dtype: torch.dtype, P: int, mean: bool) -> tuple[Prepared, int]:
    programs = max(cdiv(P, SUM_BLOCK), 1)
    constants = {"BLOCK": SUM_BLOCK, "LAST": programs == 1, "DIVIDE": mean, "ACC": config.accumulator(dtype)}
    return Prepared(sum_kernel, (programs,), P, **constants), programs


def _divisor(target: Tensor, weight: Tensor | None, C: int, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """The sum of the targets' weights."""
    start, programs = _divisor_plan(dtype, weight is not None, C, target.numel(), ignore_index)
    partial, divisor = target.new_empty((2, programs), dtype=dtype), target.new_empty((), dtype=dtype)
    start(target, weight, partial)
    _sum(partial, torch.empty_like(divisor), divisor, mean=True)
    return divisor


@config.plan
def _divisor_plan(dtype: torch.dtype, has_weight: bool, C: int, R: int, ignore_index: int) -> tuple[Prepared, int]:
    programs = cdiv(R, DIVISOR_BLOCK)
    constants = {"BLOCK": DIVISOR_BLOCK, "HAS_WEIGHT": has_weight, "ACC": config.accumulator(dtype)}
    return Prepared(divisor_kernel, (programs,), C, R, ignore_index, **constants), programs


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    wide: bool,
    save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    narrow, dtype = x.dtype, _wide(x.dtype)
    plan = _forward_plan(
        x.device, narrow, x.shape, x.stride(), weight is not None, ignore_index, reduction, max(label_smoothing, 0.0), save
    )
    if plan is None:  # as forward and backward
        loss, statistics, divisor, _ = cross_entropy(
            x, target, weight, ignore_index, reduction, label_smoothing, wide, STATISTICS
        )
        reduction = _gradient_reduction(narrow, reduction)
        one = x.new_ones(_loss_shape(x, reduction), dtype=dtype)
        dx = cross_entropy_backward(one, x, target, weight, statistics, divisor, ignore_index, reduction, label_smoothing)
        return loss, x.new_empty((2, 0), dtype=dtype), divisor, dx

    target, weight = target.contiguous(), None if weight is None else weight.contiguous()
    loss = x.new_empty(_loss_shape(x, reduction), dtype=dtype if wide else narrow)
    statistics = x.new_empty((2, plan.rows if save == STATISTICS else 0), dtype=dtype)
    divisor = x.new_empty(() if reduction == MEAN else 0, dtype=dtype)
    partial = x.new_empty((2, plan.programs), dtype=dtype) if reduction else None
    known_divisor = _divisor(target, weight, plan.C, ignore_index, dtype) if plan.divide else divisor
    planes = dx_planes = x if plan.views else _planes(x)[0]
    dx = torch.empty_like(x) if save == GRADIENT else x.new_empty(0)
    if save == GRADIENT:
        dx_planes = dx if plan.views else _planes(dx)[0]
    parts = None
    if plan.slices is not None:
        parts = x.new_empty(plan.parts, dtype=dtype)
        plan.slices(planes, weight, parts)
    plan.losses(planes, target, weight, known_divisor, parts, loss, partial, statistics, dx_planes)
    if partial is not None:
        _sum(partial, loss, divisor, reduction == MEAN)
    return loss, statistics, divisor, _written(dx, dx_planes) if save == GRADIENT else dx


class _Forward(NamedTuple):
    """The launches of a forward: slices, where few rows are divided among many programs, then the losses."""

    views: bool  # the planes are, so that kernels may be given the tensors
    rows: int
    C: int
    divide: bool  # the kernel needs the divisor first
    slices: Prepared | None
    parts: tuple[int, int, int]
    losses: Prepared
    programs: int


@config.plan
def _forward_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...],
    has_weight: bool, ignore_index: int, reduction: int, eps: float, save: int,
) -> _Forward | None:  # fmt: skip
    """None: forward cannot hold a row as long as these to write its gradient."""
    gradient = save == GRADIENT
    planes, views = _meta_planes(shape, stride, *([_stride_of_gradient(shape, stride)] if gradient else []))
    N, C, L = planes[0].shape
    along_classes, rows = _along_classes(planes[0]), N * L
    longest = WHOLE_WITH_GRADIENT if along_classes else WHOLE
    if eps > 0:  # two more sums a lane
        longest = max(longest // 4, WHOLE)
    if gradient and longest < C:
        return None
    divide = gradient and _gradient_reduction(dtype, reduction) == MEAN
    whole = gradient or C <= WHOLE
    chosen = tile_config(device, dtype, C, whole, along_classes)
    constants = {"HAS_WEIGHT": has_weight, "EPS": eps, "ACC": config.accumulator(dtype)}
    slices, parts = None, (0, 0, 0)
    if not whole and along_classes and N == 1:
        sliced = slices_config(device, dtype, rows, C)
        if sliced["SLICES"] > 1:
            parts = (rows, 4, sliced["SLICES"])
            align, (classes, _, _, stride_c, stride_row) = _aligned(planes[0])
            slices = Prepared(
                slice_kernel, (rows, sliced["SLICES"]), classes, stride_row, stride_c,
                ALIGN=align["ALIGN"], **constants, **sliced,
            )  # fmt: skip
            chosen = {"BLOCK_R": 8, "BLOCK_C": sliced["SLICES"], "TILES": 1, "num_warps": 4}
    blocks = cdiv(L, chosen["BLOCK_R"])
    align, sizes = _aligned(planes[0], planes[-1])
    losses = Prepared(
        cross_entropy_kernel, (N * blocks,), *sizes, rows, blocks, ignore_index,
        **align, WHOLE=whole, SLICED=slices is not None, REDUCE=reduction != NONE, SAVE=save == STATISTICS,
        GRADIENT=gradient, DIVIDE=divide, **constants, **chosen,
    )  # fmt: skip
    return _Forward(views, rows, C, divide, slices, parts, losses, N * blocks)


def cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> Tensor:
    eps, total = max(label_smoothing, 0.0), None
    dy, stride_dy = _row_cotangents(dy, x, reduction)
    start, whole, views = _backward_plan(
        x.device, x.dtype, x.shape, x.stride(), stride_dy, weight is not None, ignore_index, reduction, eps,
        statistics.numel() > 0,
    )  # fmt: skip
    if not whole and not statistics.numel():
        statistics = cross_entropy(x, target, None, ignore_index, NONE, 0.0, True, STATISTICS)[1]
    if weight is not None:
        weight, total = weight.contiguous(), weight.sum(dtype=_wide(x.dtype)) if eps else None
    dx = torch.empty_like(x)
    planes, dx_planes = (x, dx) if views else _planes(x, dx)
    start(dy, planes, target.contiguous(), weight, total, divisor, statistics, dx_planes)
    return _written(dx, dx_planes)


@config.plan
def _backward_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], stride_dy: int,
    has_weight: bool, ignore_index: int, reduction: int, eps: float, saved: bool,
) -> tuple[Prepared, bool, bool]:  # fmt: skip
    """The launch, whether it finds the statistics itself, and whether the planes are views. saved: there are statistics."""
    (planes, dx_planes), views = _meta_planes(shape, stride, _stride_of_gradient(shape, stride))
    N, C, L = planes.shape
    whole = not saved and C <= WHOLE
    chosen, splits = _backward_tile(device, dtype, C, _along_classes(planes), whole)
    blocks = cdiv(L, chosen["BLOCK_R"])
    align, (classes, positions, *strides) = _aligned(planes, dx_planes)
    return Prepared(
        cross_entropy_backward_kernel, (N * blocks, splits),
        classes, positions, stride_dy, *strides, N * L, blocks, ignore_index,
        **align, WHOLE=whole, HAS_WEIGHT=has_weight, EPS=eps, DIVIDE=reduction == MEAN, ACC=config.accumulator(dtype), **chosen,
    ), whole, views  # fmt: skip


def _backward_tile(device: torch.device, dtype: torch.dtype, C: int, along_classes: bool, whole: bool) -> tuple[Config, int]:
    """(configuration, programs over the classes)."""
    if whole:
        return _one_tile(tile_config(device, dtype, C, True, along_classes)), 1
    chosen = backward_config(device, dtype, C, along_classes)
    return chosen, cdiv(C, chosen["BLOCK_C"])


def cross_entropy_prob(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float, wide: bool, save: int
) -> tuple[Tensor, Tensor]:
    dtypes = (x.dtype, target.dtype) if weight is None else (x.dtype, target.dtype, weight.dtype)
    dtype = _wide(*dtypes)
    start, rows, programs, views = _prob_plan(
        x.device, dtypes, x.shape, x.stride(), target.stride(), reduction, max(label_smoothing, 0.0), save
    )
    loss_dtype = dtype if wide else functools.reduce(torch.promote_types, dtypes)
    loss = x.new_empty(_loss_shape(x, reduction), dtype=loss_dtype)
    statistics = x.new_empty((3, rows if save == STATISTICS else 0), dtype=dtype)
    partial = x.new_empty((2, programs), dtype=dtype) if reduction else None
    planes, q_planes = (x, target) if views else _planes(x, target)
    start(planes, q_planes, None if weight is None else weight.contiguous(), loss, partial, statistics)
    if partial is not None:
        _sum(partial, loss, x.new_empty((), dtype=dtype), reduction == MEAN)
    return loss, statistics


@config.plan
def _prob_plan(
    device: torch.device, dtypes: tuple[torch.dtype, ...], shape: torch.Size, stride: tuple[int, ...],
    target_stride: tuple[int, ...], reduction: int, eps: float, save: int,
) -> tuple[Prepared, int, int, bool]:  # fmt: skip
    """The launch, its rows and programs, and whether the planes are views. dtypes: of x, the target and weights, if any."""
    (planes, q_planes), views = _meta_planes(shape, stride, target_stride)
    N, C, L = planes.shape
    chosen = prob_config(device, dtypes[0], C, _along_classes(planes))
    blocks = cdiv(L, chosen["BLOCK_R"])
    align, sizes = _aligned(planes, q_planes)
    return Prepared(
        cross_entropy_prob_kernel, (N * blocks,), *sizes, N * L, blocks,
        **align, HAS_WEIGHT=len(dtypes) == 3, EPS=eps, REDUCE=reduction != NONE, SAVE=save == STATISTICS,
        ACC=config.accumulator(*dtypes), **chosen,
    ), N * L, N * blocks, views  # fmt: skip


def cross_entropy_prob_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    label_smoothing: float,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    dtypes = (x.dtype, target.dtype) if weight is None else (x.dtype, target.dtype, weight.dtype)
    dy, stride_dy = _row_cotangents(dy, x, reduction)
    start, whole, views = _prob_backward_plan(
        x.device, dtypes, x.shape, x.stride(), target.stride(), stride_dy, reduction, max(label_smoothing, 0.0),
        statistics.numel() > 0, *mask,
    )  # fmt: skip
    if not whole and not statistics.numel():
        statistics = cross_entropy_prob(x, target, weight, NONE, label_smoothing, True, STATISTICS)[1]
    dx, dtarget = torch.empty_like(x) if mask[0] else None, torch.empty_like(target) if mask[1] else None
    # A gradient that nobody wants has its tensor's planes; nothing is written to them.
    planes = [x, target, x if dx is None else dx, target if dtarget is None else dtarget]
    if not views:
        planes = _planes(*planes)
    start(dy, *planes[:2], None if weight is None else weight.contiguous(), statistics, *planes[2:])
    return None if dx is None else _written(dx, planes[2]), None if dtarget is None else _written(dtarget, planes[3])


@config.plan
def _prob_backward_plan(
    device: torch.device, dtypes: tuple[torch.dtype, ...], shape: torch.Size, stride: tuple[int, ...],
    target_stride: tuple[int, ...], stride_dy: int, reduction: int, eps: float, saved: bool, want_dx: bool, want_dq: bool,
) -> tuple[Prepared, bool, bool]:  # fmt: skip
    """As _backward_plan."""
    inputs, wanted = (stride, target_stride), (want_dx, want_dq)
    gradients = [_stride_of_gradient(shape, s) if want else s for s, want in zip(inputs, wanted, strict=True)]
    planes, views = _meta_planes(shape, *inputs, *gradients)
    N, C, L = planes[0].shape
    whole = not saved and C <= WHOLE
    chosen, splits = _backward_tile(device, dtypes[0], C, _along_classes(planes[0]), whole)
    blocks = cdiv(L, chosen["BLOCK_R"])
    align, (classes, positions, *strides) = _aligned(*planes)
    return Prepared(
        cross_entropy_prob_backward_kernel, (N * blocks, splits),
        classes, positions, stride_dy, *strides, N * L, blocks,
        **align, WHOLE=whole, HAS_WEIGHT=len(dtypes) == 3, EPS=eps, DIVIDE=reduction == MEAN,
        WANT_DX=want_dx, WANT_DQ=want_dq, ACC=config.accumulator(*dtypes), **chosen,
    ), whole, views  # fmt: skip


def explain(name: str, *args: Any) -> str:
    x = args[1] if name.endswith("backward") else args[0]
    planes = _planes(x)[0]
    C, along_classes = planes.shape[1], _along_classes(planes)
    if name == "cross_entropy_prob":
        choice, sizes = prob_config, (C, along_classes)
    elif C > WHOLE and name.endswith("backward"):
        choice, sizes = backward_config, (C, along_classes)
    else:
        choice, sizes = tile_config, (C, C <= WHOLE, along_classes)
    chosen = config.written(choice(x.device, x.dtype, *sizes))
    return f"{name}_kernel, {chosen}, {choice.source(x.device, x.dtype, *sizes)}"
