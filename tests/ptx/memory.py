"""Global and shared memory, and what a kernel may do with it."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

SHARED = 1024  # the address of the first byte of shared memory
GLOBAL = 0x7F00_0000_0000  # and of global memory
GAP = 4096  # bytes between tensors


class Fault(AssertionError):
    """A kernel broke a rule."""


class Memory:
    """Bytes from an address on, of which some may be touched."""

    def __init__(self, name: str, base: int, size: int) -> None:
        self.name, self.base = name, base
        self.bytes = _zeros(size)
        self.owned = _zeros(size)  # 0xFF where it may be touched

    def offsets(self, addresses: Array, size: int) -> Array:
        """Of accesses of `size` bytes, checked."""
        if (addresses % size).any():
            odd = int(addresses[addresses % size != 0][0])
            raise Fault(f"alignment: {size} bytes of {self.name} memory at {odd % 256} modulo 256")
        offsets = addresses.astype(np.int64) - self.base
        inside = (offsets >= 0) & (offsets + size <= self.bytes.size)
        if inside.all():
            unit = min(size, 8)
            owned = self.owned.view(f"u{unit}")
            whole = np.iinfo(owned.dtype).max
            inside = np.logical_and.reduce([owned[offsets // unit + i] == whole for i in range(size // unit)])
        if not inside.all():
            raise Fault(f"memory: {size} bytes at {int(offsets[~inside][0])} of {self.name} memory, which are not the kernel's")
        return offsets

    def load(self, addresses: Array, width: int, count: int = 1) -> list[Array]:
        """`count` neighbours of `width` bytes from each address."""
        index = self.offsets(addresses, width * count) // width
        view = self.bytes.view(f"u{width}")
        return [view[index + i] for i in range(count)]

    def store(self, addresses: Array, width: int, values: Sequence[Array]) -> None:
        index = self.offsets(addresses, width * len(values)) // width
        view = self.bytes.view(f"u{width}")
        for i, value in enumerate(values):
            view[index + i] = value
            if (view[index + i] != value).any():
                raise Fault(f"memory: threads of one store disagree on what {self.name} memory holds")


def _zeros(size: int) -> Array:
    """Pages that nothing touches take no memory: tensors of a test may span gigabytes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    return np.frombuffer(mmap.mmap(-1, -(-size // 16) * 16 or 16, flags=flags), np.uint8)


# --- global ---

_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Tensors(Memory):
    """Copies of a launch's tensors, with gaps between them, at addresses of the same alignment."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.begins: dict[int, int] = {}  # by the address of a storage
        size = GAP
        for t in tensors:
            storage = t.untyped_storage()
            if storage.data_ptr() not in self.begins:
                self.begins[storage.data_ptr()] = size + storage.data_ptr() % 256
                size = -(-(size + 256 + storage.nbytes()) // 256) * 256 + GAP
        super().__init__("global", GLOBAL, size)
        self.tensors = [_one_of_each(t) for t in tensors if t.numel()]
        for t in self.tensors:
            self.view(self.bytes, t).copy_(t)
            self.view(self.owned, t.view(_INTEGER[t.element_size()])).fill_(-1)

    def address(self, t: Tensor) -> int:
        storage = t.untyped_storage().data_ptr()
        return GLOBAL + self.begins[storage] + t.data_ptr() - storage if t.numel() else GLOBAL

    def view(self, array: Array, t: Tensor) -> Tensor:
        """The elements of t in an array of this memory's bytes."""
        item = t.element_size()
        whole = torch.from_numpy(array[: array.size // item * item]).view(t.dtype)
        return whole.as_strided(t.shape, t.stride(), (self.address(t) - GLOBAL) // item)

    def copy_back(self) -> None:
        for t in self.tensors:
            t.copy_(self.view(self.bytes, t))


def _one_of_each(t: Tensor) -> Tensor:
    """Without what expanded dimensions repeat, and unknown to autograd."""
    return t.data.as_strided([n if s else 1 for n, s in zip(t.shape, t.stride(), strict=True)], t.stride())


# --- shared ---


class Shared(Memory):
    """The shared memory of some blocks, one after another, and which warp touched each byte since its block's last barrier."""

    def __init__(self, size: int, blocks: int) -> None:
        self.size = -(-size // 1024) * 1024  # of a block
        super().__init__("shared", SHARED, self.size * blocks)
        self.bytes[:] = 0xFF  # NaN in every format
        self.owned[: self.size * blocks].reshape(blocks, -1)[:, :size] = 0xFF
        self.epochs = np.ones(blocks, np.int32)  # barriers passed
        # Of each byte: the epoch of the last write and read, and by which warp (-1: several).
        self.written, self.read, self.writer, self.reader = (np.zeros(self.bytes.size, np.int32) for _ in range(4))

    def note_read(self, offsets: Array, size: int, warps: Array) -> None:
        index, warp = (offsets[:, None] + np.arange(size)).ravel(), np.repeat(warps, size)
        epoch = self.epochs[index // self.size]
        if ((self.written[index] == epoch) & (self.writer[index] != warp)).any():
            raise Fault("hazard: a warp reads shared memory that another wrote, with no barrier in between")
        again = (self.read[index] == epoch) & (self.reader[index] != warp)
        self.reader[index] = np.where(again, -1, warp)
        self.read[index] = epoch

    def note_write(self, offsets: Array, warps: Array, new: Array) -> None:
        """new: the bytes, a row for each offset. Writing what is there already is no hazard to other writers."""
        size = new.shape[1]
        index, warp = (offsets[:, None] + np.arange(size)).ravel(), np.repeat(warps, size)
        epoch = self.epochs[index // self.size]
        if ((self.read[index] == epoch) & (self.reader[index] != warp)).any():
            raise Fault("hazard: a warp writes shared memory that another read, with no barrier in between")
        other = (self.written[index] == epoch) & (self.writer[index] != warp)
        if (other & (self.bytes[index] != new.ravel())).any():
            raise Fault("hazard: two warps write shared memory differently, with no barrier in between")
        self.written[index], self.writer[index] = epoch, warp
