"""depthwise_separable_block: MobileNetV1's blocks. Names are N x C x H(=W) -> F and stride."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench.case import Case, implementation, normal
from dlaccel.bench.cases import batch_norm, depthwise_conv2d
from dlaccel.bench.cases.separable_conv2d import pointwise

EAGER = "F.conv2d, F.batch_norm, relu_, F.conv2d 1x1, F.batch_norm, relu_"
COUNTER_DIFFERS = depthwise_conv2d.COUNTER_DIFFERS


def _block(depthwise: Any, normalise: Any, mix: Any, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Tensor:
    x, dw, w1, b1, mean1, var1, pw, w2, b2, mean2, var2 = tensors
    stride, padding, dilation, training, momentum, eps, activation = options
    x = depthwise(x, dw, None, stride, padding, dilation)
    x = normalise(x, mean1, var1, w1, b1, training, momentum, eps, activation=activation)
    y: Tensor = normalise(mix(x, pw), mean2, var2, w2, b2, training, momentum, eps, activation=activation)
    return y


def eager(*args: Any) -> Tensor:
    """Takes the positional arguments of dlaccel.functional.depthwise_separable_block, all of them."""
    return _block(depthwise_conv2d.eager, batch_norm.eager, torch.nn.functional.conv2d, args[:11], args[11:])


def reference(*args: Any) -> Tensor:
    return _block(depthwise_conv2d.reference, batch_norm.reference, pointwise, args[:11], args[11:])


def case(
    n: int,
    c: int,
    size: int,
    f: int,
    stride: int = 1,
    *,
    training: bool = True,
    activation: str = "relu",
    layout: str = "contiguous",
    name: str = "",
    tags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.promote_types(dtype, torch.float32)

        def batch_norms(channels: int) -> list[Tensor]:
            weight, bias, mean, var = (normal((channels,), generator, wide) for _ in range(4))
            return [weight.abs() / 2 + 0.5, bias / 2, mean / 2, var.abs() / 2 + 0.5]

        x = normal((n, c, size, size), generator, dtype)
        depthwise, mix = normal((c, 1, 3, 3), generator, dtype) / 3, normal((f, c, 1, 1), generator, dtype) / c**0.5
        x, depthwise, mix = (t.contiguous(memory_format=memory_format) for t in (x, depthwise, mix))
        return (x, depthwise, *batch_norms(c), mix, *batch_norms(f))

    def call(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return function(*tensors, stride, 1, 1, training, 0.1, 1e-5, activation)

    out = -(-size // stride)
    inputs, outputs = n * size * size, n * out * out

    def traffic(mode: str, itemsize: int) -> int:
        # In training the results of the convolutions, d and m, are written as their statistics are summed, and read again.
        x, d, m, y = c * inputs, c * outputs, f * outputs, f * outputs
        forward = x + 2 * d + 2 * m + y if training else x + y
        # m and dy for the sums, again for m's gradient; d, and d's gradient as its sums are added up; both again, x; dx.
        backward = 2 * (m + y) + 2 * d + 2 * d + 2 * x
        return {"fwd": forward, "bwd": backward, "train": forward + backward}[mode] * itemsize

    def flops(mode: str, itemsize: int) -> int:
        return {"fwd": 1, "bwd": 2, "train": 3}[mode] * 2 * outputs * c * (9 + f)

    state = (4, 5, 9, 10)
    long_name = f"{n}x{c}x{size}->{f}" + f" s{stride}" * (stride > 1) + " eval" * (not training)
    return Case(
        op="depthwise_separable_block", name=name or long_name + " channels_last" * (layout == "channels_last"), make=make,
        call=call, constant=() if training else state, state=state if training else (), layout=layout, tags=frozenset(tags),
        shape={"N": n, "C": c, "H": size, "W": size, "F": f, "stride": stride},
        modes=("fwd", "bwd", "train") if training else ("fwd",), devices=devices, bytes=traffic, flops=flops, eager_form=EAGER,
    )  # fmt: skip


SAMPLES = [
    case(3, 2, 3, 2, name="training"),
    case(2, 9, 6, 5, 2, training=False, activation="relu6", layout="channels_last", name="evaluation, relu6"),
]

LAYOUTS = ("contiguous", "channels_last")
# MobileNetV1's blocks: (channels, size, out channels, stride), batch 8 on the CPU.
BLOCKS = [
    (32, 112, 64, 1), (64, 112, 128, 2), (128, 56, 128, 1), (128, 56, 256, 2), (256, 28, 256, 1),
    (256, 28, 512, 2), (512, 14, 512, 1), (512, 14, 1024, 2), (1024, 7, 1024, 1),
]  # fmt: skip
CASES = [
    *[
        case(4 if size > 100 else 8, c, size, f, s, layout=layout, tags=("goal", "quick") if (c, s) == (128, 1) else ("goal",))
        for c, size, f, s in BLOCKS
        for layout in LAYOUTS
    ],
    *[
        case(8, c, size, f, training=False, layout=layout)
        for c, size, f in ((128, 56, 128), (512, 14, 512))
        for layout in LAYOUTS
    ],
    *[
        case(128, c, size, f, s, training=training, layout=layout, devices=("cuda",))
        for training in (True, False)
        for c, size, f, s in BLOCKS
        for layout in LAYOUTS
    ],
]


def _refused(**changed: Any) -> Callable[[], Tensor]:
    ones, names = torch.ones, ("bn1_weight", "bn1_bias", "bn1_running_mean", "bn1_running_var")
    arguments: dict[str, Any] = {
        "input": ones(2, 2, 4, 4),
        "depthwise_weight": ones(2, 1, 3, 3),
        "pointwise_weight": ones(3, 2, 1, 1),
    }
    arguments |= {name: ones(2) for name in names} | {name.replace("1", "2"): ones(3) for name in names}
    return lambda: implementation("depthwise_separable_block")(**{**arguments, **changed})


REFUSED = [
    (_refused(activation="gelu"), ValueError, "activation: expected 'relu' or 'relu6', got 'gelu'"),
    (_refused(pointwise_weight=torch.ones(3, 2)), RuntimeError, r"pointwise_weight: expected \(out_channels, 2, 1, 1\)"),
    (_refused(bn1_running_mean=None), RuntimeError, "running_mean and running_var: expected both in evaluation"),
]
