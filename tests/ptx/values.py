"""Registers as numbers, and what arithmetic does with them: an array has one for each thread, a scalar is the same for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def storage_of(kind: str) -> Any:
    """The type of a register's bits. kind: of PTX, as "s32"."""
    if kind == "pred":
        return np.bool_
    return np.uint32 if kind.endswith("x2") else np.dtype(f"u{int(kind.lstrip('busf')) // 8}").type


def number(bits: Any, kind: str) -> Any:
    """What a register holds as a `kind`; bf16 as float32, f16x2 and bf16x2 with a last axis of two."""
    if kind == "pred":
        return bits
    if kind.endswith("x2"):
        halves = np.stack([bits & np.uint32(0xFFFF), bits >> np.uint32(16)], -1).astype(np.uint16)
        return number(halves, kind[:-2])
    if kind == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    width = int(kind[1:]) // 8
    if bits.dtype.itemsize != width:  # the low bits; a narrow register's sign is not extended
        bits = bits.astype(f"u{width}")
    return bits if kind[0] in "bu" else bits.view(f"{'i' if kind[0] == 's' else 'f'}{width}")


def bits_of(value: Any, kind: str) -> Any:
    """The opposite."""
    if kind == "pred":
        return np.asarray(value, np.bool_)[()]
    if kind.endswith("x2"):
        halves = bits_of(value, kind[:-2]).astype(np.uint32)
        return halves[..., 0] | halves[..., 1] << np.uint32(16)
    if kind == "bf16":
        bits = np.asarray(value, np.float32)[()].view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
        return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)[()]
    signed, width = kind[0], int(kind[1:]) // 8
    value = np.asarray(value)
    if signed == "f":
        return value.astype(f"f{width}")[()].view(f"u{width}")
    return value.astype(f"{'i' if signed == 's' else 'u'}{width}")[()].view(f"u{width}")


def widened(bits: Any, kind: str, storage: Any) -> Any:
    """In a wider register a signed number is extended by its sign."""
    if bits.dtype == storage:
        return bits
    if kind[0] == "s":
        return bits.view(f"i{bits.dtype.itemsize}").astype(f"i{np.dtype(storage).itemsize}").view(storage)
    return bits.astype(storage)


_TINY = np.float32(2.0**-126)


def flushed(x: Any) -> Any:
    return np.where(np.abs(x) < _TINY, x * np.float32(0), x) if np.asarray(x).dtype == np.float32 else x


def _fma(a: Any, b: Any, c: Any) -> Any:
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype) if a.dtype.kind == "f" else a * b + c


def _divide(a: Any, b: Any) -> Any:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = np.abs(a.astype(np.int64)) // np.abs(safe.astype(np.int64)) if a.dtype.kind == "i" else a // safe
    signs = np.where((a < 0) != (safe < 0), -1, 1) if a.dtype.kind == "i" else 1
    return np.where(b == 0, -1, quotient * signs).astype(a.dtype)


def _shift(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """By the whole width or more: nothing but the sign is left."""

    def shifted(a: Any, by: Any) -> Any:
        width = 8 * a.dtype.itemsize
        by = np.asarray(by).astype(np.int64)
        result = function(a, np.minimum(by, width - 1).astype(a.dtype))
        gone = a < 0 if function is np.right_shift else np.zeros_like(a, np.bool_)
        return np.where(by >= width, np.where(gone, -1, 0).astype(a.dtype), result)

    return shifted


def _field(a: Any, begin: Any, length: Any) -> Any:
    """bfe."""
    width = 8 * a.dtype.itemsize
    begin, length = (np.asarray(x).astype(np.int64) & 0xFF for x in (begin, length))
    assert np.all(begin + length <= width) and np.all(length > 0), "bfe beyond the register"
    up = (width - begin - length).astype(a.dtype)
    return (a << up) >> (width - length).astype(a.dtype)


def _selected_bytes(a: Any, b: Any, selector: Any) -> Any:
    """prmt."""
    whole = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint32(0)
    for i in range(4):
        index = (selector >> np.uint32(4 * i) & np.uint32(0xF)).astype(np.uint64)
        byte = (whole >> (index & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)).astype(np.uint32)
        byte = np.where(index & np.uint64(8), (byte >> np.uint32(7)) * np.uint32(0xFF), byte)
        result = result | byte << np.uint32(8 * i)
    return result


def _any_logic(a: Any, b: Any, c: Any, table: Any) -> Any:
    """lop3."""
    result = np.zeros_like(a)
    for i in range(8):
        if int(np.max(table)) >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


PLAIN: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul.hi": lambda a, b: (a.astype(f"{a.dtype.kind}8") * b.astype(f"{a.dtype.kind}8") >> 8 * a.dtype.itemsize).astype(
        a.dtype
    ),
    "div": _divide,
    "rem": lambda a, b: (a - _divide(a, b) * b).astype(a.dtype),
    "fma": _fma,
    "mad": _fma,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "bfe": _field,
    "prmt": _selected_bytes,
    "lop3": _any_logic,
    "selp": lambda a, b, p: np.where(p, a, b),
    "ex2": lambda a: np.exp2(a.astype(np.float64)),
    "lg2": lambda a: np.log2(a.astype(np.float64)),
    "rcp": lambda a: 1 / a.astype(np.float64),
    "sqrt": lambda a: np.sqrt(a.astype(np.float64)),
    "rsqrt": lambda a: 1 / np.sqrt(a.astype(np.float64)),
    "mov": lambda a: a,
    "cvta": lambda a: a,
}
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# `lo`, `ls`, ...: unsigned names of the same; `equ`, `ltu`, ...: true where an operand is NaN.
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_TO_INTEGER = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def extreme(parts: Sequence[str], a: Any, b: Any) -> Any:
    if a.dtype.kind == "f" and "NaN" not in parts:
        return (np.fmin if parts[0] == "min" else np.fmax)(a, b)
    return (np.minimum if parts[0] == "min" else np.maximum)(a, b)


def compared(parts: Sequence[str], a: Any, b: Any) -> Any:
    name = _UNSIGNED.get(parts[1], parts[1])
    if name in ("num", "nan"):
        missing = np.isnan(a) | np.isnan(b)
        return missing if name == "nan" else ~missing
    if name in _COMPARE:
        found = _COMPARE[name](a, b)
        return found & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" and name == "ne" else found
    return _COMPARE[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)


def converted(parts: Sequence[str], a: Any) -> Any:
    """cvt, but for the rounding that the result's own type makes."""
    to = parts[-2]
    rounding = next((p for p in parts[1:-2] if p in _TO_INTEGER), None)
    if rounding is not None:
        a = _TO_INTEGER[rounding](a)
    if a.dtype.kind == "f" and to[0] in "us":
        limits = np.iinfo(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
        inside = np.clip(np.nan_to_num(a.astype(np.longdouble)), limits.min, limits.max)
        return inside.astype(limits.dtype)
    return a
