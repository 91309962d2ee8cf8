"""separable_conv2d: what is checked and timed. Names are N x C x H(=W) -> F, K and stride."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dlaccel.bench.case import Case, implementation, normal
from dlaccel.bench.cases import depthwise_conv2d

EAGER = "F.conv2d(F.conv2d(x, dw, None, ..., groups=C), pw, bias)"
COUNTER_DIFFERS = depthwise_conv2d.COUNTER_DIFFERS


def eager(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
) -> Tensor:
    mid = depthwise_conv2d.eager(input, depthwise_weight, None, stride, padding, dilation)
    return torch.nn.functional.conv2d(mid, pointwise_weight, bias)


def reference(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    mid = depthwise_conv2d.reference(input, depthwise_weight, None, stride, padding, dilation)
    return pointwise(mid, pointwise_weight, bias)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A 1x1 convolution as a matrix product over the channels."""
    y = (x.movedim(-3, -1) @ weight[:, :, 0, 0].t()).movedim(-1, -3)
    return y if bias is None else y + bias[:, None, None]


def case(
    n: int,
    c: int,
    size: int | tuple[int, int],
    f: int,
    k: int = 3,
    *,
    stride: int = 1,
    multiplier: int = 1,
    bias: bool = False,
    layout: str = "contiguous",
    name: str = "",
    tags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    h, w = (size, size) if isinstance(size, int) else size
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    mid = c * multiplier

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        made = [
            normal((n, c, h, w), generator, dtype),
            normal((mid, 1, k, k), generator, dtype) / k,
            normal((f, mid, 1, 1), generator, dtype) / mid**0.5,
        ]
        tensors = [t.contiguous(memory_format=memory_format) for t in made]
        return (*tensors, normal((f,), generator, dtype)) if bias else tuple(tensors)

    def call(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors, *[None] * (4 - len(tensors)), stride, k // 2, 1)

    inputs, outputs = n * h * w, n * -(-h // stride) * -(-w // stride)

    def traffic(mode: str, itemsize: int) -> int:
        x, y = c * inputs, f * outputs  # one kernel: the depthwise result need not be stored
        return {"fwd": x + y, "bwd": 2 * x + y, "train": 3 * x + 2 * y}[mode] * itemsize

    def flops(mode: str, itemsize: int) -> int:
        return {"fwd": 1, "bwd": 2, "train": 3}[mode] * 2 * outputs * mid * (k * k + f)

    long_name = f"{n}x{c}x{h}->{f} K{k}" + f" s{stride}" * (stride > 1) + " channels_last" * (layout == "channels_last")
    return Case(
        op="separable_conv2d", name=name or long_name, make=make, call=call, layout=layout, tags=frozenset(tags),
        shape={"N": n, "C": c, "H": h, "W": w, "F": f, "K": k, "stride": stride},
        devices=devices, bytes=traffic, flops=flops, eager_form=EAGER,
    )  # fmt: skip


SAMPLES = [case(1, 2, (4, 3), 3, multiplier=2, bias=True, name="multiplier 2")]

LAYOUTS = ("contiguous", "channels_last")
CASES = [
    # Xception's middle flow and entry, EfficientNet's 5x5, ConvNeXt's 7x7 widths; then GPU sizes (KernelBench level 1, 86).
    *[case(8, 240, 28, 40, 5, layout=layout, tags=("goal", "quick")) for layout in LAYOUTS],
    *[case(8, 96, 28, 96, 7, layout=layout, tags=("goal",)) for layout in LAYOUTS],
    *[case(2, 128, 74, 256, layout=layout, tags=("no loss",)) for layout in LAYOUTS],
    *[case(4, 728, 19, 728, layout=layout, tags=("no loss",)) for layout in LAYOUTS],
    *[case(16, 64, 512, 128, layout=layout, devices=("cuda",)) for layout in LAYOUTS],
]

_ones = torch.ones
_conv = implementation("separable_conv2d")
REFUSED = [
    (
        lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), _ones(3, 4, 1, 1)),
        RuntimeError,
        r"pointwise_weight: expected \(out_channels, 2, 1, 1\)",
    ),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 5, 5), _ones(3, 2, 1, 1)), RuntimeError, "does not fit into"),
]
