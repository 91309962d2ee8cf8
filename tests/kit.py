"""Small helpers of the tests: where they run, layouts, cotangents, poison, "inputs unchanged", the acceptance rule.

DEVICE, INTERPRET            where tensors of a test live; whether kernels are interpreted
EMULATED                     the GPU whose compiled kernels tests/ptx runs on the CPU, or ""
LAYOUTS[name](t)             the same shape (and, but for expanded ones, the same values) with other strides; detached
COTANGENTS[name](y)          a gradient for y: dense, stride 0, laid out differently
constants(module, NAME=...)  context: other constants of a kernel's launchers
poisoned()                   context: torch.empty and its relatives are filled with NaN (maximum, True)
unchanged(*tensors)          context: fails if a tensor's values are not the same afterwards
check(f, eager, tensors)     f and its gradients against eager and float64, by dlaccel.bench.accuracy.close_enough;
                             its parts: with_gradients, assert_close_enough
sparse(shape, strides)       a CPU tensor that spans gigabytes of address space and touches almost none
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench.accuracy import close_enough

Function = Callable[..., Tensor]

ROOT = Path(__file__).resolve().parents[1]
EMULATED = os.environ.get("DLACCEL_EMULATE", "")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1" and not EMULATED
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRET and not EMULATED else "cpu"


# ---- layouts --------------------------------------------------------------------------------------------------------


def _channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if t.dim() > 2 else t.clone()


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.clone()


def _row_slice(t: Tensor) -> Tensor:
    """Every second entry of the first dimension, with an offset."""
    return torch.stack([t, t], 1).flatten(0, 1)[1::2] if t.dim() else t.clone()


def _column_slice(t: Tensor) -> Tensor:
    """Every third entry of the last dimension, with an offset: no dimension has stride 1."""
    return torch.stack([t, t, t], -1).flatten(-2)[..., 1::3] if t.dim() else t.clone()


def _storage_offset(t: Tensor) -> Tensor:
    """Contiguous, but its first element is not aligned."""
    return torch.cat([t.new_ones(3), t.flatten()])[3:].view(t.shape)


def _expanded_row(t: Tensor) -> Tensor:
    """Stride 0 in the first dimension; other values."""
    return t[:1].clone().expand(t.shape) if t.dim() and t.numel() else t.clone()


def _expanded_scalar(t: Tensor) -> Tensor:
    """Stride 0 everywhere; other values."""
    return t.flatten()[:1].clone().view([1] * t.dim()).expand(t.shape) if t.numel() else t.clone()


def _channels_last_slice(t: Tensor) -> Tensor:
    """The second half of the channels of a channels_last tensor."""
    return _channels_last(torch.cat([t, t], 1))[:, t.shape[1] :] if t.dim() > 2 else t.clone()


def _leaf(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: f(t.detach()).requires_grad_(t.requires_grad)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": _leaf(lambda t: t.clone(memory_format=torch.contiguous_format)),
    "channels_last": _leaf(_channels_last),
    "channels_last slice": _leaf(_channels_last_slice),
    "transposed": _leaf(_transposed),
    "row slice": _leaf(_row_slice),
    "column slice": _leaf(_column_slice),
    "storage offset": _leaf(_storage_offset),
    "expanded row": _leaf(_expanded_row),
    "expanded scalar": _leaf(_expanded_scalar),
}


def _dense(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)


COTANGENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": _dense,
    "stride 0": lambda y: y.new_full((), 0.75).expand(y.shape),
    "transposed": lambda y: _transposed(_dense(y)),
    "channels_last": lambda y: _channels_last(_dense(y)),
    "column slice": lambda y: _column_slice(_dense(y)),
}


# ---- correctness ----------------------------------------------------------------------------------------------------


def with_gradients(f: Function, tensors: Sequence[Tensor], g: Tensor | None = None) -> list[Tensor | None]:
    """f(*tensors) and the gradient of every tensor that requires one, for the cotangent g of f's result."""
    y = f(*tensors)
    leaves = [t for t in tensors if t.requires_grad]
    return [y, *torch.autograd.grad(y, leaves, _dense(y) if g is None else g, allow_unused=True)] if leaves else [y]


def assert_close_enough(
    got: Sequence[Tensor | None],
    eager: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
    terms: Sequence[float] | None = None,
) -> None:
    """`dlaccel.bench.accuracy.close_enough` for a result and its gradients, as `with_gradients` returns them."""
    results = zip(got, eager, exact, terms or [0.0] * len(exact), strict=True)
    wrong = [close_enough(p, q, r, dtype, terms=t) for p, q, r, t in results]
    named = [f"{'result' if i == 0 else f'gradient {i - 1}'} {w}" for i, w in enumerate(wrong) if w]
    assert not named, "; ".join(named)


def check(
    f: Function,
    eager: Function,
    tensors: Sequence[Tensor],
    g: Tensor | None = None,
    *,
    reference: Function | None = None,
    state: Sequence[int] = (),
    terms: Sequence[float] | None = None,
) -> None:
    """f and its gradients are as accurate as eager's, compared with `reference` (eager) in float64; f leaves its inputs alone.

    `state`: indices of tensors that the call updates (running statistics), compared afterwards as results are.
    `terms`: see close_enough; one number for the result and one for each gradient.
    """
    theirs, exact = _copies(tensors), _copies(tensors, torch.float64)
    g = _dense(eager(*_copies([t.detach() for t in tensors]))) if g is None else g
    with unchanged(*[t for i, t in enumerate(tensors) if i not in state], g):
        got = with_gradients(f, tensors, g)
    want, truth = with_gradients(eager, theirs, g), with_gradients(reference or eager, exact, g.double())
    assert_close_enough(got, want, truth, terms=terms)
    for i in state:
        wrong = close_enough(tensors[i], theirs[i], exact[i])
        assert wrong is None, f"updated input {i} {wrong}"


def _copies(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    def copy(t: Tensor) -> Tensor:
        wanted = dtype if dtype is not None and t.is_floating_point() else t.dtype
        return t.detach().to(wanted, copy=True).requires_grad_(t.requires_grad)

    return [copy(t) for t in tensors]


@contextlib.contextmanager
def unchanged(*tensors: Tensor) -> Iterator[None]:
    """The tensors hold the same values afterwards."""
    before = [t.detach().clone() for t in tensors]
    yield
    for i, (t, old) in enumerate(zip(tensors, before, strict=True)):
        try:
            torch.testing.assert_close(t.detach(), old, rtol=0, atol=0, equal_nan=True)
        except AssertionError as e:
            raise AssertionError(f"input {i} was changed: {e}") from None


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty, empty_like, new_empty, empty_strided give NaN (integers: the maximum; bool: True).

    An element that a kernel leaves unwritten then shows. torch may pick other kernels of its own too: for tests of values only.
    """
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)


@contextlib.contextmanager
def constants(module: ModuleType, **values: Any) -> Iterator[None]:
    """What launchers planned with other constants is forgotten, before and after."""
    from dlaccel.kernels import config

    before = {name: getattr(module, name) for name in values}
    try:
        vars(module).update(values)
        config.forget_measured()
        yield
    finally:
        vars(module).update(before)
        config.forget_measured()


# ---- big tensors ----------------------------------------------------------------------------------------------------


def sparse(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """A CPU tensor with strides so large that offsets pass 2^31; untouched pages take no memory (Linux)."""
    span = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    memory = mmap.mmap(-1, span * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)
