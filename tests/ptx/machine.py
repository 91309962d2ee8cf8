"""The state of some blocks of a launch, and how they go through a program."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.ptx.memory import SHARED, Array, Fault, Shared, Tensors
from tests.ptx.program import Instruction, Program
from tests.ptx.values import number, storage_of, widened

PARAMETERS = 0x4000_0000  # the address of a kernel's first parameter, which may be held in 32 bits; 256 bytes each

Mask = Any  # of threads; None: all
Step = Callable[["Machine", Mask], None]


@dataclass(frozen=True)
class Launched:
    """What all blocks of a launch share. parameters: by name, NumPy scalars and descriptors."""

    program: Program
    memory: Tensors
    parameters: dict[str, Any]
    grid: Sequence[int]
    threads: int  # of a block
    shared: int  # bytes of a block


class Alone(Fault):
    """Threads are where the others have to come too."""


@dataclass
class Arrivals:
    """An mbarrier: arrivals and bytes that its phase waits for, and what brings them."""

    expected: int
    missing: int
    phase: int = 0
    bytes: int = 0
    copies: list[Callable[[], int]] = field(default_factory=list)


class Machine:
    """Some blocks of a launch, in step. Registers hold an unsigned number for each thread, or one for all."""

    def __init__(self, launched: Launched, blocks: Sequence[tuple[int, ...]]) -> None:
        self.program, self.memory, self.parameters = launched.program, launched.memory, launched.parameters
        self.blocks, self.n = len(blocks), launched.threads * len(blocks)
        self.shared = Shared(launched.shared, len(blocks))
        self.of_block = np.repeat(np.arange(len(blocks)), launched.threads)
        self.warp = np.arange(self.n) // 32
        self.alive = np.ones(self.n, np.bool_)
        tid = np.tile(np.arange(launched.threads, dtype=np.uint32), len(blocks))
        self.registers: dict[str, Any] = {
            "%tid.x": tid,
            "%ntid.x": np.uint32(launched.threads),
            "%laneid": tid % np.uint32(32),
            "%warpid": tid // np.uint32(32),
            "global_smem": np.uint64(SHARED),
        }
        for axis, letter in enumerate("xyz"):
            self.registers[f"%nctaid.{letter}"] = np.uint32(launched.grid[axis])
            self.registers[f"%ctaid.{letter}"] = np.array([b[axis] for b in blocks], np.uint32)[self.of_block]
        for k, name in enumerate(self.parameters):
            self.registers[name] = np.uint64(PARAMETERS + 256 * k)
        # What works by itself until it is waited for, of one block only.
        self.copies: list[list[Callable[[], None]]] = [[]]  # by group; the last one is not committed
        self.arrivals: dict[int, Arrivals] = {}
        self.arriving: list[Array] = []  # offsets of shared memory that copies are on their way to
        self.reading: dict[str, list[list[Array]]] = {"wgmma": [[]], "bulk": [[]]}  # and that are read, by group

    # --- where it goes on ---

    def run(self, code: Sequence[Step | None]) -> None:
        """code: a step for each instruction; None for those that `branch` takes."""
        waiting: dict[int, Mask] = {0: None}  # where threads are, those that wait longest first
        stuck: dict[int, Fault] = {}  # who wait for others at a barrier
        looped = False
        while waiting:
            able = [at for at in waiting if at not in stuck]
            if not able:
                raise next(iter(stuck.values()))
            # Those behind come first, so that threads meet again; but a loop may wait for what the others do.
            at = able[0] if looped else min(able)
            mask = waiting.pop(at)
            looped = False
            while True:
                instruction, step = self.program.instructions[at], code[at]
                try:
                    if step is None:
                        to, mask = self.branch(instruction, at, mask, waiting, stuck)
                    else:
                        step(self, mask)
                        to = at + 1
                except Fault as fault:
                    named = type(fault)(f"{fault} | {instruction.text}")
                    if not isinstance(fault, Alone) or not waiting:
                        raise named from None
                    stuck[at] = named
                    waiting[at] = mask
                    break
                if to is None:
                    break
                looped = to <= at
                if waiting and (looped or to >= min(waiting)):
                    self.meet(waiting, stuck, to, mask)
                    break
                at = to

    @staticmethod
    def meet(waiting: dict[int, Mask], stuck: dict[int, Fault], at: int, mask: Mask) -> None:
        both = waiting.get(at, mask)
        mask = None if mask is None or both is None else mask | both
        waiting[at] = None if mask is None or mask.all() else mask
        stuck.pop(at, None)

    def branch(
        self, i: Instruction, at: int, mask: Mask, waiting: dict[int, Mask], stuck: dict[int, Fault]
    ) -> tuple[int | None, Mask]:
        taken = self.active(i, mask)
        if i.parts[0] in ("ret", "exit"):
            self.alive &= ~self.spread(True if taken is None else taken)
            left = self.alive if mask is None else mask & self.alive
            return (at + 1, left) if left.any() else (None, None)
        to = self.program.labels[i.operands[0]]
        if taken is None or (mask is not None and (taken == mask).all()):
            return to, mask
        if not taken.any():
            return at + 1, mask
        self.meet(waiting, stuck, to, taken)
        return at + 1, ~taken if mask is None else mask & ~taken

    def active(self, i: Instruction, mask: Mask) -> Mask:
        """The threads that run an instruction: those of the mask whose guard says so."""
        if not i.guard:
            return mask
        guard = self.read(i.guard, "pred")
        guard = ~guard if i.negated else guard
        if mask is None:
            return None if np.all(guard) else self.spread(guard)
        return mask & guard

    def whole_warps(self, mask: Mask) -> None:
        if mask is not None:
            warps = mask.reshape(-1, 32)
            if (warps.any(1) != warps.all(1)).any():
                raise Alone("barriers: only some of a warp's threads reach this")

    def whole_blocks(self, mask: Mask) -> Array:
        """Which blocks these threads are."""
        who = self.spread(True if mask is None else mask).reshape(self.blocks, -1)
        alive = self.alive.reshape(self.blocks, -1)
        if (who.any(1)[:, None] & (who != alive)).any():
            raise Alone("barriers: only some of a block's threads reach this")
        return who.any(1)

    # --- registers ---

    def spread(self, value: Any) -> Array:
        return np.broadcast_to(value, (self.n,))

    def read(self, operand: str, kind: str) -> Any:
        storage = storage_of(kind)
        if operand in self.registers:
            bits = self.registers[operand]
        elif operand[0] in "-0123456789":
            return number(_constant(operand, storage), kind)
        else:
            bits = storage_of(self._declared(operand))
            if bits is np.bool_:
                raise Fault(f"registers: {operand} is read before it is written")
            bits = bits(np.iinfo(bits).max)
        wide = kind != "pred" and bits.dtype.itemsize > storage(0).itemsize  # of which the low bits are meant
        return number(bits.astype(storage) if wide else bits, kind)

    def write(self, name: str, bits: Any, mask: Mask, kind: str = "b32") -> None:
        if name == "_":
            return
        storage = storage_of(self._declared(name))
        bits = widened(bits, kind, storage)
        if mask is not None:
            bits = np.where(
                mask, bits, self.registers.get(name, storage(np.iinfo(storage).max if storage is not np.bool_ else 0))
            )
        self.registers[name] = bits

    def _declared(self, name: str) -> str:
        return self.program.registers.get(re.sub(r"\d+$", "", name)) or self.program.registers[name]

    # --- memory ---

    def address(self, operand: str) -> Array:
        """Of every thread. operand: "[%rd1 + 16]"."""
        base, _, offset = operand.strip("[] ").partition("+")
        return self.spread(self.read(base.strip(), "b64").astype(np.int64) + int(offset or "0", 0))

    def in_block(self, addresses: Array) -> Array:
        """Each block sees its own shared memory from the same address on."""
        return addresses + self.of_block * self.shared.size

    def load(self, space: str, addresses: Array, width: int, count: int, mask: Mask) -> list[Array]:
        on = slice(None) if mask is None else mask
        if space == "global":
            found = self.memory.load(addresses[on], width, count)
        else:
            addresses = self.in_block(addresses)[on]
            found = self.shared.load(addresses, width, count)
            self.shared.note_read(addresses - SHARED, width * count, self.warp[on])
        if mask is None:
            return found
        results = [np.zeros(self.n, f"u{width}") for _ in found]
        for result, values in zip(results, found, strict=True):
            result[on] = values
        return results

    def store(self, space: str, addresses: Array, width: int, values: Sequence[Any], mask: Mask) -> None:
        on = slice(None) if mask is None else mask
        columns = [self.spread(v)[on] for v in values]
        if space == "global":
            self.memory.store(addresses[on], width, columns)
            return
        addresses = self.in_block(addresses)[on]
        offsets = self.shared.offsets(addresses, width * len(values))
        self.shared.note_write(offsets, self.warp[on], np.stack(columns, 1).view(np.uint8))
        self.shared.store(addresses, width, columns)

    # --- what works by itself ---

    def reads(self, engine: str, offsets: Array) -> None:
        if any(np.isin(offsets, region).any() for region in self.arriving):
            raise Fault("hazard: shared memory is read that a copy is on its way to")
        self.reading[engine][-1].append(offsets)

    def read_until(self, engine: str, groups: int) -> None:
        """But for so many of the groups that were committed last."""
        del self.reading[engine][: max(0, len(self.reading[engine]) - 1 - groups)]

    def overwrites(self, offsets: Array) -> None:
        for region in itertools.chain(*itertools.chain(*self.reading.values())):
            if np.isin(offsets, region).any():
                raise Fault("hazard: shared memory is overwritten while it is read")


def _constant(text: str, storage: Any) -> Any:
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return storage(int(text[2:], 16))
    value = int(text.rstrip("U"), 0)
    return storage(value != 0) if storage is np.bool_ else storage(value & np.iinfo(storage).max)
