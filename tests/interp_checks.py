"""Triton's interpreter, checked. Tests run interpreted kernels under it by default (conftest.py).

    with checked():
        kernel[grid](...)  # or any call that launches interpreted kernels

A kernel that breaks a rule raises KernelFault naming the rule, tensor, element, program and source line:

memory     a load, store or atomic outside the tensors given to the kernel; the elements that a strided view skips are outside.
races      programs that touch one element, one of them writing, with nothing that orders them; lanes of a store that disagree.
           Order comes from atomics with acquire and release semantics (Triton's default), as in a kernel whose last program
           merges the others' partial results. What a program stored is released only with a `tl.debug_barrier()` between the
           stores and the atomic: without it, only the thread that runs the atomic has its own stores ordered.
undefined  lanes masked off in a load without `other`. They hold NaN here (-1 for integers), not the interpreter's 0.
overflow   32-bit integer arithmetic that wraps, with the assertions that Triton has and leaves off; also `tl.device_assert`.

and computes bfloat16 correctly. Triton's own interpreter (3.6 to 3.9) does bfloat16 arithmetic on the bit patterns, truncates
instead of rounding, and cannot make constants. Sums are rounded at every step, in float16 too, as on a GPU.

Not seen: hazards inside one program (shared memory, a load of what another lane stored), TF32 rounding, hints that lie
(`tl.multiple_of`), anything a compiler does: tests/ptx runs what it compiles. Two programs storing the same value into one
element are reported too; a kernel that does so on purpose is run with races=False.

It patches private names of `triton.runtime.interpreter`. test_interp_checks.py runs one kernel per rule on every supported
Triton, so that a name that moved fails a test instead of blinding all others.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder as Builder
from triton.runtime.interpreter import ReduceOps, ScanOps, TensorHandle

GAP = 4096  # bytes between tensors: an index a little too large never lands in the next one
MANY = -1  # in Memory.reader: more than one program


class KernelFault(AssertionError):
    """A kernel broke one of the rules above."""


@contextlib.contextmanager
def checked(*, memory: bool = True, races: bool = True, undefined: bool = True, overflow: bool = True) -> Iterator[None]:
    """Run the kernels launched inside under the checks. `races` needs `memory`."""
    builder, knobs = interpreter.interpreter_builder, triton.knobs.compilation
    options, debugging = builder.options, knobs.front_end_debugging
    with contextlib.ExitStack() as stack:
        stack.enter_context(np.errstate(all="ignore"))  # infinities and NaN are values like others
        _install_one_patch_per_launch(stack)
        _install_bfloat16(stack)
        if undefined:
            _install_undefined(stack)
        if memory:
            _install_memory(stack, races)
        if overflow:
            builder.options = dataclasses.replace(options, debug=True)
        knobs.front_end_debugging = True  # errors keep their type and their way into the kernel
        try:
            yield
        finally:
            builder.options, knobs.front_end_debugging = options, debugging


def _replace(stack: contextlib.ExitStack, owner: Any, **functions: Callable[..., Any]) -> None:
    for name, function in functions.items():
        stack.enter_context(mock.patch.object(owner, name, function))


def _install_one_patch_per_launch(stack: contextlib.ExitStack) -> None:
    """Triton puts its functions into triton.language again at every call of a helper: half the time of many kernels."""
    patch, patched = interpreter._patch_lang, set[frozenset[int]]()

    class Scope:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def restore(self) -> None:  # the end of a launch; calls of helpers never restore
            patched.clear()
            self.inner.restore()

    def once(fn: Any) -> Scope | None:
        modules = frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)
        if modules in patched:
            return None
        patched.add(modules)
        return Scope(patch(fn))

    _replace(stack, interpreter, _patch_lang=once)


# ---- memory and races -----------------------------------------------------------------------------------------------


class Memory:
    """The tensors of one launch, copied into one buffer with gaps, and who touched each element.

    Programs run one after another. Time is counted in epochs: a new one starts with each program, barrier and atomic.
    `writer`, `reader` and `atomic` hold, for each element, the epoch of the last access of that kind; 0 is the host.
    """

    def __init__(self, races: bool) -> None:
        self.races = races
        self.program_of: list[tuple[int, int, int]] = [(-1, -1, -1)]  # of each epoch
        self.released = bytearray([1])  # of each epoch: has its program released it?
        self.visible = np.zeros(0, np.bool_)  # of each epoch: has this program acquired it?
        self.program = (0, 0, 0)
        self.first = self.fenced = self.epoch = 1  # a program's epochs start at `first`; a release publishes up to `fenced`

    def load_arguments(self, tensors: list[tuple[str, torch.Tensor]]) -> list[torch.Tensor]:
        """The same views of copies."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for _, t in tensors}
        starts, size = {}, GAP
        for key, storage in storages.items():
            starts[key] = size
            size += -(-storage.nbytes() // 64) * 64 + GAP  # the alignment a pointer had stays
        self.granule = min((t.element_size() for _, t in tensors), default=1)
        self.buffer = torch.empty(size, dtype=torch.uint8)
        self.base = self.buffer.data_ptr()
        self.copies = [(s, self.buffer[starts[key] : starts[key] + s.nbytes()]) for key, s in storages.items()]
        for storage, copy in self.copies:
            copy.copy_(_as_bytes(storage))
        owned = torch.zeros(size // self.granule, dtype=torch.bool)
        self.owned = owned.numpy()
        self.writer, self.reader, self.atomic = (np.zeros(self.owned.size, np.int32) for _ in range(3))
        self.arguments = []
        for name, t in tensors:
            item = t.element_size()
            start = starts[t.untyped_storage().data_ptr()] // item + t.storage_offset()
            view = torch.empty(0, dtype=t.dtype).set_(self.buffer.untyped_storage(), start, t.size(), t.stride())
            self.arguments.append((name, view))
            if view.numel():
                wide, kept = item // self.granule, [(n, s) for n, s in zip(t.size(), t.stride(), strict=True) if s]
                owned.as_strided([n for n, _ in kept], [s * wide for _, s in kept], start * wide).fill_(True)
        return [view for _, view in self.arguments]

    def store_arguments(self) -> None:
        for storage, copy in self.copies:
            _as_bytes(storage).copy_(copy)

    # -- time
    def start_epoch(self, released: bool = False) -> int:
        self.program_of.append(self.program)
        self.released.append(released)
        return len(self.released) - 1

    def start_program(self, program: tuple[int, int, int]) -> None:
        self.program = program
        self.first = self.fenced = self.epoch = self.start_epoch()
        self.visible = self.visible[:0]

    def barrier(self) -> None:
        self.fenced = self.epoch = self.start_epoch()

    # -- accesses
    def elements(self, pointers: TensorHandle, mask: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Indices into `writer` of the active lanes, and which lanes are active."""
        on = np.broadcast_to(np.asarray(mask.data, np.bool_), np.shape(pointers.data))
        offsets = np.asarray(pointers.data)[on].astype(np.int64) - self.base
        index = offsets // self.granule
        inside = (index >= 0) & (index < self.owned.size) & (offsets % self.granule == 0)
        inside[inside] = self.owned[index[inside]]
        if not inside.all():
            self.fault(what, pointers.get_element_ty(), offsets[~inside])
        return index, on

    def fault(self, what: str, dtype: tl.dtype, offsets: np.ndarray) -> None:
        def distance(argument: tuple[str, torch.Tensor]) -> int:
            start = argument[1].data_ptr() - self.base
            return max(start - int(offsets[0]), int(offsets[0]) - start - _span(argument[1]), 0)

        name, t = min(self.arguments, key=distance)
        where = (offsets - (t.data_ptr() - self.base)) // t.element_size()
        near = f"index {where.min()}..{where.max()} counted from the start of '{name}'"
        shape = f"shape {tuple(t.shape)}, strides {t.stride()}"
        raise KernelFault(f"{what} out of bounds: {len(offsets)} lane(s) of {dtype}, {near}, {shape} | {self.here()}")

    def refuse_races(self, index: np.ndarray, kinds: dict[str, np.ndarray]) -> None:
        for kind, epochs in kinds.items():
            who = epochs[index]
            bad = (who != 0) & (who < self.first)
            if self.visible.size:  # this program acquired: what was released before then is ordered
                bad &= (who != MANY) & ~self.visible[np.where(bad, who, 0)]
            if bad.any():
                element, epoch = self.name_of(int(index[bad][0])), int(who[bad][0])
                other = "several programs" if epoch == MANY else f"program {self.program_of[epoch]}"
                raise KernelFault(f"race: {kind} by {other}, unordered, on {element} | {self.here()}")

    def load(self, pointers: TensorHandle, mask: Any) -> None:
        index, _ = self.elements(pointers, mask, "load")
        if self.races:
            self.refuse_races(index, {"load after a store": self.writer, "load after an atomic": self.atomic})
            last = self.reader[index]
            self.reader[index] = np.where((last == 0) | (last >= self.first), self.epoch, MANY)

    def store(self, pointers: TensorHandle, value: TensorHandle, mask: Any) -> None:
        index, on = self.elements(pointers, mask, "store")
        if self.races:
            order = np.argsort(index, kind="stable")
            index, values = index[order], np.broadcast_to(value.data, on.shape)[on][order]
            differ = (values[1:] != values[:-1]) & ((values[1:] == values[1:]) | (values[:-1] == values[:-1]))
            if (clash := (index[1:] == index[:-1]) & differ).any():
                raise KernelFault(f"lanes of one store disagree on {self.name_of(index[1:][clash][0])} | {self.here()}")
            self.refuse_races(
                index,
                {"store after a store": self.writer, "store after a load": self.reader, "store after an atomic": self.atomic},
            )
            self.writer[index] = self.epoch

    def update(self, pointers: TensorHandle, mask: Any, order: str) -> None:
        index, _ = self.elements(pointers, mask, "atomic")
        if not self.races:
            return
        self.refuse_races(index, {"atomic after a store": self.writer, "atomic after a load": self.reader})
        release = order in ("RELEASE", "ACQUIRE_RELEASE")
        if release:
            self.released[self.first : self.fenced] = b"\1" * (self.fenced - self.first)
        self.atomic[index] = self.start_epoch(released=release)
        self.epoch = self.start_epoch()
        if order in ("ACQUIRE", "ACQUIRE_RELEASE"):
            self.visible = np.frombuffer(bytes(self.released), np.bool_)

    # -- words
    def name_of(self, element: int) -> str:
        address = self.base + element * self.granule
        for name, t in self.arguments:
            if t.data_ptr() <= address < t.data_ptr() + _span(t):
                return f"'{name}'[{(address - t.data_ptr()) // t.element_size()}]"
        return "?"

    def here(self) -> str:
        frame = sys._getframe()
        while frame.f_back and (frame.f_code.co_filename == __file__ or "/triton/" in frame.f_code.co_filename):
            frame = frame.f_back
        return f"program {self.program} | {frame.f_code.co_filename}:{frame.f_lineno}"


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, 0, (storage.nbytes(),), (1,))


def _span(t: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    last = sum((n - 1) * s for n, s in zip(t.size(), t.stride(), strict=True))
    return (last + 1) * t.element_size() if t.numel() else 0


def _map_tensors(f: Callable[[str, torch.Tensor], Any], name: str, argument: Any) -> Any:
    """`argument` with f(name, tensor) for each tensor in it."""
    if isinstance(argument, torch.Tensor):
        return f(name, argument)
    if isinstance(argument, interpreter.TensorDescriptor):
        return dataclasses.replace(argument, base=f(name, argument.base))
    if isinstance(argument, (tuple, list)):
        parts = [_map_tensors(f, f"{name}[{i}]", part) for i, part in enumerate(argument)]
        return type(argument)(*parts) if hasattr(argument, "_fields") else type(argument)(parts)
    return argument


def _install_memory(stack: contextlib.ExitStack, races: bool) -> None:
    """Give every launch a Memory, and every access to it."""
    memory = Memory(races)
    old_grid, old_load, old_store = Builder.set_grid_idx, Builder.create_masked_load, Builder.create_masked_store
    old_rmw, old_cas, old_barrier = Builder.create_atomic_rmw, Builder.create_atomic_cas, Builder.create_barrier

    def enter_launch(self: Any, args: Any, kwargs: Any) -> Any:
        nonlocal memory
        memory = Memory(races)
        named = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        tensors: list[tuple[str, torch.Tensor]] = []

        def collect(name: str, t: torch.Tensor) -> torch.Tensor:
            tensors.append((name, t))
            return t

        for name, value in named:
            _map_tensors(collect, name, value)
        views = iter(memory.load_arguments(tensors))
        copies = [_map_tensors(lambda n, t: next(views), name, value) for name, value in named]
        return copies[: len(args)], dict(zip(kwargs, copies[len(args) :], strict=True))

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        old_grid(self, x, y, z)
        memory.start_program((x, y, z))

    def create_masked_load(self: Any, ptrs: TensorHandle, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        memory.load(ptrs, mask)
        return old_load(self, ptrs, mask, other, *rest, **options)

    def create_masked_store(self: Any, ptrs: TensorHandle, value: TensorHandle, mask: Any, *rest: Any) -> Any:
        memory.store(ptrs, value, mask)
        return old_store(self, ptrs, value, mask, *rest)

    def create_atomic_rmw(self: Any, op: Any, ptr: Any, value: Any, mask: Any, sem: Any, *rest: Any) -> Any:
        memory.update(ptr, mask, sem.name)
        return old_rmw(self, op, ptr, value, mask, sem, *rest)

    def create_atomic_cas(self: Any, ptr: Any, compare: Any, value: Any, sem: Any, *rest: Any) -> Any:
        memory.update(ptr, TensorHandle(np.ones(np.shape(ptr.data), np.bool_), tl.int1), sem.name)
        return old_cas(self, ptr, compare, value, sem, *rest)

    def create_barrier(self: Any) -> Any:
        memory.barrier()
        return old_barrier(self)

    _replace(
        stack,
        interpreter.GridExecutor,
        _init_args_hst=enter_launch,
        _restore_args_dev=lambda self, *_: memory.store_arguments(),
    )
    _replace(
        stack,
        Builder,
        set_grid_idx=set_grid_idx,
        create_masked_load=create_masked_load,
        create_masked_store=create_masked_store,
        create_atomic_rmw=create_atomic_rmw,
        create_atomic_cas=create_atomic_cas,
        create_barrier=create_barrier,
    )


def _install_undefined(stack: contextlib.ExitStack) -> None:
    old = Builder.create_masked_load

    def create_masked_load(self: Any, ptrs: TensorHandle, mask: Any, other: Any, *rest: Any, **options: Any) -> Any:
        if other is None and not np.asarray(mask.data).all():
            dtype = ptrs.get_element_ty()
            storage, shape = interpreter._get_np_dtype(dtype), np.shape(ptrs.data)
            ones = np.full(shape, -1, f"i{storage.itemsize}").view(storage) if storage != np.bool_ else np.ones(shape, bool)
            other = TensorHandle(ones, dtype)  # NaN in every floating-point format
        return old(self, ptrs, mask, other, *rest, **options)

    _replace(stack, Builder, create_masked_load=create_masked_load)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _narrow(values: Any) -> np.ndarray:
    """float32 to the nearest bfloat16, ties to even; the interpreter keeps bfloat16 as uint16."""
    bits = np.array(values, np.float32, ndmin=1).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def _is_bfloat16(x: Any) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _float32(x: Any) -> Any:
    return TensorHandle(_widen(x.data), tl.float32) if _is_bfloat16(x) else x


def _bfloat16(x: TensorHandle) -> TensorHandle:
    return TensorHandle(_narrow(x.data), tl.bfloat16)


def _through_float32(method: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An operation on handles: bfloat16 operands are widened, the result is rounded once."""

    def call(self: Any, *operands: Any) -> TensorHandle:
        if not any(map(_is_bfloat16, operands)):
            return method(self, *operands)
        result = method(self, *map(_float32, operands))
        return _bfloat16(result) if result.data.dtype == np.float32 else result  # a comparison stays bool

    return call


def _install_bfloat16(stack: contextlib.ExitStack) -> None:
    old_cast, old_convert, old_dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot
    old_sum, old_min_max, old_scan = ReduceOps.sum, ReduceOps.min_max, ScanOps.apply_impl

    def cast_impl(self: Any, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == target.scalar:
            return old_cast(self, source, target)
        if target.scalar == tl.bfloat16:
            return _bfloat16(TensorHandle(source.data.astype(np.float32), tl.float32))
        wide = _float32(source)
        return wide if target.scalar == tl.float32 and wide is not source else old_cast(self, wide, target)

    def create_fp_to_fp(self: Any, source: TensorHandle, target: tl.dtype, rounding: Any) -> TensorHandle:
        nearest = rounding == interpreter._ir.ROUNDING_MODE.RTNE
        if nearest and source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return _bfloat16(source)
        return old_convert(self, source, target, rounding)

    def create_dot(self: Any, a: TensorHandle, b: TensorHandle, c: TensorHandle, *rest: Any) -> TensorHandle:
        result = old_dot(self, _float32(a), _float32(b), _float32(c), *rest)
        return _bfloat16(result) if _is_bfloat16(c) else result

    def reduce_sum(self: Any, x: Any) -> Any:
        dtype = x.dtype.scalar
        if dtype not in (tl.bfloat16, tl.float16):
            return old_sum(self, x)
        data = _widen(x.handle.data) if dtype == tl.bfloat16 else x.handle.data
        rows = data.reshape(-1) if self.axis is None else np.moveaxis(data, self.axis, 0)
        while len(rows) > 1:  # a tree, as on a GPU; sizes are powers of two
            rows = rows[: len(rows) // 2] + rows[len(rows) // 2 :]
            rows = _widen(_narrow(rows)) if dtype == tl.bfloat16 else rows
        total = np.asarray(rows[0])
        if self.keep_dims:
            total = total.reshape([1] * data.ndim) if self.axis is None else np.expand_dims(total, self.axis)
        total = _narrow(total) if dtype == tl.bfloat16 else total
        return self.to_tensor(total if total.shape else total[()], dtype)

    def min_max(self: Any, x: Any, *operations: Any, **named: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return old_min_max(self, x, *operations, **named)
        result = old_min_max(self, _wide_tensor(x), *operations, **named)
        values = result if isinstance(result, tuple) else (result,)
        narrow = tuple(_narrow_tensor(self, r) if r.dtype.scalar == tl.float32 else r for r in values)  # not an index
        return narrow if isinstance(result, tuple) else narrow[0]

    def scan(self: Any, inputs: Any) -> Any:
        results = zip(old_scan(self, [_wide_tensor(x) for x in inputs]), inputs, strict=True)
        return [_narrow_tensor(self, r) if x.dtype.scalar == tl.bfloat16 else r for r, x in results]

    _replace(
        stack,
        Builder,
        cast_impl=cast_impl,
        create_fp_to_fp=create_fp_to_fp,
        create_dot=create_dot,
        **{name: _through_float32(getattr(Builder, name)) for name in ("binary_op", "unary_op", "create_fma", "create_clampf")},
    )
    _replace(stack, ReduceOps, sum=reduce_sum, min_max=min_max)
    _replace(stack, ScanOps, apply_impl=scan)
    if not hasattr(Builder, "get_bf16"):  # Triton 3.6 and 3.7

        def get_bf16(self: Any, value: float) -> TensorHandle:
            return TensorHandle(_narrow([value]), tl.bfloat16)

        stack.enter_context(mock.patch.object(Builder, "get_bf16", get_bf16, create=True))


def _wide_tensor(x: Any) -> Any:
    return tl.tensor(_float32(x.handle), tl.block_type(tl.float32, list(x.shape))) if _is_bfloat16(x.handle) else x


def _narrow_tensor(operation: ReduceOps | ScanOps, x: Any) -> Any:
    bits = _narrow(x.handle.data)
    return operation.to_tensor(bits if x.type.is_block() else bits[0], tl.bfloat16)
