"""linear_relu: y = relu(x w^T + b), and its gradients.

    forward    z = x w^T + b,  y = where(z < 0, 0, z)                 (NaN and -0.0 as torch has them)
    backward   dz = where(y <= 0, 0, dy),  dx = dz w,  dw = dz^T x,  db = sum of dz over the rows

Shapes: x (M, K) for any leading dimensions of the tensor, w (N, K), b (N,), y (M, N). Strides are in elements, named
stride_<tensor><dimension>. Saved for backward: x, w, y.

Traffic, s bytes per element: forward (MK + NK + MN) s; backward 5 MN s + 2 (MK + NK) s, of which the pre-pass moves 3 MN s
(plain torch: 6 MN s). FLOPs: forward 2 MNK, backward 4 MNK.

The backward is one pre-pass, which writes dz and per-block sums for db (added up in a fixed order: deterministic), and two
plain matrix products, which are the vendor library's.

Sources: persistent TMA matrix product and grouped tile order after the Triton tutorials 03 and 09.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config
from .config import Config, Target, cdiv, power_of_two
from .launch import Prepared, descriptor

PREPASS_WAVES = 4  # programs per multiprocessor that the pre-pass aims for


@config.choice("linear_relu.forward")
def forward_config(target: Target, dtype: torch.dtype, M: int, N: int, K: int, tma: bool) -> Config:
    if target.interpreted:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "GROUP_M": 2} | ({"SUBTILE": True} if tma else {})
    if tma:
        tiles = cdiv(M, 128) * cdiv(N, 256)
        if N > 128 and tiles >= target.sms:
            if target.at_least(
                100
            ):  # splitting the tile takes 16 KB more there, which do not fit; with Triton 3.9 it spills too
                return _tile(128, 256, 64, warps=8, stages=3) | {"SUBTILE": False}
            return _tile(128, 256, 64, warps=8, stages=4) | {"SUBTILE": True}
        return _tile(128, 128, 64, warps=8, stages=4) | {"SUBTILE": False}
    if dtype == torch.float32:  # fused multiply-adds on the vector units, or TF32
        return _tile(64, 64, 32, warps=4, stages=2)
    m, n = power_of_two(M, 16, 128), power_of_two(N, 32, 128)
    if target.backend == "hip":
        return _tile(m, n, 64, warps=8 if m * n >= 128 * 128 else 4, stages=2)
    # Half the threads would do for 64 x 128, but where rows are not aligned they run out of registers and spill.
    return _tile(m, n, 64, warps=8 if m * n >= 64 * 128 else 4, stages=3)


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}


# Tiles worth measuring: (M, N, K, warps, stages).
TMA_TILES = [
    (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
    (128, 128, 128, 8, 3), (64, 256, 64, 4, 4), (64, 128, 128, 4, 3), (128, 64, 64, 4, 4), (64, 64, 64, 4, 4),
]  # fmt: skip
TILES = [
    (128, 256, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 2), (128, 128, 32, 4, 4), (64, 128, 64, 4, 4),
    (128, 64, 64, 4, 4), (64, 64, 64, 4, 4), (64, 64, 64, 4, 2), (32, 64, 64, 4, 4),
]  # fmt: skip
FLOAT32_TILES = [(64, 64, 16, 4, 3), (64, 64, 32, 4, 3), (128, 64, 16, 8, 3), (64, 128, 16, 4, 3), (128, 128, 16, 8, 3)]


def forward_candidates(target: Target, dtype: torch.dtype, M: int, N: int, K: int, tma: bool) -> list[Config]:
    if tma:
        offered = [_tile(*tile) | {"SUBTILE": subtile} for tile in TMA_TILES for subtile in (True, False)]
        return [c for c in offered if _tma_shared(c, target, dtype) <= target.shared]
    offered = [_tile(*tile) for tile in (FLOAT32_TILES if dtype == torch.float32 else TILES)]
    return [c for c in offered if _stage(c, dtype) * c["num_stages"] <= target.shared]


def _stage(c: Config, dtype: torch.dtype) -> int:
    """Bytes of shared memory that one stage of loads takes."""
    return (c["BLOCK_M"] + c["BLOCK_N"]) * c["BLOCK_K"] * dtype.itemsize


def _tma_shared(c: Config, target: Target, dtype: torch.dtype) -> int:
    """With the buffer of the store, on Blackwell half a byte an element to split the tile, and what the compiler adds
    (measured: at most 1072 bytes)."""
    tile = c["BLOCK_M"] * c["BLOCK_N"]
    split = tile // 2 if c["SUBTILE"] and target.at_least(100) else 0
    return _stage(c, dtype) * c["num_stages"] + tile // (1 + c["SUBTILE"]) * dtype.itemsize + split + 1072


forward_config.candidates = forward_candidates


@config.choice("linear_relu.prepass")
def prepass_config(target: Target, dtype: torch.dtype, M: int, N: int) -> Config:
    if target.interpreted:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "ROWS": 32}
    # 16 rows of float32 spill 8 bytes on sm_120 with Triton 3.6.
    block_m, block_n = 8 if dtype == torch.float32 and target.at_least(120) else 16, 256
    programs = PREPASS_WAVES * target.sms // max(cdiv(N, block_n), 1)
    rows = block_m * power_of_two(M // max(block_m * programs, 1), 1, 64)
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "ROWS": rows, "num_warps": 4}


def prepass_candidates(target: Target, dtype: torch.dtype, M: int, N: int) -> list[Config]:
    rows = prepass_config.static(target, dtype, M, N)["ROWS"]
    blocks = [(16, 256, 4), (8, 256, 4), (32, 128, 4), (16, 128, 4), (4, 512, 4), (8, 512, 8), (32, 256, 8)]
    return [
        {"BLOCK_M": m, "BLOCK_N": n, "ROWS": max(rows * factor, m), "num_warps": warps}
        for m, n, warps in blocks
        for factor in (1, 2)
    ]


prepass_config.candidates = prepass_candidates


@triton.jit
def grouped_tile(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """(row, column) of a tile, in groups of GROUP_M rows so that neighbouring programs share operands in the L2."""
    rows, columns = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = tile // (GROUP_M * columns) * GROUP_M
    height = min(rows - first, GROUP_M)
    inside = tile % (GROUP_M * columns)
    return first + inside % height, inside // height


@triton.jit
def bias_relu(z, b, stride_bn, columns, N, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        z += tl.load(b + columns.to(tl.int64) * stride_bn, mask=columns < N, other=0.0).to(z.dtype)[None, :]
    return tl.where(z < 0, 0.0, z)


@triton.jit
def linear_relu_kernel(
    x, w, b, y, M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """One tile of y; any GPU, any strides."""
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end wrap around: what they load is valid and never stored.
    x_tile = x + (rows % M).to(tl.int64)[:, None] * stride_xm + k.to(tl.int64)[None, :] * stride_xk
    w_tile = w + (columns % N).to(tl.int64)[None, :] * stride_wn + k.to(tl.int64)[:, None] * stride_wk
    block_k = tl.full((), BLOCK_K, tl.int64)
    z = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            x_block = tl.load(x_tile)
            w_block = tl.load(w_tile)
        else:
            x_block = tl.load(x_tile, mask=k[None, :] < K - start, other=0.0)
            w_block = tl.load(w_tile, mask=k[:, None] < K - start, other=0.0)
        z = tl.dot(x_block, w_block, z, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        x_tile += block_k * stride_xk
        w_tile += block_k * stride_wk
    z = bias_relu(z, b, stride_bn, columns, N, HAS_BIAS)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(y + rows.to(tl.int64)[:, None] * N + columns[None, :], z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def linear_relu_tma_kernel(
    x, w, y, b, M, N, K, stride_bn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SUBTILE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Persistent: of P programs each takes every P-th tile. x, w, y are tensor descriptors."""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # Flattening overlaps the epilogue of a tile with the loads of the next.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        tile_m, tile_n = grouped_tile(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        z = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, K, BLOCK_K):
            z = tl.dot(x.load([row, start]), w.load([column, start]).T, z)
        z = bias_relu(z, b, stride_bn, column + tl.arange(0, BLOCK_N), N, HAS_BIAS)
        if SUBTILE:  # two half-width stores: the smaller buffer pays for one more stage of loads
            left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            y.store([row, column], left.to(y.dtype))
            y.store([row, column + BLOCK_N // 2], right.to(y.dtype))
        else:
            y.store([row, column], z.to(y.dtype))


@triton.jit
def relu_backward_kernel(
    dy, y, dz, partial_db, M, N, stride_dym, stride_dyn, stride_ym, stride_yn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    ACCUMULATOR: tl.constexpr, BIAS_GRADIENT: tl.constexpr,
):  # fmt: skip
    """dz for ROWS rows of BLOCK_N columns, and their sum: row `part` of partial_db (parts, N)."""
    blocks = tl.cdiv(N, BLOCK_N)
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    first = part.to(tl.int64) * ROWS
    column = columns.to(tl.int64)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACCUMULATOR)
    for start in range(0, ROWS, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        row, inside = rows[:, None], (rows < M)[:, None] & (columns < N)[None, :]
        dy_block = tl.load(dy + row * stride_dym + column * stride_dyn, mask=inside, other=0.0).to(ACCUMULATOR)
        y_block = tl.load(y + row * stride_ym + column * stride_yn, mask=inside, other=0.0).to(ACCUMULATOR)
        dz_block = tl.where(y_block <= 0, 0.0, dy_block)
        tl.store(dz + row * N + column, dz_block.to(dz.dtype.element_ty), mask=inside)
        if BIAS_GRADIENT:
            total += dz_block
    if BIAS_GRADIENT:  # in shared memory once: every row of tiles would cost as much there as its loads
        db = tl.sum(total, axis=0)
        tl.store(partial_db + part.to(tl.int64) * N + columns, db, mask=columns < N)


def _as_2d(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _as_2d(x)
    start, blocks = _forward(rows, weight, bias)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if blocks is None:
        start(rows, weight, bias, y)
    else:
        start(*map(descriptor, (rows, weight, _as_2d(y)), blocks), bias)
    return y


Blocks = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Prepared, Blocks | None]:
    """The launch, and the blocks of the descriptors of x, weight and y if its kernel takes those."""
    dtype = x.dtype
    return _forward_plan(
        x.device, dtype, x.shape, x.stride(), weight.shape, weight.stride(), None if bias is None else bias.stride(0),
        (x.data_ptr() | weight.data_ptr()) & 15 == 0,
        dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32",
    )  # fmt: skip


@config.plan
def _forward_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...], weight_shape: torch.Size,
    weight_stride: tuple[int, ...], bias_stride: int | None, aligned: bool, tf32: bool,
) -> tuple[Prepared, Blocks | None]:  # fmt: skip
    target, (M, K), N = config.target_of(device), shape, weight_shape[0]
    tma = aligned and _uses_tma(target, dtype, (M, N, K), stride, weight_stride)
    chosen = forward_config(device, dtype, M, N, K, tma)
    block_m, block_n, block_k = chosen["BLOCK_M"], chosen["BLOCK_N"], chosen["BLOCK_K"]
    tiles = cdiv(M, block_m) * cdiv(N, block_n)
    has_bias, bias_stride = bias_stride is not None, 1 if bias_stride is None else bias_stride
    if tma:
        blocks = (block_m, block_k), (block_n, block_k), (block_m, block_n // 2 if chosen["SUBTILE"] else block_n)
        programs = min(target.sms, tiles)
        return Prepared(linear_relu_tma_kernel, (programs,), M, N, K, bias_stride, HAS_BIAS=has_bias, **chosen), blocks
    return Prepared(
        linear_relu_kernel, (tiles,), M, N, K, *stride, *weight_stride, bias_stride,
        HAS_BIAS=has_bias, EVEN_K=K % block_k == 0, PRECISION="tf32" if tf32 else "ieee", ACCUMULATOR=config.accumulator(dtype),
        **chosen,
    ), None  # fmt: skip


def _uses_tma(
    target: Target, dtype: torch.dtype, sizes: tuple[int, int, int], stride: tuple[int, ...], weight_stride: tuple[int, ...]
) -> bool:
    """Hopper and later multiply 16-bit operands at full rate only from descriptors, which want 16-byte rows.

    Rows that overlap (a stride of 0) are not given to a descriptor: no documentation says that the driver takes them.
    """
    _, n, k = sizes
    hopper = target.at_least(90) and not target.at_least(120)
    aligned = all(along == 1 and across % 8 == 0 and across >= k for across, along in (stride, weight_stride)) and n % 8 == 0
    return hopper and dtype.itemsize == 2 and aligned and 0 not in sizes


def linear_relu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dz, db = _relu_backward(_as_2d(dy), _as_2d(y), bool(mask[2]))
    dx = dw = None
    if mask[0]:
        dx = x.new_empty(x.shape)
        torch.mm(dz, weight, out=dx.view(dz.shape[0], weight.shape[1]))
    if mask[1]:
        dw = torch.mm(dz.t(), _as_2d(x))
    return dx, dw, db


def _relu_backward(dy: Tensor, y: Tensor, bias_gradient: bool) -> tuple[Tensor, Tensor | None]:
    start, blocks = _backward_plan(y.device, y.dtype, y.shape, dy.stride(), y.stride(), bias_gradient)
    dz = y.new_empty(y.shape)
    if not bias_gradient:
        start(dy, y, dz, None)
        return dz, None
    partial_db = y.new_empty((blocks, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))
    start(dy, y, dz, partial_db)
    return dz, partial_db.sum(0).to(y.dtype)


@config.plan
def _backward_plan(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, dy_stride: tuple[int, ...], y_stride: tuple[int, ...],
    bias_gradient: bool,
) -> tuple[Prepared, int]:  # fmt: skip
    """The pre-pass, and the number of its blocks of rows."""
    M, N = shape
    chosen = prepass_config(device, dtype, M, N)
    blocks = cdiv(M, chosen["ROWS"])
    return Prepared(
        relu_backward_kernel, (cdiv(N, chosen["BLOCK_N"]) * blocks,), M, N, *dy_stride, *y_stride,
        ACCUMULATOR=config.accumulator(dtype), BIAS_GRADIENT=bias_gradient, **chosen,
    ), blocks  # fmt: skip


def explain(name: str, x: Tensor, weight: Tensor, *args: Any) -> str:
    if name != "linear_relu":
        return "relu_backward_kernel, then the vendor library's matrix products"
    rows = _as_2d(x)
    start, blocks = _forward(rows, weight, *args)
    sizes = (*rows.shape[:1], *weight.shape, blocks is not None)
    chosen = config.written(forward_config(x.device, x.dtype, *sizes))
    return f"{start.name}, {chosen}, {forward_config.source(x.device, x.dtype, *sizes)}"
