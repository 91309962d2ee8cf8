"""How kernels start: device guard, compiled-kernel and descriptor caches, interpreter lock, and a recorder of launches.

Triton's own `kernel[grid](...)` binds and inspects every argument on every call: 10 to 17 us of a CPU's time. Here the first
launch goes that way, and those that follow with arguments of the same kind start the compiled kernel it returned. A launcher
keeps the part of a launch that follows from layouts (`Prepared`, kept by `config.plan`), so that a call looks at its tensors
only. What this takes of Triton's private parts it takes only on the versions it was tested with; elsewhere every launch goes
Triton's own way.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRET: bool = bool(triton.knobs.runtime.interpret)  # fixed for the process: @triton.jit reads it when it decorates
COUNTS: Counter[str] = Counter()  # launches by kernel name

_MAX_PROGRAMS = 2**31 - 1  # all axes together: Triton's launcher multiplies them in 32 bits, and starts nothing beyond
_MAX_ACROSS = 65535  # on the second and the third axis
_interpreter_lock = threading.RLock()  # the interpreter patches triton.language while a kernel runs
_recorded: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """One launch as the launcher asked for it: what compile-only checks and `bench inspect` compile."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constants by name, num_warps, num_stages

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note launches instead of making them; the launchers then run on `meta` tensors."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


