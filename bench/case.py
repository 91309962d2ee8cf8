"""What the harness and the tests know about one call of one op: inputs, the call, its cost.

`bench/cases/<op>.py` exports, for the op of that name:

    eager(...)       what a user would write in plain torch, in its fastest form
    reference(...)   the same in elementary aten: right in any order of derivative, run in float64
    SAMPLES          small cases: the contract tests, `verify`
    CASES            the rows that are timed
    REFUSED          calls that must raise: (function of no arguments, error type, a regular expression of the message)

`eager`, `reference` and every provider's implementation have the signature of `dlaccel.functional.<op>`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Tensor]
Make = Callable[[torch.Generator, torch.dtype], tuple[Tensor, ...]]
Cost = Callable[[str, int], int]


def _plain(f: Function, *tensors: Tensor) -> Tensor:
    return f(*tensors)


@dataclass(frozen=True)
class Case:
    """One call. `call(f, *make(generator, dtype))` runs it with any implementation `f` of the op."""

    op: str  # the name in dlaccel.functional
    name: str  # unique within the op, e.g. "128x784x512"
    make: Make  # tensors of one call, on generator.device, in their final dtypes and layouts
    call: Callable[..., Tensor] = _plain  # (f, *tensors): binds keywords and options
    constant: tuple[int, ...] = ()  # indices of floating-point tensors that get no gradient
    state: tuple[int, ...] = ()  # indices of tensors that the call updates (running statistics)
    shape: Mapping[str, int] = field(default_factory=dict)  # sizes by name, for tables and plots
    layout: str = "contiguous"  # or "channels_last"
    modes: tuple[str, ...] = ("fwd", "bwd", "train")  # and "dgrad", "wgrad" for convolutions
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    devices: tuple[str, ...] = ("cpu", "cuda")
    tags: frozenset[str] = frozenset()  # "goal": counts for the op's goal; "quick": in the quick preset
    # (mode, bytes per element) -> the least traffic to and from memory: each call reads its inputs once and writes its outputs
    # once. Only a sum over a whole tensor in between, as batch norm's statistics are, makes it read again. A training step is
    # two calls. What the kernels move may be more: they are several where one would do.
    bytes: Cost | None = None
    flops: Cost | None = None  # (mode, bytes per element) -> floating-point operations, 2 per multiply-add
    eager_form: str = ""  # how eager is written, for the table

    def inputs(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> tuple[Tensor, ...]:
        """The tensors of one call; those that want a gradient require it."""
        tensors = self.make(torch.Generator(device).manual_seed(seed), dtype)
        for i in self.differentiable(tensors):
            tensors[i].requires_grad_()
        return tensors

    def differentiable(self, tensors: tuple[Tensor, ...]) -> list[int]:
        fixed = {*self.constant, *self.state}
        return [i for i, t in enumerate(tensors) if t.is_floating_point() and i not in fixed]

    def __str__(self) -> str:
        return f"{self.op}/{self.name}"


def normal(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers on the generator's device; drawn in float32 at least, so that dtypes see the same values."""
    wide = dtype if dtype == torch.float64 else torch.float32
    return torch.randn(shape, generator=generator, device=generator.device, dtype=wide).to(dtype)


def families() -> dict[str, ModuleType]:
    """The modules of bench/cases by op name."""
    package = importlib.import_module("dlaccel.bench.cases")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"dlaccel.bench.cases.{name}") for name in names}


def implementation(op: str) -> Function:
    """dlaccel's own public function."""
    f: Any = getattr(importlib.import_module("dlaccel.functional"), op)
    return f  # type: ignore[no-any-return]
