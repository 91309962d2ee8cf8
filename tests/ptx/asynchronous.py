"""What works by itself until it is waited for: cp.async, copies of boxes by descriptors, mbarriers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.machine import PARAMETERS, Arrivals, Machine, Mask, Step
from tests.ptx.memory import SHARED, Array, Fault
from tests.ptx.program import Instruction, names, unknown


def copy(i: Instruction) -> Step:
    if "bulk" in i.parts:
        return _box(i)
    if i.parts[2] == "commit_group":
        return lambda x, mask: x.copies.append([])
    if i.parts[2] in ("wait_group", "wait_all"):
        return _wait(i)
    return _copy(i)


def _wait(i: Instruction) -> Step:
    def run(x: Machine, mask: Mask) -> None:
        if i.parts[2] == "wait_all":
            x.copies.append([])
        while len(x.copies) - 1 > (0 if i.parts[2] == "wait_all" else int(i.operands[0])):
            for write in x.copies.pop(0):
                write()

    return run


def _copy(i: Instruction) -> Step:
    """Reads now, and writes when it is waited for."""
    to, source, size, *rest = i.operands
    width, unit = int(size, 0), min(int(size, 0), 8)

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        who = x.spread(True if who is None else who)
        given = x.spread(x.read(rest[0], "u32") if rest else np.uint32(width))  # bytes; the others become zeros
        if not np.isin(given[who], (0, width)).all():
            raise unknown(i)
        found = x.load("global", x.address(source), unit, width // unit, who & (given > 0))
        addresses = x.address(to)
        x.shared.offsets(x.in_block(addresses)[who], width)
        x.copies[-1].append(lambda: x.store("shared", addresses, unit, found, who))

    return run


def arrival(i: Instruction) -> Step:
    """mbarrier, by one thread or by all in step."""
    what = i.parts[1]

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        lanes = np.flatnonzero(x.spread(True if who is None else who))
        if not lanes.size:
            return
        at = int(x.address(i.operands[1 if what in ("arrive", "try_wait") else 0])[lanes[0]])
        if what == "init":
            x.arrivals[at] = Arrivals(int(i.operands[1]), int(i.operands[1]))
        elif what == "inval":
            del x.arrivals[at]
        elif what == "arrive":
            x.arrivals[at].missing -= len(lanes)
            x.arrivals[at].bytes += int(i.operands[2]) if "expect_tx" in i.parts else 0
        elif what == "try_wait":
            barrier, phase = x.arrivals[at], int(x.spread(x.read(i.operands[2], "u32"))[lanes[0]]) & 1
            if barrier.phase == phase:
                while barrier.copies:
                    barrier.bytes -= barrier.copies.pop(0)()
                if barrier.missing or barrier.bytes:
                    raise Fault(f"barriers: {barrier.missing} arrivals and {barrier.bytes} bytes never come")
                barrier.phase, barrier.missing = 1 - phase, barrier.expected
            x.write(i.operands[0], np.bool_(True), who, "pred")
        else:
            raise unknown(i)

    return run


@dataclass(frozen=True)
class Descriptor:
    """A tensor map of two dimensions, the outer first."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements; the inner is 1
    width: int  # bytes of an element
    box: tuple[int, ...]
    swizzle: int  # 0: none, 1: 32 bytes, 2: 64 bytes, 3: 128 bytes

    def __post_init__(self) -> None:
        """What the driver refuses (CUDA driver API, cuTensorMapEncodeTiled)."""
        line = self.box[1] * self.width
        if self.address % 16 or self.strides[0] * self.width % 16 or self.strides[1] != 1:
            raise Fault("alignment: of a descriptor's tensor, which must be a multiple of 16 bytes in address and row stride")
        if max(self.box) > 256 or line % 16 or (self.swizzle and line > 16 << self.swizzle):
            raise Fault(f"memory: a descriptor's box of {self.box} elements of {self.width} bytes, swizzle {self.swizzle}")


def swizzled(addresses: Array, mode: int) -> Array:
    """mode: as in a Descriptor. Units of 16 bytes change places within 1024 bytes."""
    return addresses ^ (addresses >> 7 & (1 << mode) - 1) << 4


def _box(i: Instruction) -> Step:
    """cp.async.bulk.tensor.2d, and the groups of those that store."""
    if i.parts[3] == "commit_group":
        return lambda x, mask: x.reading["bulk"].append([])
    if i.parts[3] == "wait_group":
        return lambda x, mask: x.read_until("bulk", int(i.operands[0]))
    if i.parts[3:5] != ("tensor", "2d"):
        raise unknown(i)
    loads = i.parts[5].startswith("shared")
    shared, tensor, *barrier = i.operands if loads else (i.operands[1], i.operands[0])
    source, _, places = tensor.strip("[] ").partition(",")
    coordinates = names(places.strip())

    def run(x: Machine, mask: Mask) -> None:
        who = x.active(i, mask)
        for lane in np.flatnonzero(x.spread(True if who is None else who)):
            map_at = int(x.spread(x.read(source.strip(), "b64"))[lane])
            d: Descriptor = list(x.parameters.values())[(map_at - PARAMETERS) // 256]
            start = int(x.address(shared)[lane])
            if start % (128 << d.swizzle if d.swizzle else 128):
                raise Fault("alignment: of a box in shared memory")
            rows, columns = np.indices(d.box)
            offsets = x.shared.offsets(swizzled(start + (rows * d.box[1] + columns) * d.width, d.swizzle).ravel(), d.width)
            inner, outer = (int(x.spread(x.read(c, "s32"))[lane]) for c in coordinates)
            row, column = (rows + outer).ravel(), (columns + inner).ravel()
            inside = (row >= 0) & (row < d.shape[0]) & (column >= 0) & (column < d.shape[1])
            elements = d.address + (row * d.strides[0] + column)[inside] * d.width
            if loads:
                values = np.zeros(offsets.size, f"u{d.width}")  # what lies outside of the tensor is zero
                (values[inside],) = x.memory.load(elements, d.width)
                _arrives(x, offsets, values, int(x.address(barrier[0])[lane]))
            else:
                x.reads("bulk", offsets)
                x.memory.store(elements, d.width, x.shared.load(offsets[inside] + SHARED, d.width))

    return run


def _arrives(x: Machine, offsets: Array, values: Array, barrier: int) -> None:
    """The bytes are in shared memory when the barrier is waited for, and nobody may read or need what was there from now on."""
    x.overwrites(offsets)
    x.arriving.append(offsets)

    def write() -> int:
        x.arriving = [region for region in x.arriving if region is not offsets]
        x.shared.store(offsets + SHARED, values.itemsize, [values])
        return values.nbytes

    x.arrivals[barrier].copies.append(write)
