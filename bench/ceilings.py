"""What this machine can do at most: floating-point operations and memory traffic per second, measured at the start of a run.

A matrix product by the better of aten and oneDNN (on a GPU cuBLAS) gives the arithmetic ceiling of a dtype; the better of a
copy (bytes read + bytes written) and a sum (bytes read) gives the bandwidth of a working set, in each cache and in memory.
Data is random: zeros multiply faster. The best of several calls counts, so that a busy machine does not lower the ceiling.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from dlaccel.bench.timing import Stopwatch

SUSPECT, REFUSED = 1.05, 3.0  # times the ceiling
_REPEATS, _SECONDS = 8, 0.2


@dataclass(frozen=True)
class Ceilings:
    """`gflops` by dtype; `gbps` by working set in bytes."""

    gflops: dict[str, float] = field(default_factory=dict)
    gbps: dict[int, float] = field(default_factory=dict)

    def bandwidth(self, working_set: int) -> float | None:
        """GB/s that a call touching `working_set` bytes cannot pass: the best rate of any working set as large, between two
        that were measured interpolated on logarithmic axes."""
        sizes = sorted(self.gbps)
        if not sizes:
            return None
        best = [max(self.gbps[s] for s in sizes[i:]) for i in range(len(sizes))]
        i = bisect.bisect_right(sizes, working_set)
        if i in (0, len(sizes)) or not best[i]:
            return best[min(i, len(sizes) - 1)]
        part = math.log(working_set / sizes[i - 1]) / math.log(sizes[i] / sizes[i - 1])
        return best[i - 1] * math.exp(part * math.log(best[i] / best[i - 1]))

    def floor_ms(self, dtype: str, bytes: int | None, flops: int | None, working_set: int) -> float | None:
        """The least time in which this machine can do it, or None where nothing is declared."""
        bounds = []
        if flops and dtype in self.gflops:
            bounds.append(flops / self.gflops[dtype] / 1e6)
        if bytes and (gbps := self.bandwidth(working_set)):
            bounds.append(bytes / gbps / 1e6)
        return max(bounds, default=None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> Ceilings:
        return Ceilings(values["gflops"], {int(size): rate for size, rate in values["gbps"].items()})


def measure(device: str, watch: Stopwatch, dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")) -> Ceilings:
    """About 2 s on a CPU."""
    cuda = device == "cuda"
    sides = (4096, 8192) if cuda else (512, 1024)
    sizes = [1 << 26, 1 << 30] if cuda else [1 << p for p in (15, 18, 20, 22, 24, 25, 26, 27)]
    gflops = {name: max(_matmul(device, getattr(torch, name), side, watch) for side in sides) for name in dtypes}
    return Ceilings(gflops, {size: _traffic(device, size, watch) for size in sizes})


def _matmul(device: str, dtype: torch.dtype, n: int, watch: Stopwatch) -> float:
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    candidates: list[Callable[[], object]] = [lambda: torch.mm(x, y, out=out)]
    if device == "cpu" and torch.backends.mkldnn.is_available():
        # oneDNN's product, which on AMD is up to twice as fast as the BLAS behind torch.mm.
        candidates.append(lambda: torch.ops.mkldnn._linear_pointwise(x, y, None, "none", [], ""))
    return max((_rate(2 * n**3, call, watch) for call in candidates), default=0.0)


def _traffic(device: str, working_set: int, watch: Stopwatch) -> float:
    count = working_set // 8
    source, target = torch.randn(count, device=device), torch.zeros(count, device=device)
    whole = torch.randn(2 * count, device=device)
    return max(_rate(8 * count, lambda: target.copy_(source), watch), _rate(8 * count, lambda: whole.sum(), watch))


def _rate(amount: int, call: Callable[[], object], watch: Stopwatch) -> float:
    """In units of 1e9 a second; 0 if the call does not run here."""

    def run() -> None:
        call()

    try:
        run()
        times: list[float] = []
        while len(times) < _REPEATS and sum(times) < _SECONDS:
            times.append(watch.time(run))
    except RuntimeError:
        return 0.0
    return amount / max(min(times), 1e-9) / 1e9