class Prepared:
    """A launch but for its tensors: what follows from their layouts, so that a launcher need not compute it on every call.

    numbers: the kernel's run-time arguments after the tensors. options: its constants by name, and num_warps, num_stages.
    """

    __slots__ = ("_padded_grid", "_rest", "_variant", "grid", "kernel", "name", "numbers", "options")

    def __init__(self, kernel: Any, grid: tuple[int, ...], *numbers: Any, **options: Any) -> None:
        too_large = math.prod(grid) > _MAX_PROGRAMS or (len(grid) > 1 and max(grid[1:]) > _MAX_ACROSS)
        if 0 not in grid and too_large:
            raise RuntimeError(f"{kernel.__name__}: a grid of {grid} is larger than what can be launched")
        self.kernel, self.grid, self.numbers, self.options = kernel, grid, numbers, options
        self.name: str = kernel.__name__
        self._padded_grid = (*grid, 1, 1)[:3]
        self._variant = None if INTERPRET else _variant(kernel, numbers, options)
        self._rest = numbers if self._variant is None else (*numbers, *self._variant.constants)

    def __call__(self, *args: Any) -> None:
        """Start the kernel, on the device of its first argument; nothing happens where the grid is empty.

        args: its first run-time arguments: the tensors, and numbers that change from call to call.
        """
        if 0 in self.grid:
            return
        if _recorded is not None:
            _recorded.append(Launch(self.kernel, self.grid, (*args, *self.numbers), self.options))
            return
        COUNTS[self.name] += 1
        if INTERPRET:
            with _interpreter_lock:
                self.kernel[self.grid](*args, *self.numbers, **self.options)
            return
        first = args[0]
        index = (first if isinstance(first, Tensor) else first.base).device.index
        if index == current_device():
            self._start(index, args)
        else:
            with torch.cuda.device(index):
                self._start(index, args)

    def _start(self, index: int, args: tuple[Any, ...]) -> None:
        kinds = _kinds(args)
        key = (self._variant, index, kinds)
        found = _compiled.get(key)
        if found is None:
            compiled = self.kernel[self.grid](*args, *self.numbers, **self.options)
            known = self._variant is not None and kinds is not None and len(args) + len(self._rest) == len(self.kernel.params)
            if known and _DIRECT and isinstance(compiled, CompiledKernel):
                _compiled[key] = _Compiled(compiled, compiled.run, compiled.function, compiled.packed_metadata)
            return
        x, y, z = self._padded_grid
        enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
            found.kernel[x, y, z](*args, *self._rest)
            return
        stream = driver.active.get_current_stream(index)
        found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *args, *self._rest)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first argument; nothing happens where the grid is empty.

    args: the kernel's run-time arguments in order. options: its constants by name, and num_warps, num_stages.
    """
    Prepared(kernel, grid, **options)(*args)


current_device: Callable[[], int] = torch.cuda.current_device


# --- compiled kernels ---

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_DIRECT = (3, 6) <= _VERSION <= (3, 9)  # CompiledKernel.run and JITFunction.run's result, as tested
_HIP = torch.version.hip is not None
_runtime = triton.knobs.runtime


@dataclass(frozen=True, slots=True, eq=False)  # compared by identity: its key is hashed once, when a launch is prepared
class _Variant:
    """A kernel with options and numbers of certain kinds: what compiled code assumes, but for device and tensors."""

    kernel: Any  # the key has its id, which must not pass to another
    constants: tuple[Any, ...]  # the parameters after the run-time arguments, in order


@dataclass(frozen=True, slots=True)
class _Compiled:
    kernel: Any  # triton's CompiledKernel, and three of its attributes
    run: Any
    function: Any
    packed_metadata: Any


_variants: dict[tuple[Any, ...], _Variant] = {}
_compiled: dict[tuple[_Variant | None, int, tuple[Any, ...] | None], _Compiled] = {}


def _variant(kernel: Any, numbers: tuple[Any, ...], options: dict[str, Any]) -> _Variant | None:
    """None where the keys here would not tell two launches apart.

    A parameter behind the constants that is None by default is for kernels that call this one.
    """
    kinds, values = _kinds(numbers), tuple(options.values())
    if kinds is None or not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        return None
    key = (id(kernel), tuple(options), values, tuple(map(type, values)), kinds)
    found = _variants.get(key)
    if found is None:
        constants = list(itertools.dropwhile(lambda p: not p.is_constexpr, kernel.params))
        if not all(p.name in options if p.is_constexpr else p.has_default and p.default is None for p in constants):
            return None
        found = _variants[key] = _Variant(kernel, tuple(options.get(p.name) for p in constants))
    return found


def _kinds(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What compiled code assumes of run-time arguments: dtype and alignment, and of integers also ==1, divisibility and width.

    Never less than Triton specialises on; the tests compare the two. None: an argument of a kind that is not known here.
    """
    kinds: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            kinds.append(a.dtype if a.data_ptr() & 15 == 0 else (a.dtype, "unaligned"))
            if _HIP:
                kinds.append(a.untyped_storage().nbytes() < 2**31)  # offsets of 32 bits
        elif type(a) is int:
            kinds.append("one" if a == 1 else a & 15 == 0)
            if a >> 31:  # none for 0 <= a < 2**31
                kinds.append("u64" if a >= 2**63 else "i32" if -(2**31) <= a < 0 else "i64")
        elif a is None:
            kinds.append(None)
        elif type(a) in (float, bool):
            kinds.append(type(a))
        elif isinstance(a, TensorDescriptor):
            kinds += a.base.dtype, tuple(a.block_shape), a.padding, getattr(a, "round_f32_to_tf32", False)
        else:
            return None
    return tuple(kinds)


# --- tensor descriptors ---


@dataclass(frozen=True, slots=True)
class _Memory:
    """What a descriptor needs of its tensor, without keeping it alive."""

    address: int
    dtype: torch.dtype
    device: torch.device

    def data_ptr(self) -> int:
        return self.address


_descriptors: dict[tuple[Any, ...], TensorDescriptor] = {}
_MOST_DESCRIPTORS = 4096


def descriptor(t: Tensor, block_shape: Sequence[int]) -> TensorDescriptor:
    """A TMA descriptor of `t`, from a cache: building one costs about 2 us. It does not keep `t` alive; the launch must."""
    if INTERPRET or _recorded is not None:
        return TensorDescriptor.from_tensor(t, list(block_shape))
    shape, strides = t.shape, t.stride()
    key = (t.data_ptr(), t.dtype, t.device, shape, strides, *block_shape)
    found = _descriptors.get(key)
    if found is None:
        if len(_descriptors) >= _MOST_DESCRIPTORS:
            _descriptors.clear()
        found = _descriptors[key] = TensorDescriptor(_Memory(*key[:3]), list(shape), list(strides), list(block_shape))
    return found
