"""Is an implementation right? Nothing is timed before it has passed, and what the timed loop computed is checked again.

An implementation runs on fresh inputs, at the shape, dtype and layout that will be timed, with uninitialised memory filled
with NaN. Every output (result, gradients, updated state) must be as near to float64 as eager's (`accuracy.close_enough`), and
every other input must be what it was. Two sets of inputs take turns, so that an answer kept from an earlier call is wrong.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench.accuracy import close_enough, relative_error
from dlaccel.bench.case import Case, Function, normal

Outputs = dict[str, Tensor]  # "output", "grad 0", ..., "state 3", ...: the numbers are indices of inputs

MODES = ("fwd", "bwd", "train", "dgrad", "wgrad")


class Step:
    """One call in one mode. `prepare()` is what comes before the timed part, `run()` the timed part.

    The inputs of the call lie in `tensors`, which `load` overwrites before each call: every implementation sees the same
    addresses, pristine values and fresh state, and values that differ from those of the call before.
    """

    def __init__(
        self,
        case: Case,
        function: Function,
        mode: str,
        tensors: tuple[Tensor, ...],
        dy: Tensor,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        self.case, self.function, self.mode, self.tensors, self.dy = case, function, mode, tensors, dy
        self.context = context  # entered around prepare() and run(), outside the clock
        differentiable = case.differentiable(tensors)
        first, rest = differentiable[:1], differentiable[1:]
        self.wanted = {"fwd": [], "dgrad": first, "wgrad": rest}.get(mode, differentiable)
        self._inputs = [tensors[i] for i in self.wanted]
        self._y: Tensor | None = None
        self._grads: Sequence[Tensor | None] = ()

    def load(self, values: Values) -> None:
        with torch.no_grad():
            for target, source in zip((*self.tensors, self.dy), (*values.tensors, values.dy), strict=True):
                if target is not source:
                    _overwrite(target, source)
        for i, t in enumerate(self.tensors):
            t.requires_grad_(i in self.wanted)

    def release(self) -> None:
        """Let go of what the last call computed."""
        self._y, self._grads = None, ()

    def prepare(self) -> None:
        self.release()
        if self.mode in ("bwd", "dgrad", "wgrad"):
            self._y = self.case.call(self.function, *self.tensors)

    def run(self) -> None:
        if self.mode == "fwd":
            self._y = self.case.call(self.function, *self.tensors)
            return
        if self.mode == "train":
            self._y = self.case.call(self.function, *self.tensors)
        assert self._y is not None
        self._grads = torch.autograd.grad(self._y, self._inputs, self.dy, allow_unused=True)

    def once(self, values: Values) -> Outputs:
        """One whole call on `values`."""
        self.load(values)
        with torch.set_grad_enabled(self.mode != "fwd"), self.context():
            self.prepare()
            self.run()
        return self.outputs()

    def outputs(self) -> Outputs:
        """What the last call computed."""
        found: dict[str, Tensor | None] = {"output": self._y} if self.mode in ("fwd", "train") else {}
        found |= {f"grad {i}": g for i, g in zip(self.wanted, self._grads, strict=True)}
        found |= {f"state {i}": self.tensors[i] for i in self.case.state}
        if missing := [name for name, t in found.items() if not isinstance(t, Tensor)]:
            raise RuntimeError(f"no {' and no '.join(missing)}: the result has no gradient")
        return {name: t.detach() for name, t in found.items() if t is not None}


@dataclass(frozen=True)
class Values:
    """Inputs of one call, and what it should give in every mode."""

    tensors: tuple[Tensor, ...]
    dy: Tensor
    eager: Outputs
    exact: Outputs


def values_of(case: Case, dtype: torch.dtype, device: str, seed: int, *, eager: Function, reference: Function) -> Values:
    """Draws inputs and a gradient of the output, and what they should give."""
    tensors, dy = drawn(case, dtype, device, seed, eager)
    return expected(case, tensors, dy, eager=eager, reference=reference)


def drawn(case: Case, dtype: torch.dtype, device: str, seed: int, eager: Function) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs, and a gradient of the output in its layout."""
    tensors = tuple(t.detach() for t in case.inputs(dtype, device, seed))
    with torch.no_grad():
        y = case.call(eager, *map(torch.clone, tensors))
    generator = torch.Generator(device).manual_seed(seed + 1_000_003)
    dy = normal(tuple(y.shape), generator, y.dtype) if y.dim() else torch.ones_like(y)
    return tensors, torch.empty_like(y).copy_(dy)


def expected(case: Case, tensors: tuple[Tensor, ...], dy: Tensor, *, eager: Function, reference: Function) -> Values:
    """Runs eager on copies of the inputs, and the reference on the same values in float64."""

    def run(function: Function, inputs: tuple[Tensor, ...], dy: Tensor) -> Outputs:
        step = Step(case, function, "train" if case.differentiable(inputs) else "fwd", tuple(map(copy, inputs)), dy)
        return step.once(Values(inputs, dy, {}, {}))

    def exact(device: torch.device) -> Outputs:
        moved = tuple(t.to(device, torch.float64 if t.is_floating_point() else t.dtype) for t in tensors)
        return run(reference, moved, dy.to(device, torch.float64))

    right: Outputs | None = None
    with suppress(torch.OutOfMemoryError):  # left before the second try, or its frames would hold the memory
        right = exact(dy.device)
    if right is None:  # in float64 the largest cases take more than a GPU has: they stay on the host
        torch.cuda.empty_cache()
        right = exact(torch.device("cpu"))
    return Values(tensors, dy, eager=run(eager, tensors, dy), exact=right)


def check(step: Step, values: Values, *, may_overwrite: bool = False, terms: float = 0.0) -> str | None:
    """Runs `step` once on `values` with poisoned memory. What is wrong, or None. `terms`: see close_enough."""
    with poisoned():
        outputs = step.once(values)
    if wrong := compare(outputs, values, terms):
        return wrong
    for i, (t, before) in enumerate(zip(step.tensors, values.tensors, strict=True)):
        if i not in step.case.state and not may_overwrite and not identical(t, before):
            return f"input {i} was overwritten"
    return None if identical(step.dy, values.dy) else "the gradient of the output was overwritten"


def compare(outputs: Mapping[str, Tensor], values: Values, terms: float = 0.0) -> str | None:
    """What is wrong with `outputs`, or None."""
    for name, got in outputs.items():
        if wrong := close_enough(got, values.eager[name], values.exact[name], got.dtype, terms=terms):
            return f"{name}: {wrong}"
    return None


def errors(outputs: Mapping[str, Tensor], values: Values) -> float:
    """The largest relative error of `outputs` against float64."""
    return max((relative_error(t, values.exact[name]) for name, t in outputs.items()), default=0.0)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty and its relatives give NaN (integers: the largest), on every device and in every library."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    deterministic: Any = torch.utils.deterministic
    fill = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "does not have a deterministic implementation": not what this is for
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = fill


def identical(a: Tensor, b: Tensor) -> bool:
    same = a.detach() == b
    return bool((same | (a.detach().isnan() & b.isnan())).all() if a.is_floating_point() else same.all())


def copy(t: Tensor) -> Tensor:
    """A copy with the strides of `t`."""
    new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    _overwrite(new, t)
    return new


def _overwrite(target: Tensor, source: Tensor) -> None:
    """`target.copy_(source)` for targets whose elements may share memory, as those of an expanded tensor do."""
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        if size > 1 and stride == 0:
            target, source = target.narrow(dim, 0, 1), source.narrow(dim, 0, 1)
    target.copy_(source)
