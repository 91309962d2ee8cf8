"""What each instruction does, but for matrices and what works by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.ptx import asynchronous, matrices
from tests.ptx.machine import Machine, Mask, Step
from tests.ptx.memory import Fault
from tests.ptx.program import Instruction, Program, names, unknown
from tests.ptx.values import PLAIN, bits_of, compared, converted, extreme, flushed, number, storage_of


def steps(program: Program) -> list[Step | None]:
    """One for each instruction; None for those that Machine.branch takes."""
    return [step(i) for i in program.instructions]


def step(i: Instruction) -> Step | None:
    if i.parts[0] in ("bra", "ret", "exit"):
        return None
    if i.parts[0] in PLAIN or i.parts[0] in ("min", "max", "setp", "cvt"):
        return _packed(i) if "{" in i.text else _arithmetic(i)
    if i.parts[0] not in _OTHERS:
        raise unknown(i)
    return _OTHERS[i.parts[0]](i)


# --- arithmetic ---


def _arithmetic(i: Instruction) -> Step:
    name, parts, kind = i.parts[0], i.parts, i.parts[-1]
    to, *operands = i.operands
    kinds, result = [kind] * len(operands), kind
    if name == "setp":
        result = "pred"
        kinds[2:] = ["pred"] * (len(operands) - 2)
    elif name == "cvt":
        result = parts[-2]
    elif name == "selp":
        kinds[2] = "pred"
    elif name in ("shl", "shr"):
        kinds[1] = "u32"
    elif name == "bfe":
        kinds[1:] = ["u32", "u32"]
    elif "wide" in parts:
        result = f"{kind[0]}{2 * int(kind[1:])}"
        kinds[2:] = [result] * (len(operands) - 2)
    operation = f"{name}.hi" if "hi" in parts and name != "setp" else name
    if "sat" in parts or operation == "mad.hi" or (kind[0] == "f" and {"rz", "rm", "rp"} & set(parts)):
        raise unknown(i)

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        values = [x.read(operand, k) for operand, k in zip(operands, kinds, strict=True)]
        if "ftz" in parts:
            values = [flushed(v) for v in values]
        if "wide" in parts:
            values = [number(v.astype(v.dtype.kind + str(2 * v.dtype.itemsize)), result) for v in values[:2]] + values[2:]
        value = _result(operation, parts, values)
        if "ftz" in parts and result == "f32":
            value = flushed(np.asarray(value).astype(np.float32))
        if "|" in to:  # the second is the opposite, or of the second half
            pair = (value[..., 0], value[..., 1]) if kind.endswith("x2") else (value, ~value)
            for part, found in zip(to.split("|"), pair, strict=True):
                x.write(part, bits_of(found, result), who, result)
        else:
            x.write(to, bits_of(value, result), who, result)

    return run


def _result(operation: str, parts: tuple[str, ...], values: list[Any]) -> Any:
    if operation in ("min", "max"):
        return extreme(parts, *values)
    if operation == "setp":
        value = compared(parts, *values[:2])
        return PLAIN[parts[2]](value, values[2]) if len(values) > 2 else value
    if operation == "cvt":
        if parts[-2].endswith("x2"):  # the first operand becomes the upper half
            return np.stack(np.broadcast_arrays(values[1], values[0]), -1)
        return converted(parts, *values)
    return PLAIN[operation](*values)


def _packed(i: Instruction) -> Step:
    """mov between a register and the narrower ones that it is made of, the lowest first."""
    to, source = i.operands
    wide, parts = i.parts[-1], names(to if "{" in to else source)
    narrow = f"b{int(wide[1:]) // len(parts)}"
    whole, part = storage_of(wide), storage_of(narrow)
    shifts = [whole(k * int(narrow[1:])) for k in range(len(parts))]

    def split(x: Machine, mask: Mask) -> None:
        who, bits = x.active(i, mask), x.read(source, wide)
        for name, shift in zip(parts, shifts, strict=True):
            x.write(name, (bits >> shift).astype(part), who, narrow)

    def join(x: Machine, mask: Mask) -> None:
        bits = whole(0)
        for name, shift in zip(parts, shifts, strict=True):
            bits = bits | x.read(name, narrow).astype(whole) << shift
        x.write(to, bits, x.active(i, mask), wide)

    return split if "{" in to else join


# --- memory ---


def _space(i: Instruction) -> str:
    return next(s for s in ("param", "shared", "global") if any(p.split("::")[0] == s for p in i.parts))


def _load(i: Instruction) -> Step:
    kind, space, (to, source, *_) = i.parts[-1], _space(i), i.operands
    registers, width = names(to), storage_of(i.parts[-1])(0).itemsize

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        if space == "param":
            values = [x.parameters[source.strip("[] ")].astype(storage_of(kind))]
        else:
            values = x.load(space, x.address(source), width, len(registers), who)
        for name, value in zip(registers, values, strict=True):
            x.write(name, value, who, kind)

    return run


def _store(i: Instruction) -> Step:
    kind, space, (to, source, *_) = i.parts[-1], _space(i), i.operands
    registers, storage = names(source), storage_of(i.parts[-1])

    def run(x: Machine, mask: Mask) -> None:
        values = [bits_of(x.read(name, kind), kind) for name in registers]
        x.store(space, x.address(to), storage(0).itemsize, values, x.active(i, mask))

    return run


_ATOMIC: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
    "cas": lambda old, compare, new: np.where(old == compare, new, old),
    "inc": lambda old, limit: np.where(old >= limit, 0, old + np.uint32(1)).astype(old.dtype),
}


def _atomic(i: Instruction) -> Step:
    kind = i.parts[-1]
    function = next(_ATOMIC[p] for p in i.parts if p in _ATOMIC)
    to, address, *operands = i.operands if i.parts[0] == "atom" else ("_", *i.operands)
    if _space(i) != "global":
        raise unknown(i)

    def run(x: Machine, mask: Mask) -> None:
        """One thread after another."""
        who, where = x.active(i, mask), x.address(address)
        values = [x.spread(x.read(operand, kind)) for operand in operands]
        old = np.zeros(x.n, storage_of(kind))
        for lane in np.flatnonzero(x.spread(True if who is None else who)):
            one = slice(lane, lane + 1)
            (old[one],) = x.memory.load(where[one], old.itemsize)
            new = function(number(old[one], kind), *(v[one] for v in values))
            x.memory.store(where[one], old.itemsize, [bits_of(new, kind)])
        x.write(to, old, who, kind)

    return run


# --- between threads ---


def _barrier(i: Instruction) -> Step:
    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        if "warp" in i.parts:
            x.whole_warps(who)
        else:
            x.shared.epochs[x.whole_blocks(who)] += 1

    return run


def _shuffle(i: Instruction) -> Step:
    to, value, by, bounds, _ = i.operands
    to, _, valid = to.partition("|")

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        x.whole_warps(who)
        lane = np.arange(x.n) % 32
        b, c = x.read(by, "u32").astype(np.int64) & 31, x.read(bounds, "u32").astype(np.int64)
        segment = c >> 8 & 31
        last = lane & segment | c & 31 & ~segment
        source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": lane & segment | b & ~segment}[i.parts[2]]
        inside = source >= last if i.parts[2] == "up" else source <= last
        source = np.where(inside, source, lane) + np.arange(x.n) // 32 * 32
        x.write(to, x.spread(x.read(value, "b32"))[source], who)
        if valid:
            x.write(valid, inside, who, "pred")

    return run


def _elect(i: Instruction) -> Step:
    lane, chosen = i.operands[0].split("|")

    def run(x: Machine, mask: Mask) -> None:
        x.whole_warps(mask)
        x.write(lane, np.uint32(0), mask)
        x.write(chosen, np.arange(x.n) % 32 == 0, mask, "pred")

    return run


def _trap(i: Instruction) -> Step:
    def run(x: Machine, mask: Mask) -> None:
        if np.any(x.spread(True if (who := x.active(i, mask)) is None else who)):
            raise Fault("trap: an assertion of the kernel's failed")

    return run


def _nothing(i: Instruction) -> Step:
    return lambda x, mask: None


_OTHERS: dict[str, Callable[[Instruction], Step]] = {
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "red": _atomic,
    "bar": _barrier,
    "barrier": _barrier,
    "shfl": _shuffle,
    "elect": _elect,
    "fence": _nothing,
    "membar": _nothing,
    "createpolicy": _nothing,
    "trap": _trap,
    "cp": asynchronous.copy,
    "mbarrier": asynchronous.arrival,
    "ldmatrix": matrices.load,
    "stmatrix": matrices.store,
    "mma": matrices.multiply,
    "wgmma": matrices.warpgroup,
}
