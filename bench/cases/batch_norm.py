"""batch_norm: what is checked and timed. Cases: (N, C, *) plain, with ReLU, with residual and ReLU; both layouts."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench.case import Case, Function, implementation, normal


def _activate_(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else y.relu_() if activation == "relu" else torch.nn.functional.hardtanh_(y, 0, 6)


def eager(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float | None = 0.1, eps: float = 1e-5, *,
    residual: Tensor | None = None, activation: str | None = None, num_batches_tracked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What a user writes, with `add_` and `relu_`: batch norm does not save its result."""
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        momentum = 1 / float(num_batches_tracked) if momentum is None else momentum
    y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)  # type: ignore[arg-type]
    return _activate_(y if residual is None else y.add_(residual), activation)


def reference(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float | None = 0.1, eps: float = 1e-5, *,
    residual: Tensor | None = None, activation: str | None = None, num_batches_tracked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    over = [d for d in range(input.dim()) if d != 1]

    def of_channel(v: Tensor) -> Tensor:
        return v.view(1, -1, *[1] * (input.dim() - 2))

    if training:
        mean = input.mean(over)
        var = (input - of_channel(mean)).square().mean(over)
        count = math.prod(input.shape) // max(input.shape[1], 1)
        with torch.no_grad():
            if num_batches_tracked is not None:
                num_batches_tracked.add_(1)
            share: Any = momentum if momentum is not None or num_batches_tracked is None else 1 / num_batches_tracked
            if running_mean is not None and running_var is not None and count:
                running_mean.copy_((1 - share) * running_mean + share * mean)
                running_var.copy_((1 - share) * running_var + share * var * (count / (count - 1)))
    else:
        assert running_mean is not None and running_var is not None
        mean, var = running_mean, running_var
    y = (input - of_channel(mean)) / (of_channel(var) + eps).sqrt()
    y = y if weight is None else y * of_channel(weight)
    y = y if bias is None else y + of_channel(bias)
    y = y if residual is None else y + residual
    return y if activation is None else y.relu() if activation == "relu" else y.clamp(0, 6)


def _call(names: tuple[str, ...], options: dict[str, Any], f: Function, *tensors: Tensor) -> Tensor:
    given = dict(zip(names, tensors, strict=True))
    return f(given.pop("input"), given.pop("running_mean", None), given.pop("running_var", None), **given, **options)


def case(
    shape: tuple[int, ...],
    given: str = "weight bias running_mean running_var",
    activation: str | None = "relu",
    *,
    training: bool = True,
    momentum: float | None = 0.1,
    layout: str = "contiguous",
    name: str = "",
    tags: tuple[str, ...] = (),
    modes: tuple[str, ...] = ("fwd", "bwd", "train"),
    devices: tuple[str, ...] = ("cpu", "cuda"),
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
) -> Case:
    names = ("input", *given.split())
    channels, count = shape[1], math.prod(shape[2:], start=shape[0])
    formats = {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d}
    format = torch.contiguous_format if layout == "contiguous" else formats[len(shape)]

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def tensor(name: str) -> Tensor:
            if name in ("input", "residual"):
                return (normal(shape, generator, dtype) + (name == "input")).contiguous(memory_format=format)
            if name == "num_batches_tracked":
                return torch.zeros((), dtype=torch.int64, device=generator.device)
            wide = torch.promote_types(dtype, torch.float32)  # parameters and statistics stay wide beside 16-bit input
            v = normal((channels,), generator, wide)
            return v.abs() / 2 + 0.5 if name in ("weight", "running_var") else v / 2

        return tuple(tensor(n) for n in names)

    residual = "residual" in names

    def traffic(mode: str, itemsize: int) -> int:
        # Tensors of input's size that must cross: statistics read input, then it is read again to be normalised; backward reads
        # input and dy for the sums and again for dx; with a residual it writes that gradient and reads it instead of dy.
        forward = (3 if training else 2) + residual
        backward = (5 if training else 3) + (2 if residual and activation else 0)
        return {"fwd": forward, "bwd": backward, "train": forward + backward}[mode] * count * channels * itemsize

    def flops(mode: str, itemsize: int) -> int:
        forward, backward = (7 if training else 2), (11 if training else 5)
        return {"fwd": forward, "bwd": backward, "train": forward + backward}[mode] * count * channels

    state = [i for i, n in enumerate(names) if n.startswith(("running", "num_batches"))]
    options: dict[str, Any] = {"training": training, "activation": activation} | ({"momentum": momentum} if training else {})
    form = "F.batch_norm" + (".add_" if residual else "") + (f".{activation}_" if activation else "")
    kind = "+".join(["add"] * residual + ([activation] if activation else [])) or "plain"
    written = "x".join(str(n) for n in shape)
    return Case(
        op="batch_norm",
        name=name or f"{written} {kind}{'' if training else ' eval'}{' channels_last' * (layout != 'contiguous')}",
        make=make,
        call=partial(_call, names, options),
        constant=tuple(state) if not training else (),
        state=tuple(state) if training else (),
        shape={"N": shape[0], "C": channels, "S": math.prod(shape[2:])},
        layout=layout,
        modes=modes,
        devices=devices,
        dtypes=dtypes,
        tags=frozenset(tags),
        bytes=traffic,
        flops=flops,
        eager_form=form,
    )


STATS = "running_mean running_var"
SAMPLES = [
    case((4, 3, 2, 2), f"weight bias {STATS} num_batches_tracked", name="2-d, relu"),
    case((4, 3, 2, 2), "weight bias residual", "relu6", name="residual, relu6"),
    case((3, 2, 2, 3), f"weight bias residual {STATS}", None, name="residual"),
    case((6, 3), "", None, name="bare (N, C)"),
    case((4, 3, 5), f"weight {STATS}", name="1-d, weight only"),
    case((3, 2, 2, 1, 2), f"bias {STATS} num_batches_tracked", None, momentum=None, name="3-d, bias only, cumulative"),
    case((4, 3, 2, 2), f"weight bias residual {STATS}", training=False, name="evaluation, residual, relu"),
    case((6, 3), f"weight bias {STATS}", "relu6", training=False, name="evaluation, relu6, (N, C)"),
    case((0, 3, 2, 2), f"weight bias {STATS} num_batches_tracked", name="empty batch"),
    case((3, 17, 3, 5), f"weight bias residual {STATS}", layout="channels_last", name="ragged blocks, channels_last"),
]

GOAL = [(8, 64, 56, 56), (8, 256, 56, 56), (8, 256, 28, 28), (8, 512, 28, 28), (16, 512, 14, 14), (16, 1024, 14, 14)]
# C and H of ResNet-50's batch norms, by what follows them.
RESNET50 = {
    "relu": [(64, 112), (64, 56), (128, 56), (128, 28), (256, 28), (256, 14), (512, 14), (512, 7)],
    "add": [(256, 56), (512, 28), (1024, 14), (2048, 7)],
    "plain": [(256, 56), (512, 28), (1024, 14), (2048, 7)],
}
ALL = f"weight bias {STATS}"


def _rows(n: int, devices: tuple[str, ...]) -> list[Case]:
    rows = []
    for kind, sizes in RESNET50.items():
        for channels, h in sizes:
            if (n, channels, h, h) in GOAL and kind == "relu":
                continue
            for layout in ("contiguous", "channels_last"):
                given, activation = f"{ALL} residual" if kind == "add" else ALL, None if kind == "plain" else "relu"
                rows.append(case((n, channels, h, h), given, activation, layout=layout, devices=devices))
    return rows


CASES = [
    *[
        case(shape, layout=layout, tags=("goal", "quick") if shape == GOAL[0] else ("goal",))
        for shape in GOAL
        for layout in ("contiguous", "channels_last")
    ],
    case((16, 512, 7, 7), tags=("quick",)),
    case((16, 512, 7, 7), layout="channels_last"),
    case((8, 256, 28, 28), f"{ALL} residual", tags=("quick",)),
    case((8, 256, 28, 28), training=False),
    case((8, 256, 28, 28), training=False, layout="channels_last"),
    case((8, 96, 56, 56), activation="relu6"),  # MobileNetV2
    case((8, 96, 56, 56), activation="relu6", layout="channels_last"),
    case((4096, 64, 4, 4)),  # many small images
    case((3136, 256)),
    case((128, 512)),
    case((4, 64, 8, 28, 28)),
    case((8, 16, 8, 8), tags=("overhead",)),
    *_rows(8, ("cpu",)),
    *_rows(256, ("cuda",)),
    *[case(shape, layout=layout, devices=("cuda",)) for shape in ((64, 64, 512, 512), (16, 64, 112, 112, 112)) for layout in
      ("contiguous", "channels_last")],
]  # fmt: skip

_ones, _batch_norm = torch.ones, implementation("batch_norm")
REFUSED = [
    (lambda: _batch_norm(_ones(3), None, None, training=True), IndexError, r"input: expected \(N, C"),
    (lambda: _batch_norm(_ones(2, 3).int(), None, None, training=True), NotImplementedError, "input: expected a floating"),
    (lambda: _batch_norm(_ones(1, 3, 1), None, None, training=True), ValueError, "more than 1 value"),
    (lambda: _batch_norm(_ones(2, 3), None, None, training=True, eps=0.0), ValueError, "eps: expected a positive"),
    (lambda: _batch_norm(_ones(2, 3), _ones(3), _ones(3), eps=-1.0), ValueError, "eps: .* not negative"),
    (lambda: _batch_norm(_ones(2, 3), _ones(3), None, training=True), ValueError, "both or neither"),
    (lambda: _batch_norm(_ones(2, 3), _ones(3), _ones(3), training=True, momentum=None), ValueError, "num_batches_tracked"),
    (lambda: _batch_norm(_ones(2, 3), None, None), RuntimeError, "running_mean and running_var: expected both in evaluation"),
    (lambda: _batch_norm(_ones(2, 3), _ones(2), _ones(2)), RuntimeError, r"running_mean: expected \(3,\)"),
    (lambda: _batch_norm(_ones(2, 3), None, None, _ones(2), training=True), RuntimeError, r"weight: expected \(3,\)"),
    (
        lambda: _batch_norm(_ones(2, 3), None, None, _ones(3).half(), training=True),
        RuntimeError,
        "weight: expected torch.float32",
    ),
    (lambda: _batch_norm(_ones(2, 3), None, None, None, _ones(3).double(), training=True), RuntimeError, "bias: expected"),
    (lambda: _batch_norm(_ones(2, 3), None, None, training=True, residual=_ones(2, 1)), RuntimeError, "residual: expected"),
    (lambda: _batch_norm(_ones(2, 3), None, None, training=True, activation="gelu"), ValueError, "activation: expected None"),
]
