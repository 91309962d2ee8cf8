"""Depthwise-separable convolution, and MobileNet's block of it: functions of several operators.

A depthwise convolution filters each channel, a pointwise (1x1) one mixes them. The pointwise one is a matrix product, which the
vendor's library multiplies; in the block each is followed by batch norm and activation in one operator.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv2d, hardtanh_

from dlaccel.ops._common import described
from dlaccel.ops.batch_norm import batch_norm
from dlaccel.ops.depthwise_conv import depthwise_conv2d


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
) -> Tensor:
    check_pointwise("separable_conv2d", depthwise_weight, pointwise_weight)
    return conv2d(depthwise_conv2d(input, depthwise_weight, None, stride, padding, dilation), pointwise_weight, bias)


def check_pointwise(name: str, depthwise_weight: Tensor, pointwise_weight: Tensor) -> None:
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (depthwise_weight.shape[0], 1, 1):
        raise RuntimeError(
            f"{name}: pointwise_weight: expected (out_channels, {depthwise_weight.shape[0]}, 1, 1) "
            f"for depthwise_weight {tuple(depthwise_weight.shape)}, got {described(pointwise_weight)}"
        )


def folded(
    weight: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has the batch norm behind it inside. Computed in the statistics' dtype."""
    factor = torch.rsqrt(var + eps) if scale is None else scale * torch.rsqrt(var + eps)
    bias = -mean * factor if shift is None else shift - mean * factor
    return (weight * factor.view(-1, 1, 1, 1)).to(weight.dtype), bias.to(weight.dtype)


def activated_(x: Tensor, activation: str) -> Tensor:
    return x.relu_() if activation == "relu" else hardtanh_(x, 0.0, 6.0)


def depthwise_separable_block(
    input: Tensor,
    depthwise_weight: Tensor,
    bn1: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    pointwise_weight: Tensor,
    bn2: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
) -> Tensor:
    """bn1, bn2: weight, bias, running_mean, running_var, num_batches_tracked."""
    name = "depthwise_separable_block"
    if activation not in ("relu", "relu6"):
        raise ValueError(f"{name}: activation: expected 'relu' or 'relu6', got {activation!r}")
    check_pointwise(name, depthwise_weight, pointwise_weight)
    tensors = (input, depthwise_weight, pointwise_weight, *bn1[:4], *bn2[:4])
    if not training and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return folded_block(input, depthwise_weight, bn1, pointwise_weight, bn2, stride, padding, dilation, eps, activation)

    def normalised(x: Tensor, bn: tuple[Tensor | None, ...]) -> Tensor:
        weight, bias, mean, var, count = bn
        return batch_norm(x, mean, var, weight, bias, training, momentum, eps, None, activation, count)

    mid = normalised(depthwise_conv2d(input, depthwise_weight, None, stride, padding, dilation), bn1)
    return normalised(conv2d(mid, pointwise_weight), bn2)


def folded_block(
    input: Tensor,
    depthwise_weight: Tensor,
    bn1: tuple[Tensor | None, ...],
    pointwise_weight: Tensor,
    bn2: tuple[Tensor | None, ...],
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    eps: float,
    activation: str,
) -> Tensor:
    """Inference: both batch norms inside the convolutions, activations in place."""
    pairs = []
    for weight, bn in ((depthwise_weight, bn1), (pointwise_weight, bn2)):
        scale, shift, mean, var, _ = bn
        if mean is None or var is None:
            raise RuntimeError("depthwise_separable_block: running_mean and running_var: expected both in evaluation, got None")
        pairs.append(folded(weight, scale, shift, mean, var, eps))
    mid = activated_(depthwise_conv2d(input, *pairs[0], stride, padding, dilation), activation)
    return activated_(conv2d(mid, *pairs[1]), activation)
