"""Pieces of tests that need a GPU. Written without one: not yet run on a GPU.

no_host_sync()           context: a synchronising CUDA call raises
captured(f)              (graph, results) of a CUDA graph of f(), after warm-up
busy_stream()            context: a second stream keeps the device loaded, so that programs are scheduled differently
guarded(t), intact(t)    a tensor between red zones; whether they are still as they were
needs_memory(nbytes)     skips where less is free
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

RED_ZONE = 1024  # elements on either side
RED = 42.0


@contextlib.contextmanager
def no_host_sync() -> Iterator[None]:
    """Warm up first: compiling a kernel synchronises."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(f: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch.cuda.graph leaves its stream current when a capture fails; this does not
        for _ in range(3):
            f()
        with torch.cuda.graph(graph, stream=side):
            results = f()
    torch.cuda.current_stream().wait_stream(side)
    return graph, results


@contextlib.contextmanager
def busy_stream(products: int = 200) -> Iterator[None]:
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        a = torch.randn(2048, 2048, device="cuda")
        for _ in range(products):
            a = (a @ a).clamp_(-1, 1)
    yield
    other.synchronize()


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy of t in the middle of a larger allocation."""
    whole = t.new_full((t.numel() + 2 * RED_ZONE,), RED)
    whole[RED_ZONE : RED_ZONE + t.numel()] = t.detach().flatten()
    return whole[RED_ZONE : RED_ZONE + t.numel()].view(t.shape)


def intact(t: Tensor) -> bool:
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    return bool((whole[:RED_ZONE] == RED).all() and (whole[RED_ZONE + t.numel() :] == RED).all())


def needs_memory(nbytes: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < nbytes:
        pytest.skip(f"needs {nbytes / 2**30:.1f} GiB of GPU memory, {free / 2**30:.1f} are free")
