"""Static choice of configuration: an analytic function of (target, dtype, sizes), which a measured table may override.

A configuration is a dict of a kernel's block sizes with num_warps and num_stages, passed to `launch` as it is. Nothing is
measured on a user's call.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
import triton.language as tl

from . import measured
from .launch import INTERPRET

P = ParamSpec("P")
T = TypeVar("T")
Config = dict[str, Any]
Static = Callable[..., Config]  # (target, dtype, *sizes)
Candidates = Callable[..., list[Config]]  # (target, dtype, *sizes): configurations worth measuring


@dataclass(frozen=True)
class Target:
    """What a configuration depends on."""

    backend: str  # cuda | hip | interpreter
    arch: int | str  # 90, "gfx942"; 0 in the interpreter, whose blocks are small
    sms: int  # streaming multiprocessors (compute units)
    shared: int  # bytes of shared memory a block may use
    warp: int  # lanes of a warp
    l2: int  # bytes of L2 cache; 0 for AMD's, of which nothing makes use
    name: str  # the device's, keys the measured tables

    @property
    def interpreted(self) -> bool:
        return self.backend == "interpreter"

    def at_least(self, capability: int) -> bool:
        """Whether this is an NVIDIA GPU of at least this compute capability (90 for 9.0)."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= capability


_KB, _MB = 1 << 10, 1 << 20
# Shared memory per block: CUDA programming guide, table of compute capabilities; CDNA and RDNA ISA documents (LDS).
# L2: NVIDIA's architecture white papers.
TARGETS: dict[str, Target] = {
    **{
        f"sm_{arch}": Target("cuda", arch, sms, shared * _KB, 32, l2 * _MB, name)
        for arch, sms, shared, l2, name in (
            (80, 108, 163, 40, "A100"),
            (86, 84, 99, 6, "RTX 3090"),
            (89, 128, 99, 72, "RTX 4090"),
            (90, 132, 227, 50, "H100"),
            (100, 148, 227, 126, "B200"),
            (120, 170, 99, 96, "RTX 5090"),
        )
    },
    **{
        arch: Target("hip", arch, cus, lds * _KB, 64 if arch.startswith("gfx9") else 32, 0, name)
        for arch, cus, lds, name in (
            ("gfx90a", 104, 64, "MI250"),
            ("gfx942", 304, 64, "MI300X"),
            ("gfx950", 256, 160, "MI355X"),
            ("gfx1100", 96, 64, "RX 7900 XTX"),
            ("gfx1201", 64, 64, "RX 9070 XT"),
        )
    },
}
INTERPRETER = Target("interpreter", 0, 4, 1 << 30, 32, 8 * _KB, "interpreter")

_assumed: Target | None = None


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Choose configurations for this target, whatever device the tensors are on (inspection, tests)."""
    global _assumed
    before, _assumed = _assumed, target
    _forget_plans()
    try:
        yield
    finally:
        _assumed = before
        _forget_plans()


def target_of(device: torch.device) -> Target:
    if _assumed is not None:
        return _assumed
    return INTERPRETER if INTERPRET else _target_of_gpu(device.index or 0)


@functools.cache
def _target_of_gpu(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        arch = properties.gcnArchName.partition(":")[0]
        known = TARGETS.get(arch, TARGETS["gfx942"])
        return Target("hip", arch, properties.multi_processor_count, known.shared, known.warp, 0, properties.name)
    shared = properties.shared_memory_per_block_optin
    capability = 10 * properties.major + properties.minor
    l2 = properties.L2_cache_size
    return Target("cuda", capability, properties.multi_processor_count, shared, 32, l2, properties.name)


_plans: list[Any] = []


def plan(function: Callable[P, T]) -> Callable[P, T]:
    """Keep what `function` returns, by its arguments, until a choice of configuration may be another one.

    For what a launcher computes from layouts alone: the launches it prepares. Keep no tensors in it.
    """
    kept = functools.lru_cache(maxsize=4096)(function)
    _plans.append(kept)
    return functools.update_wrapper(cast(Callable[P, T], kept), function)


def meta(shape: Sequence[int], stride: Sequence[int]) -> torch.Tensor:
    """A layout as a tensor, for plans."""
    return torch.empty_strided(shape, stride, device="meta")


def _forget_plans() -> None:
    for kept in _plans:
        kept.cache_clear()


def accumulator(*dtypes: torch.dtype) -> Any:
    """What kernels compute in: float32, or float64 (in the interpreter only) where a tensor has it."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


class Choice:
    """The configuration of one kernel, by target, dtype and sizes."""

    def __init__(self, name: str, static: Static) -> None:
        self.name = name
        self.static = static
        self.candidates: Candidates | None = None
        self._forced: Config | None = None
        self._cached = plan(self._choose)
        functools.update_wrapper(self, static)

    def __call__(self, device: torch.device, dtype: torch.dtype, *sizes: int) -> Config:
        if _consulted is not None:
            _consulted.append((self, target_of(device), dtype, sizes))
        if self._forced is not None:
            return self._forced
        return self._cached(target_of(device), dtype, sizes)[0]

    def source(self, device: torch.device, dtype: torch.dtype, *sizes: int) -> str:
        """Where the configuration comes from, for `explain`."""
        if self._forced is not None:
            return "given"
        return self._cached(target_of(device), dtype, sizes)[1]

    @contextlib.contextmanager
    def using(self, config: Config) -> Iterator[None]:
        """Choose this configuration whatever the sizes (tuning, inspection of candidates)."""
        before, self._forced = self._forced, config
        _forget_plans()
        try:
            yield
        finally:
            self._forced = before
            _forget_plans()

    def alternatives(self, target: Target, dtype: torch.dtype, *sizes: int) -> list[Config]:
        """The static choice first, then the other candidates."""
        found = [self.static(target, dtype, *sizes)]
        for config in self.candidates(target, dtype, *sizes) if self.candidates is not None else ():
            if config not in found:
                found.append(config)
        return found

    def _choose(self, target: Target, dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[Config, str]:
        static = self.static(target, dtype, *sizes)
        found = None if target.interpreted else measured.lookup(self.name, target.name, dtype, sizes)
        if found is None:
            return static, "static choice"
        config, path = found
        if config not in self.alternatives(target, dtype, *sizes):  # whose blocks the kernel may not be right for
            return static, f"static choice (what {path} has is no candidate here)"
        return config, f"measured on this device ({path})"


_consulted: list[tuple[Choice, Target, torch.dtype, tuple[int, ...]]] | None = None


@contextlib.contextmanager
def consulting() -> Iterator[list[tuple[Choice, Target, torch.dtype, tuple[int, ...]]]]:
    """Note which choices are asked, and for what."""
    global _consulted
    before, _consulted = _consulted, []
    _forget_plans()
    try:
        yield _consulted
    finally:
        _consulted = before


def forget_measured() -> None:
    """Read the measured tables again, and choose anew."""
    measured.forget()
    _forget_plans()


CHOICES: dict[str, Choice] = {}


def choice(name: str) -> Callable[[Static], Choice]:
    """Declare the configuration of the kernel `name` ("linear_relu.forward"): decorates its static function."""

    def declare(static: Static) -> Choice:
        CHOICES[name] = Choice(name, static)
        return CHOICES[name]

    return declare


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: triton.cdiv for the host, where that costs 2 us a call."""
    return -(-a // b)


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two >= n, kept between least and most."""
    return max(least, min(most, 1 << max(n - 1, 0).bit_length()))


def written(config: Config) -> str:
    """One line for tables: BLOCK_M=128 BLOCK_N=256 ..."""
    return " ".join(f"{key}={value}" for key, value in config.items())
