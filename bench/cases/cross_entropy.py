"""cross_entropy: what is checked and timed. Sizes are rows x classes; rows of (N, C, H, W) logits are positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench.case import Case, implementation, normal

EAGER = "F.cross_entropy(x, target)"


def eager(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(input, target, weight, **options)


def reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    x = input.movedim(1, -1) if input.dim() > 1 else input
    classes, q = x.shape[-1], target
    if target.shape == input.shape:
        q = q.movedim(1, -1) if q.dim() > 1 else q
        valid = torch.ones_like(q[..., 0], dtype=torch.bool)
    else:
        valid = q != ignore_index
        q = (torch.where(valid, q, 0).unsqueeze(-1) == torch.arange(classes, device=q.device)).to(x.dtype)
    w = x.new_ones((classes,)) if weight is None else weight
    log_p = x - torch.logsumexp(x, -1, keepdim=True)
    if target.shape != input.shape and not label_smoothing:
        log_p = torch.where(q > 0, log_p, 0)  # a class that is not the target does not count, even where its logit is -inf
    smoothed = q * (1 - label_smoothing) + label_smoothing / classes
    rows = torch.where(valid, -(w * smoothed * log_p).sum(-1), 0)
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if target.shape == input.shape:
        return rows.sum() / rows.numel()
    return rows.sum() / torch.where(valid, (w * q).sum(-1), 0).sum()


def case(
    shape: tuple[int, ...],
    *,
    probabilities: bool = False,
    weight: bool = False,
    ignored: bool = False,
    name: str = "",
    layout: str = "contiguous",
    tags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
    **options: Any,
) -> Case:
    """ignored: every second target is ignore_index."""
    classes = shape[0] if len(shape) == 1 else shape[1]
    positions = shape[:1] + shape[2:] if len(shape) > 1 else ()
    rows = math.prod(positions)

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = normal(shape, generator, dtype)
        if layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        if probabilities:
            target = torch.softmax(normal(shape, generator, torch.float32), 0 if len(shape) == 1 else 1).to(dtype)
        else:
            target = torch.randint(max(classes, 1), positions, generator=generator, device=generator.device)
            if ignored:
                target.view(-1)[::2] = options.get("ignore_index", -100)
        if not weight:
            return x, target
        weights = torch.rand(classes, generator=generator, device=generator.device) + 0.5
        return x, target, weights.to(dtype)

    def call(f: Any, *tensors: Tensor) -> Tensor:
        loss: Tensor = f(*tensors, **options)
        return loss

    def traffic(mode: str, itemsize: int) -> int:
        logits = rows * classes * itemsize
        targets = logits if probabilities else 8 * rows
        forward, backward = logits + targets, 2 * logits + targets
        # A step may read the logits once: forward can write the gradient.
        return {"fwd": forward, "bwd": backward, "train": 2 * logits + targets}[mode]

    described = [k if v is True else f"{k}={v}" for k, v in options.items()]
    described += [k for k, v in (("weights", weight), ("probabilities", probabilities), ("half ignored", ignored)) if v]
    size = f"{rows}x{classes}" if len(shape) == 2 else "x".join(map(str, shape))
    return Case(
        op="cross_entropy", name=name or " ".join([size, *described]) + (f" {layout}" if layout != "contiguous" else ""),
        make=make, call=call, constant=(2,), shape={"R": rows, "C": classes}, layout=layout, devices=devices,
        tags=frozenset(tags), bytes=traffic, eager_form=EAGER,
    )  # fmt: skip


SAMPLES = [
    case((5, 7), name="mean"),
    case((6, 7), name="ignored rows", ignored=True),
    case((5, 7), name="none, weights", weight=True, reduction="none"),
    case((6, 7), name="sum, weights, smoothing, ignored", weight=True, ignored=True, reduction="sum", label_smoothing=0.2),
    case((6, 5), name="mean, weights, ignored class", weight=True, ignored=True, ignore_index=1),
    case((2, 3, 4, 2), name="images, none", reduction="none"),
    case((2, 3, 5), name="sequences, smoothing, ignored", ignored=True, label_smoothing=0.1),
    case((7,), name="unbatched"),
    case((4, 1), name="one class"),
    case((0, 7), name="empty batch, sum", reduction="sum"),
    case((5, 7), name="probabilities", probabilities=True),
    case((5, 7), name="probabilities, weights, smoothing", probabilities=True, weight=True, label_smoothing=0.2),
    case((2, 3, 4, 2), name="probabilities, images, none", probabilities=True, reduction="none"),
    case((19, 70), name="ragged blocks"),
]

GOAL = [(65536, 10), (65536, 100), (8192, 1000), (1024, 32000), (128, 128256)]
ON_A_GPU = [
    (1048576, 10), (1048576, 100), (65536, 1000), (16384, 4096), (8192, 32000), (8192, 50257), (8192, 128256),
    (4096, 256000), (256, 1000), (4096, 1000),
]  # fmt: skip

CASES = [
    *[case(shape, tags=("goal", "quick") if shape[1] in (10, 1000) else ("goal",)) for shape in GOAL],
    case((32, 10), tags=("overhead",)),
    case((2048, 4096)),
    case((512, 50257)),
    case((64, 256000)),
    case((8192, 1000), reduction="none"),
    case((8192, 1000), label_smoothing=0.1),
    case((8192, 1000), weight=True, ignored=True),
    case((8192, 1000), probabilities=True),
    case((8, 21, 128, 128)),
    case((8, 21, 128, 128), layout="channels_last"),
    *[case(shape, devices=("cuda",)) for shape in ON_A_GPU],
    case((8192, 32000), label_smoothing=0.1, devices=("cuda",)),
    case((8192, 32000), reduction="none", devices=("cuda",)),
    case((8192, 32000), probabilities=True, devices=("cuda",)),
    case((8192, 128256), ignored=True, devices=("cuda",)),
    case((16, 150, 512, 512), devices=("cuda",)),
    case((16, 150, 512, 512), layout="channels_last", devices=("cuda",)),
]

_zeros, _ones = torch.zeros, torch.ones
_cross_entropy = implementation("cross_entropy")
REFUSED = [
    (lambda: _cross_entropy(_ones(4, 3), _zeros(2).long()), ValueError, r"batch_size \(4\) to match target batch_size \(2\)"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4, 1).long()), RuntimeError, "multi-target not supported"),
    (lambda: _cross_entropy(_ones(4, 3, 2), _zeros(4, 3).long()), RuntimeError, r"Expected target size \[4, 2\]"),
    (lambda: _cross_entropy(_ones(3), _zeros(2).long()), ValueError, "For 1D input, 1D target must have size 1"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4).int()), RuntimeError, "expected target dtype to be Long or Byte"),
    (lambda: _cross_entropy(_ones(4, 3, 2), _zeros(4, 2).byte()), RuntimeError, "expected target dtype to be Long or Byte"),
    (lambda: _cross_entropy(_ones(4, 3), _ones(4, 3).long()), RuntimeError, "Expected floating point type for target"),
    (lambda: _cross_entropy(_ones(4, 3).long(), _zeros(4).long()), NotImplementedError, "floating-point"),
    (lambda: _cross_entropy(_ones(4, 3), _ones(4, 3), ignore_index=1), RuntimeError, "ignore_index is not supported"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4).long(), _ones(4)), RuntimeError, "either for all 3 classes or no classes"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4).long(), _ones(3).double()), RuntimeError, "weight: expected scalar type"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4).long(), label_smoothing=1.5), RuntimeError, "label_smoothing must be"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4).long(), reduction="all"), ValueError, "not a valid value for reduction"),
    (lambda: _cross_entropy(_ones(4, 3), _zeros(4).long().to("meta")), RuntimeError, "target: expected it on cpu"),
]  # fmt: skip
