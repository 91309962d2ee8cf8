"""Matrices: where the elements lie in a warp's registers and in shared memory, and their products."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tests.ptx.asynchronous import swizzled
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.memory import SHARED, Array
from tests.ptx.program import Instruction, names, unknown
from tests.ptx.values import bits_of, number

# --- shared memory: ldmatrix, stmatrix ---


def _rows(x: Machine, operand: str, count: int) -> Array:
    """The addresses (warp, matrix, row) that lanes 8 i to 8 i + 7 have for matrix i; 16 bytes each."""
    return x.in_block(x.address(operand)).reshape(-1, 4, 8)[:, :count]


def load(i: Instruction) -> Step:
    to, source = i.operands
    registers, transposed = names(to), "trans" in i.parts

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        warps = _warps(x, who)
        rows = _rows(x, source, len(registers))[warps]
        words = np.stack(x.shared.load(rows.ravel(), 8, 2), -1)
        x.shared.note_read(rows.ravel() - SHARED, 16, np.repeat(warps, rows[0].size))
        halves = words.view(np.uint16).reshape(*rows.shape, 8)
        halves = np.ascontiguousarray(halves.swapaxes(-1, -2) if transposed else halves)
        pairs = halves.view(np.uint32).reshape(len(warps), len(registers), 32)
        for k, name in enumerate(registers):
            value = np.zeros((x.n // 32, 32), np.uint32)
            value[warps] = pairs[:, k]
            x.write(name, value.ravel(), who)

    return run


def store(i: Instruction) -> Step:
    to, source = i.operands
    registers, transposed = names(source), "trans" in i.parts

    def run(x: Machine, mask: Mask) -> None:
        warps = _warps(x, x.active(i, mask))
        rows = _rows(x, to, len(registers))[warps]
        pairs = np.stack([x.spread(x.read(name, "b32")).reshape(-1, 8, 4) for name in registers], 1)[warps]
        halves = np.ascontiguousarray(pairs).view(np.uint16)
        halves = np.ascontiguousarray(halves.swapaxes(-1, -2) if transposed else halves).reshape(-1, 8)
        offsets = x.shared.offsets(rows.ravel(), 16)
        x.shared.note_write(offsets, np.repeat(warps, rows[0].size), halves.view(np.uint8))
        x.shared.store(rows.ravel(), 8, list(halves.view(np.uint64).T))

    return run


def _warps(x: Machine, who: Mask) -> Array:
    """Which warps these threads are."""
    x.whole_warps(who)
    return np.arange(x.n // 32) if who is None else np.flatnonzero(who.reshape(-1, 32).any(1))


# --- registers of a warp ---


def _elements(x: Machine, registers: Sequence[str], kind: str) -> Array:
    """Numbers (warp, lane, register, element of the register)."""
    bits = np.stack([x.spread(x.read(name, "b64" if kind == "f64" else "b32")) for name in registers], -1)
    if kind == "tf32":
        bits, kind = _rounded_to_tf32(bits), "f32"
    numbers = number(bits, kind)[..., None] if kind in ("f32", "f64") else number(bits, f"{kind}x2")
    return numbers.reshape(-1, 32, *numbers.shape[1:])


def _rounded_to_tf32(bits: Array) -> Array:
    """The lowest 13 bits are not looked at."""
    return bits & np.uint32(0xFFFFE000)


_GROUP, _IN_GROUP = np.arange(32)[:, None, None] // 4, np.arange(32)[:, None, None] % 4


def _left(numbers: Array) -> Array:
    """A (warp, 16, depth): registers alternate between the first eight rows and the second."""
    r, e = np.arange(numbers.shape[2])[:, None], np.arange(n := numbers.shape[3])
    matrix = np.zeros((len(numbers), 16, 2 * n * len(r)), numbers.dtype)
    matrix[:, _GROUP + 8 * (r % 2), n * _IN_GROUP + e + 4 * n * (r // 2)] = numbers
    return matrix


def _right(numbers: Array) -> Array:
    """B (warp, depth, 8)."""
    r, e = np.arange(numbers.shape[2])[:, None], np.arange(n := numbers.shape[3])
    matrix = np.zeros((len(numbers), 4 * n * len(r), 8), numbers.dtype)
    matrix[:, n * _IN_GROUP + e + 4 * n * r, _GROUP + 0 * e] = numbers
    return matrix


def _places(registers: int) -> tuple[Array, Array]:
    """Row and column of each accumulator: two neighbours of a row, two of the row eight below, then eight columns on."""
    r = np.arange(registers)
    return _GROUP[..., 0] + 8 * (r // 2 % 2), 2 * _IN_GROUP[..., 0] + r % 2 + 8 * (r // 4)


def multiply(i: Instruction) -> Step:
    """mma.sync.m16n8kK: D, A, B, C."""
    d, a, b, c = map(names, i.operands)
    result, left, right = i.parts[-4:-1]
    if i.parts[3][:6] != "m16n8k" or (result, left) not in {("f32", "f16"), ("f32", "bf16"), ("f32", "tf32"), ("f64", "f64")}:
        raise unknown(i)

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        x.whole_warps(who)
        row, column = _places(len(d))
        product = _left(_elements(x, a, left)).astype(np.float64) @ _right(_elements(x, b, right))
        total = product[:, row, column] + _elements(x, c, result)[..., 0]
        for k, name in enumerate(d):
            x.write(name, bits_of(total[..., k].ravel(), result), who, result)

    return run


# --- warpgroups ---


def warpgroup(i: Instruction) -> Step:
    """wgmma.mma_async: D, A (a matrix descriptor or registers), B (a descriptor), whether D is added to, signs, transpositions.

    The product is there at once; what it reads is being read until it is waited for.
    """
    if i.parts[1] == "commit_group":
        return lambda x, mask: x.reading["wgmma"].append([])
    if i.parts[1] == "wait_group":
        return lambda x, mask: x.read_until("wgmma", int(i.operands[0]))
    if i.parts[1] == "fence":
        return lambda x, mask: None
    d, left, right, adds, *rest = i.operands
    shape, kind = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4]), i.parts[-1]
    if shape is None or i.parts[5] != "f32" or rest[:2] != ["1", "1"] or kind not in ("f16", "bf16", "tf32"):
        raise unknown(i)
    columns, depth = int(shape[1]), int(shape[2])
    transposed = [major == "1" for major in rest[2:]]
    registers = names(d)

    def run(x: Machine, mask: Mask) -> None:
        x.whole_blocks(mask)
        row, column = _places(len(registers))
        added = x.spread(x.read(adds, "pred")).reshape(-1, 32, 1)
        total = np.where(added, _elements(x, registers, "f32")[..., 0], 0).astype(np.float64)
        for first in range(0, x.n // 32, 4):
            if "{" in left:
                a = _left(_elements(x, names(left), kind)[first : first + 4]).reshape(64, depth)
            else:
                a = _described(x, left, 32 * first, 64, depth, kind, bool(transposed and transposed[0]))
            b = _described(x, right, 32 * first, columns, depth, kind, bool(transposed and transposed[-1]))
            product = (a.astype(np.float64) @ b.T).reshape(4, 16, columns)
            total[first : first + 4] += product[:, row, column]
        for k, name in enumerate(registers):
            x.write(name, bits_of(total[..., k].ravel(), "f32"), mask)

    return run


def _described(x: Machine, operand: str, thread: int, rows: int, depth: int, kind: str, transposed: bool) -> Array:
    """The matrix (row, depth) that a descriptor names. transposed: rows are contiguous."""
    descriptor, width = int(x.spread(x.read(operand, "b64"))[thread]), 4 if kind == "tf32" else 2
    start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
    mode = {0: 0, 1: 3, 2: 2, 3: 1}[descriptor >> 62]  # as in a Descriptor
    if descriptor >> 49 & 7 or (mode == 0 and transposed):
        raise NotImplementedError("this machine has no such matrix descriptors")
    row, k = np.indices((rows, depth))
    inner, outer = (row, k) if transposed else (k, row)
    line = 16 << mode  # contiguous bytes, but for the swizzle
    offsets = start + outer // 8 * stride + inner * width // line * leading + outer % 8 * line + inner * width % line
    addresses = swizzled(offsets, mode)
    (bits,) = x.shared.load(addresses.ravel(), width)
    x.shared.note_read(addresses.ravel() - SHARED, width, np.full(addresses.size, -2))  # by no single warp
    x.reads("wgmma", np.unique(addresses - SHARED))
    bits = bits.reshape(addresses.shape)
    return number(_rounded_to_tf32(bits), "f32") if kind == "tf32" else number(bits, kind)
