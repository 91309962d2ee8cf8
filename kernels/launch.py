"""How kernels start: device guard, interpreter lock, and a recorder that notes launches instead of making them."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton

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
    if any(n > limit for n, limit in zip(grid, _MAX_GRID, strict=False)):
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
    index = (first if isinstance(first, torch.Tensor) else first.base).device.index
    if index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(index):
            kernel[grid](*args, **options)
