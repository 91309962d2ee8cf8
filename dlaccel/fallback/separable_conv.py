"""Depthwise-separable convolution in plain torch, for any device: two convolutions, activations in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dlaccel.fallback import depthwise_conv
from dlaccel.fallback.batch_norm import activated_
from dlaccel.memory_format import finished, suggests_channels_last

Ints = Sequence[int]


def separable_conv2d(
    x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, pointwise_weight: Tensor, bias: Tensor | None,
    stride: Ints, padding: Ints, dilation: Ints, activation: str | None,
) -> Tensor:  # fmt: skip
    channels_last = any(suggests_channels_last(t) for t in (x, depthwise_weight, pointwise_weight))
    mid = depthwise_conv.depthwise_conv2d(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
    y = torch.conv2d(activated_(mid, activation), pointwise_weight, bias)
    return finished(activated_(y, activation), channels_last)


def explain(name: str, x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, *args: Any) -> str:
    _, _, *options, _ = args
    depthwise = depthwise_conv.explain("depthwise_conv2d", x, depthwise_weight, depthwise_bias, *options)
    return f"{depthwise}, then aten.convolution 1x1"
