"""Launches of the package's kernels, and of any other, on the machine."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import multiprocessing
import pickle
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from dlaccel.bench import compile
from tests.ptx.asynchronous import Descriptor
from tests.ptx.instructions import steps
from tests.ptx.machine import Launched, Machine
from tests.ptx.memory import Fault, Tensors
from tests.ptx.program import Program, parse

THREADS = 4096  # of the blocks that run in step

Passed = tuple[tuple[str, str], ...]  # name and Triton's type of the arguments that are passed, but for constants


@dataclasses.dataclass(frozen=True)
class Compiled:
    program: Program
    passed: Passed
    threads: int
    shared: int
    boxes: tuple[dict[str, Any], ...]  # of the descriptors among the arguments


@contextlib.contextmanager
def emulated(target: str, **changes: Any) -> Iterator[list[str]]:
    """Run launches here, compiled for `target` ("sm_90"). Yields the names of the kernels that ran.

    changes: of the target's fields, as in `sms=2`, so that small sizes are enough for many tiles a program.
    """
    from dlaccel.kernels import config, launch

    ran: list[str] = []
    ordinary = launch.Prepared.__call__

    def start(self: Any, *args: Any) -> None:
        if launch._recorded is not None:
            ordinary(self, *args)
        elif 0 not in self.grid:
            ran.append(self.name)
            launch.COUNTS[self.name] += 1
            run(launch.Launch(self.kernel, self.grid, (*args, *self.numbers), self.options), target)

    assumed = dataclasses.replace(config.TARGETS[target], **changes)
    with config.assume(assumed), mock.patch.object(launch.Prepared, "__call__", start):
        yield ran


def run(launch: Any, target: str) -> None:
    """One launch. launch: a dlaccel.kernels.launch.Launch, with CPU tensors."""
    compiled = _compiled(launch, target)
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.options
    tensors = [getattr(v, "base", v) for v in values.values()]
    memory = Tensors([t for t in tensors if isinstance(t, Tensor)])
    parameters: list[Any] = []
    boxes = iter(compiled.boxes)
    for name, kind in compiled.passed:
        parameters += _parameters(values[name], kind, memory, boxes)
    parameters += [np.uint64(0)] * (len(compiled.program.parameters) - len(parameters))  # Triton's scratch memory
    named = dict(zip(compiled.program.parameters, parameters, strict=True))
    grid = (*launch.grid, 1, 1)[:3]
    execute(Launched(compiled.program, memory, named, grid, compiled.threads, compiled.shared))
    memory.copy_back()


def execute(launched: Launched) -> None:
    code = steps(launched.program)
    alone = any(i.parts[0] in ("cp", "wgmma", "mbarrier") for i in launched.program.instructions)  # waits for itself only
    together = 1 if alone else max(1, THREADS // launched.threads)
    places = [(x, y, z) for z in range(launched.grid[2]) for y in range(launched.grid[1]) for x in range(launched.grid[0])]
    with np.errstate(all="ignore"):
        for first in range(0, len(places), together):
            blocks = places[first : first + together]
            try:
                Machine(launched, blocks).run(code)
            except Fault as fault:
                raise Fault(f"{fault} | blocks {blocks[0]} to {blocks[-1]}") from None


def _parameters(value: Any, kind: str, memory: Tensors, boxes: Iterator[dict[str, Any]]) -> Sequence[Any]:
    if kind.startswith("*"):
        return [np.uint64(memory.address(value))]
    if kind.startswith("tensordesc"):
        box, t = next(boxes), value.base
        shape, strides = tuple(value.shape), tuple(value.strides)
        d = Descriptor(memory.address(t), shape, strides, t.element_size(), tuple(box["block_size"]), box["swizzle"])
        return [d, *map(np.uint32, shape), *map(np.uint64, strides)]
    if kind.startswith("fp"):
        return [np.float32(value).view(np.uint32)]
    width = max(int(kind[1:]) // 8, 1)
    return [np.array(value, f"{kind[0]}{width}").view(f"u{width}")[()]]


# --- from a launch to PTX ---

_found: dict[str, Compiled] = {}


def _compiled(launch: Any, target: str) -> Compiled:
    key = compile.identity(launch, target)
    if key not in _found:
        ptx, *rest = _compiler().submit(_compile, compile.pickled(launch), target).result()
        _found[key] = Compiled(parse(ptx), *rest)
    return _found[key]


@functools.cache
def _compiler() -> ProcessPoolExecutor:
    """A process that compiles, until this one ends."""
    folder = tempfile.TemporaryDirectory(prefix="dlaccel-triton-")
    atexit.register(folder.cleanup)
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=compile.start_worker, initargs=(folder.name,))


def _compile(pickled: bytes, target: str) -> tuple[str, Passed, int, int, tuple[dict[str, Any], ...]]:
    """In the compiling process."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime import driver

    from dlaccel.kernels.config import TARGETS

    device = TARGETS[target]
    driver.set_active(compile.NamesATarget(GPUTarget(device.backend, device.arch, device.warp)))
    CUDABackend.make_cubin = lambda *_: b""  # PTX is what is wanted
    kernel, grid, args, options = pickle.loads(pickled)
    compiled = kernel.warmup(*args, grid=grid, **options)
    passed = tuple((str(name), str(kind)) for name, kind in compiled.src.signature.items() if kind != "constexpr")
    metadata = compiled.metadata
    boxes = tuple(getattr(metadata, "tensordesc_meta", None) or ())
    return str(compiled.asm["ptx"]), passed, 32 * metadata.num_warps, metadata.shared, boxes
