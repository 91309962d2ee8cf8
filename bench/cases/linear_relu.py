"""linear_relu: what is checked and timed. Sizes are M x K x N: x (M, K), weight (N, K)."""

from __future__ import annotations

import torch
from torch import Tensor

from dlaccel.bench.case import Case, implementation, normal

EAGER = "relu_(F.linear(x, weight, bias))"


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.relu_(torch.nn.functional.linear(x, weight, bias))


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = x @ weight.t()
    return (z if bias is None else z + bias).relu()


def case(
    x_shape: tuple[int, ...],
    n: int,
    *,
    bias: bool = True,
    name: str = "",
    tags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    *leading, k = x_shape
    m = 1
    for size in leading:
        m *= size

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        # Weights as torch.nn.Linear scales them, so that sums of any length stay near 1 and 16-bit results near full precision.
        x, weight = normal(x_shape, generator, dtype), normal((n, k), generator, dtype) / max(k, 1) ** 0.5
        return (x, weight, normal((n,), generator, dtype)) if bias else (x, weight)

    def flops(mode: str, itemsize: int) -> int:
        return {"fwd": 2, "bwd": 4, "train": 6}[mode] * m * n * k

    def traffic(mode: str, itemsize: int) -> int:
        forward, backward = m * k + n * k + m * n, 2 * (m * k + n * k + m * n)  # backward: x, w, y, dy; dx, dw
        return {"fwd": forward, "bwd": backward, "train": forward + backward}[mode] * itemsize

    return Case(
        op="linear_relu", name=name or f"{m}x{k}x{n}", make=make, shape={"M": m, "K": k, "N": n},
        devices=devices, tags=frozenset(tags), bytes=traffic, flops=flops, eager_form=EAGER,
    )  # fmt: skip


SAMPLES = [
    case((5, 7), 4, name="bias"),
    case((5, 7), 4, bias=False, name="no bias"),
    case((2, 3, 7), 4, name="3-d"),
    case((7,), 4, name="1-d"),
    case((0, 7), 4, name="empty batch"),
    case((5, 0), 4, name="empty sum"),
    case((5, 7), 0, name="no outputs"),
    case((33, 40), 65, name="ragged blocks"),
]

GOAL = [(128, 784, 512), (333, 784, 300), (64, 4096, 4096), (1024, 1024, 1024), (4096, 512, 2048), (2048, 384, 1536)]
ON_A_GPU = [
    (8192, 8192, 8192), (8192, 4096, 4096), (4096, 4096, 11008), (65536, 1024, 1024), (65536, 512, 512),
    (262144, 256, 256), (8192, 1024, 8192),
]  # fmt: skip

CASES = [
    *[case((m, k), n, tags=("goal", "quick") if m < 1024 else ("goal",)) for m, k, n in GOAL],
    case((8, 8), 8, tags=("overhead",)),
    case((64, 64), 64, tags=("overhead",)),
    case((256, 256), 256),
    *[case((m, k), n, devices=("cuda",)) for m, k, n in ON_A_GPU],
]

_ones = torch.ones
_linear_relu = implementation("linear_relu")
REFUSED = [
    (lambda: _linear_relu(_ones(2, 3), _ones(4, 5)), RuntimeError, r"x: expected \(\*, 5\)"),
    (lambda: _linear_relu(_ones(2, 3), _ones(3)), RuntimeError, r"weight: expected \(N, K\)"),
    (lambda: _linear_relu(_ones(2, 3), _ones(4, 3).double()), RuntimeError, "weight: expected torch.float32"),
    (
        lambda: _linear_relu(_ones(2, 3), _ones(4, 3, device="meta")),
        RuntimeError,
        "weight: expected torch.float32 on cpu",
    ),
    (lambda: _linear_relu(_ones(2, 3), _ones(4, 3), _ones(3)), RuntimeError, r"bias: expected \(4,\)"),
    (lambda: _linear_relu(_ones(2, 3), _ones(4, 3), _ones(4).double()), RuntimeError, "bias: expected torch.float32"),
    (lambda: _linear_relu(_ones(2, 3).int(), _ones(4, 3).int()), RuntimeError, "floating-point"),
]
