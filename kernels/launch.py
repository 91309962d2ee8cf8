"""How kernels start: device guard, compiled-kernel and descriptor caches, interpreter lock, and a recorder of launches.

Triton's own `kernel[grid](...)` binds and inspects every argument on every call: 10 to 17 us of a CPU's time. Here the first
launch goes that way, and those that follow with arguments of the same kind start the compiled kernel it returned. What this
takes of Triton's private parts it takes only on the versions it was tested with; elsewhere every launch goes Triton's own way.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
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

_MAX_GRID = (2**31 - 1, 65535, 65535)
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


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its first argument; nothing happens where the grid is empty.

    args: the kernel's run-time arguments in order. options: its constants by name, and num_warps, num_stages.
    """
    if 0 in grid:
        return
    if grid[0] > _MAX_GRID[0] or (len(grid) > 1 and max(grid[1:]) > _MAX_GRID[1]):
        raise RuntimeError(f"{kernel.__name__}: a grid of {grid} is larger than a device takes, {_MAX_GRID}")
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, args, options))
        return
    COUNTS[kernel.__name__] += 1
    if INTERPRET:
        with _interpreter_lock:
            kernel[grid](*args, **options)
        return
    first = args[0]
    index = (first if isinstance(first, Tensor) else first.base).device.index
    if index == current_device():
        _start(index, kernel, grid, args, options)
    else:
        with torch.cuda.device(index):
            _start(index, kernel, grid, args, options)


current_device: Callable[[], int] = torch.cuda.current_device


# --- compiled kernels ---

_VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
_DIRECT = (3, 6) <= _VERSION <= (3, 9)  # CompiledKernel.run and JITFunction.run's result, as tested
_HIP = torch.version.hip is not None
_runtime = triton.knobs.runtime


@dataclass(frozen=True, slots=True)
class _Compiled:
    source: Any  # the JITFunction: the key has its id, which must not pass to another
    kernel: Any  # triton's CompiledKernel, and four of its attributes
    run: Any
    function: Any
    packed_metadata: Any
    constants: tuple[Any, ...]  # the parameters after the run-time arguments, in order


_Key = tuple[Any, ...]
_compiled: dict[_Key, _Compiled] = {}


def _start(index: int, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kinds = _kinds(args)
    if kinds is None:
        kernel[grid](*args, **options)
        return
    values = tuple(options.values())
    key = (id(kernel), index, tuple(options), values, tuple(map(type, values)), kinds)
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*args, **options)
        constants = _constants(kernel, len(args), options)
        if _DIRECT and isinstance(compiled, CompiledKernel) and constants is not None:
            _compiled[key] = _Compiled(kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata, constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler listens
        found.kernel[x, y, z](*args, *found.constants)
        return
    stream = driver.active.get_current_stream(index)
    found.run(x, y, z, stream, found.function, found.packed_metadata, None, None, None, *args, *found.constants)


def _constants(kernel: Any, n: int, options: dict[str, Any]) -> tuple[Any, ...] | None:
    """The values of the parameters after the first n; None where the key of _start would not tell two launches apart."""
    if not isinstance(kernel, JITFunction) or kernel.pre_run_hooks:
        return None
    arguments, constants = kernel.params[:n], kernel.params[n:]
    if any(p.is_constexpr for p in arguments) or not all(p.is_constexpr and p.name in options for p in constants):
        return None
    return tuple(options[p.name] for p in constants)


def _kinds(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What compiled code assumes of run-time arguments: dtype and alignment, and of integers also ==1, divisibility and width.

    Never less than Triton specialises on; the tests compare the two. None: an argument of a kind that is not known here.
    """
    kinds: list[Any] = []
    for a in args:
        if type(a) is int:
            kinds.append("one" if a == 1 else a & 15 == 0)
            if a >> 31:  # none for 0 <= a < 2**31
                kinds.append("u64" if a >= 2**63 else "i32" if -(2**31) <= a < 0 else "i64")
        elif isinstance(a, Tensor):
            kinds += a.dtype, a.data_ptr() & 15 == 0
            if _HIP:
                kinds.append(a.untyped_storage().nbytes() < 2**31)  # offsets of 32 bits
        elif a is None or type(a) in (float, bool):
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


def descriptor(t: Tensor, block_shape: list[int]) -> TensorDescriptor:
    """A TMA descriptor of `t`, from a cache: building one costs about 2 us. It does not keep `t` alive; the launch must."""
    if INTERPRET or _recorded is not None:
        return TensorDescriptor.from_tensor(t, block_shape)
    shape, strides = t.shape, t.stride()
    key = (t.data_ptr(), t.dtype, t.device, shape, strides, *block_shape)
    found = _descriptors.get(key)
    if found is None:
        if len(_descriptors) >= _MOST_DESCRIPTORS:
            _descriptors.clear()
        found = _descriptors[key] = TensorDescriptor(_Memory(*key[:3]), list(shape), list(strides), block_shape)
    return found
