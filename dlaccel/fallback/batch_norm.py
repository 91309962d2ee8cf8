"""batch_norm in plain torch, for any device.

aten's statistics of a contiguous float32 NCHW tensor run at a fifth of the memory's rate. Group norm's backward sums at the
full rate, so on the CPU it gives the sums of short runs of a channel, which are merged in float64. Work goes through the batch
in pieces that stay in the cache. Other dtypes and layouts keep aten's own statistics.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_native = torch.native_batch_norm
_native_backward = aten.native_batch_norm_backward.default
_group_norm_backward = aten.native_group_norm_backward.default

PIECE = 1 << 20  # bytes that stay in a core's cache
LARGE = 8 << 20  # bytes above which a second pass over a tensor comes from memory
LEAST = 3 << 18  # elements below which calls from Python cost more than aten's statistics
SHORTEST, RUN = 16, 256  # values summed in float32
# Above these ratios |mean| / standard deviation, sums of squares and group norm's statistics are less accurate than aten's.
NEAR, FAR = 2.0, 5.0


WIDE = {torch.float64: torch.float64}  # the dtype of statistics, where it is not float32


def statistics_dtype(x: Tensor) -> torch.dtype:
    return WIDE.get(x.dtype, torch.float32)


def gate(dy: Tensor, y: Tensor | None, activation: str | None) -> Tensor:
    """The gradient in front of the activation, from its output: 0 where it clips, and a NaN output passes it, as in aten."""
    if activation is None:
        return dy
    dz: Tensor = aten.threshold_backward(dy, y, 0) if activation == "relu" else aten.hardtanh_backward(dy, y, 0, 6)
    return dz


def activated_(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else y.relu_() if activation == "relu" else torch.nn.functional.hardtanh_(y, 0, 6)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors cut along the batch, about PIECE bytes of the first at a time."""
    first = tensors[0]
    step = max(1, PIECE * first.shape[0] // max(first.nbytes, 1))
    return zip(*(t.split(step) for t in tensors), strict=True)


def _laid_out_like(x: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of empty_like(x): a copy only where aten has lost x's layout."""
    if value.stride() == x.stride():  # then x is dense
        return value
    like = torch.empty_like(x)
    return value if value.stride() == like.stride() else like.copy_(value)


def _finish(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    """act(y + residual), in place."""
    if residual is None:
        activated_(y, activation)
    elif activation is None or not y.is_cpu or y.nbytes <= LARGE:
        activated_(y.add_(residual), activation)
    else:
        for y_piece, residual_piece in _pieces(y, residual):
            activated_(y_piece.add_(residual_piece), activation)
    return y


def is_dense(x: Tensor) -> bool:
    """Whether x is contiguous in one of the two memory formats."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """act((x - mean) / sqrt(var + eps) * weight + bias + residual) for given statistics."""
    if not (x.is_cpu and x.nbytes > LARGE and is_dense(x)):
        y = _native(x, weight, bias, mean, var, False, 0.0, eps)[0]
        return _finish(_laid_out_like(x, y), residual, activation)
    y = torch.empty_like(x)
    nothing = mean.new_empty(0), mean.new_empty(0)
    for x_piece, y_piece, *rest in _pieces(x, y, *([] if residual is None else [residual])):
        _native(x_piece, weight, bias, mean, var, False, 0.0, eps, out=(y_piece, *nothing))
        if rest:
            y_piece.add_(rest[0])
        activated_(y_piece, activation)
    return y


def _parameters(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Everything that aten should take in the statistics' dtype; with a weight, or aten would round them to x's."""
    dtype = statistics_dtype(x)
    if x.dtype == dtype:
        return tensors
    weight, *rest = (t if t is None or t.dtype == dtype else t.to(dtype) for t in tensors)
    return x.new_ones(x.shape[1], dtype=dtype) if weight is None else weight, *rest


def uses_group_norm(x: Tensor) -> bool:
    return (
        x.numel() >= LEAST and x.dtype == torch.float32 and x.is_cpu and x.dim() > 2 and x.is_contiguous()
        and math.prod(x.shape[2:]) >= SHORTEST
    )  # fmt: skip


@functools.cache
def _run(size: int) -> int:
    """The longest run of up to RUN values that size is a multiple of, or 0."""
    return max((d for d in range(SHORTEST, RUN + 1) if size % d == 0), default=0)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and biased variance per channel in float64, or None where they would not be as accurate as aten's."""
    size = math.prod(x.shape[2:])
    run = _run(size)
    mean, var = _from_sums(x, run) if run else _centred(x)
    if _within(NEAR if run else FAR, mean, var):
        return mean, var
    return _centred(x) if run and size >= 64 and _within(FAR, mean, var) else None


def _from_sums(x: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """Mean and variance from the sums of x and x^2. Group norm's backward sums dy and dy x, for each of its channels a run."""
    runs = x.view(1, -1, run)
    count = runs.shape[1]
    zeros, ones = x.new_zeros(1, count), x.new_ones(1, count)
    wanted = [False, True, True]
    _, squares, sums = _group_norm_backward(runs, runs, zeros, ones, ones[0], 1, count, run, count, wanted)
    of_channel, values = (len(x), x.shape[1], -1), x.numel() // x.shape[1]
    mean = sums.view(of_channel).sum((0, 2), dtype=torch.float64).div_(values)
    return mean, squares.view(of_channel).sum((0, 2), dtype=torch.float64).div_(values).sub_(mean.square())


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same from group norm's forward, which subtracts means: accurate farther from zero, at three times the cost."""
    channels, size = x.shape[1], math.prod(x.shape[2:])
    means, rstds = [], []
    for (piece,) in _pieces(x):
        _, mean, rstd = torch.native_group_norm(piece, None, None, piece.shape[0], channels, size, channels, 0.0)
        means.append(mean)
        rstds.append(rstd)
    of_samples = torch.cat(means).double()
    mean = of_samples.mean(0)
    within = torch.cat(rstds).double().square_().reciprocal_()
    return mean, of_samples.sub_(mean).square_().add_(within).mean(0)


def _within(ratio: float, mean: Tensor, var: Tensor) -> bool:
    """Whether |mean| is at most so many standard deviations in every channel; False also for NaN and what overflows."""
    return bool((mean.square() <= var * ratio**2).all()) and math.isfinite(var.sum())


def _update(running: Tensor, new: Tensor, momentum: Any) -> None:
    if isinstance(momentum, float):
        running.mul_(1 - momentum).add_(new, alpha=momentum)
    else:
        running.mul_(1 - momentum).add_(new * momentum)


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    momentum: float | None, eps: float, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = statistics_dtype(x)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if x.numel() == 0:
        return torch.empty_like(x), x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    w, b = _parameters(x, weight, bias)
    factor: Any = momentum
    if momentum is None and running_mean is not None:
        # Cumulative; away from the CPU as a tensor, for reading the counter would wait for the device.
        assert num_batches_tracked is not None
        factor = 1 / int(num_batches_tracked) if x.is_cpu else num_batches_tracked.reciprocal()

    statistics = _statistics(x) if uses_group_norm(x) else None
    if statistics is not None:
        mean, var = statistics
        if running_mean is not None and running_var is not None:
            count = x.numel() // x.shape[1]
            _update(running_mean, mean, factor)
            _update(running_var, var * (count / (count - 1)), factor)
        rstd = (var + eps).rsqrt_().to(dtype)
        mean, var = mean.to(dtype), var.to(dtype)
        return _normalise(x, w, b, residual, mean, var, eps, activation), mean, rstd

    if running_mean is None or running_var is None:
        y, mean, rstd = _native(x, w, b, None, None, True, 0.0, eps)
    elif running_mean.dtype == dtype and isinstance(factor, float):
        y, mean, rstd = _native(x, w, b, running_mean, running_var, True, factor, eps)
    else:
        new_mean, new_var = (torch.zeros_like(running_mean, dtype=dtype) for _ in range(2))
        y, mean, rstd = _native(x, w, b, new_mean, new_var, True, 1.0, eps)
        _update(running_mean, new_mean, factor)
        _update(running_var, new_var, factor)
    return _finish(_laid_out_like(x, y), residual, activation), mean, rstd


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations per channel, in float64; zeros of an empty tensor."""
    if x.numel() == 0:
        return x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros(x.shape[1], dtype=torch.float64)
    over = [d for d in range(x.dim()) if d != 1]
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), over, correction=0)
    return mean.double(), var.double() * (x.numel() // x.shape[1])


def batch_norm_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    if x.numel() == 0:
        return torch.empty_like(x)
    w, b, m, v = _parameters(x, weight, bias, mean, var)
    assert m is not None and v is not None
    return _normalise(x, w, b, residual, m, v, eps, activation)


def batch_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd_or_var: Tensor,
    y: Tensor | None, training: bool, eps: float, activation: str | None, mask: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    like = mean if weight is None else weight
    if x.numel() == 0:
        dx, dweight, dbias, dresidual = (
            torch.zeros_like(t) if m else None for t, m in zip((x, like, like, x), mask, strict=True)
        )
        return dx, dweight, dbias, dresidual
    dz = gate(dy, y, activation)
    gradients: Any = None, None, None
    if any(mask[:3]):
        w, m, v = _parameters(x, weight, mean, rstd_or_var)
        gradients = _native_backward(dz, x, w, m, v, m, v, training, eps, mask[:3])  # reads one of the two pairs
    return (
        _laid_out_like(x, gradients[0]) if mask[0] else None,
        gradients[1].to(like.dtype) if mask[1] else None,
        gradients[2].to(like.dtype) if mask[2] else None,
        _laid_out_like(x, dz.clone() if dz is dy else dz) if mask[3] else None,
    )


def projected(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, y: Tensor | None,
    of_mean: Tensor, of_x_hat: Tensor, eps: float, activation: str | None,
) -> Tensor:  # fmt: skip
    """dx = weight rstd (g - of_mean - x_hat of_x_hat), g the gradient in front of the activation: training, with given sums."""
    if x.numel() == 0:
        return torch.empty_like(x)
    scale = (var + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    dx = _native(x, -of_x_hat * scale, -of_mean * scale, mean, var, False, 0.0, eps)[0]
    return _laid_out_like(x, dx.addcmul_(gate(dy, y, activation), scale.view(1, -1, *[1] * (x.dim() - 2))))


def explain(name: str, *args: Any) -> str:
    x: Tensor = args[0]
    if name == "batch_norm" and uses_group_norm(x):
        return "sums by aten's group norm merged in float64, aten's batch norm with them, activation in place"
    return "aten's batch norm" + (", residual and activation in place" if name != "batch_norm_backward" else " backward")
