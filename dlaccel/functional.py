"""torch-shaped functions. Each runs a registered operator `torch.ops.dlaccel.<name>`: differentiable to any order, known to
autocast, torch.compile, torch.func, export and DTensor. See `dlaccel.explain` for what a call would run on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn._reduction import legacy_get_string

from dlaccel.ops import batch_norm as _batch_norm
from dlaccel.ops import cross_entropy as _cross_entropy
from dlaccel.ops import depthwise_conv as _depthwise_conv
from dlaccel.ops import linear_relu as _linear_relu
from dlaccel.ops import separable_conv as _separable_conv

__all__ = [
    "batch_norm",
    "cross_entropy",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_separable_block",
    "linear_relu",
    "separable_conv2d",
]

for _name in __all__:  # they look at shapes and dtypes: to torch.fx a call is one node
    torch.fx.wrap(_name)


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """`act(torch.nn.functional.batch_norm(...) + residual)` in one operator.

    Per channel, `(input - mean) / sqrt(var + eps) * weight + bias`: in training with the batch's mean and biased variance,
    which also move the running statistics (those with the unbiased variance), otherwise with the running ones.
    Saved for backward: input, the statistics and, with an activation, the result.

    Args:
        input: (N, C, \\*), floating point, any strides.
        running_mean, running_var: (C,), both or neither; updated in place in training, and necessary in evaluation.
        weight, bias: (C,), in input's dtype or, beside 16-bit input, in float32.
        training: whether to use the batch's statistics.
        momentum: the share of the new statistics; None: cumulative average, the share is `1 / num_batches_tracked`. Without
            running statistics it means nothing.
        eps: added to the variance.
        residual: added before the activation; shape and dtype of input.
        activation: None, "relu" or "relu6".
        num_batches_tracked: int64 scalar that a training call counts up first, as `torch.nn.BatchNorm2d` does.

    Returns:
        Shape and dtype of input, in the strides of `torch.empty_like(input)`.

    Raises:
        ValueError: 1 value per channel, eps that is not positive in training, an unknown activation.
        RuntimeError: shapes, dtypes or devices do not match, or no running statistics in evaluation.

    >>> y = batch_norm(torch.randn(8, 64, 28, 28), None, None, torch.ones(64), torch.zeros(64), True, activation="relu")
    """
    return _batch_norm.batch_norm(
        input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation, num_batches_tracked
    )


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    num_items: float | Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`: softmax cross-entropy of logits, for class indices or class probabilities.

    Arguments, results and errors are torch's; docs/ops/cross_entropy.md lists the deviations. 16-bit logits are computed with
    in float32 and rounded once; under autocast they are read as they are.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, ...), floating point, any strides.
        target: classes, input's shape without C, int64 (uint8 up to two dimensions); or probabilities, input's shape.
        weight: (C,), a weight for each class.
        size_average, reduce: deprecated, as in torch.
        ignore_index: a class of this number has loss 0, gradient 0 and no part in the mean. For class indices only.
        reduction: "none", "mean" (over the weights of the targets' classes) or "sum".
        label_smoothing: in [0, 1], how much of the target is spread evenly over the classes.
        num_items: what "mean" divides the sum by instead, a number or a tensor of one element. For gradient accumulation: the
            number of targets that count in all the micro-batches of a step.
        fused: whether forward computes the gradient of input as well, so that a step reads the logits once. It takes the
            memory of the gradient from forward on. Default: on the CPU where that is faster, elsewhere not.

    Returns:
        () or, with reduction "none", target's shape (input's without C), in input's dtype; float32 under autocast.

    Raises:
        IndexError: a target is neither a class nor ignore_index (on the CPU; the Triton kernels make the row's loss and
            gradient NaN, and raise with the environment variable DLACCEL_CHECK=1).
        RuntimeError, ValueError: as torch raises them, for shapes, dtypes, devices and options.

    >>> loss = cross_entropy(torch.randn(32, 10), torch.randint(10, (32,)), label_smoothing=0.1)
    """
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce)
    return _cross_entropy.cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing, num_items, fused)


def depthwise_conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """`torch.nn.functional.conv1d` with one filter, or `multiplier` filters, per channel: groups = C.

    Runs as `depthwise_conv2d` on images of height 1.

    Args:
        input: (N, C, L) or (C, L), floating point, any strides.
        weight: (C * multiplier, 1, K). Output channel o reads input channel o // multiplier.
        bias: (C * multiplier,).
        stride, dilation: at least 1.
        padding: zeros on both sides, or "valid" (none), or "same" (as many outputs as inputs; the odd one on the right).

    Returns:
        (N, C * multiplier, OL) or (C * multiplier, OL), OL = (L + 2 padding - dilation (K - 1) - 1) // stride + 1.

    Raises:
        RuntimeError: shapes do not match, dtypes or devices differ, or the kernel is longer than the padded input.

    >>> y = depthwise_conv1d(torch.randn(2, 8, 100), torch.randn(8, 1, 4), padding="same")
    """
    return _depthwise_conv.depthwise_conv1d(input, weight, bias, stride, padding, dilation)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d` with one filter, or `multiplier` filters, per channel: groups = C.

    Args:
        input: (N, C, H, W) or (C, H, W), floating point, any strides.
        weight: (C * multiplier, 1, KH, KW). Output channel o reads input channel o // multiplier.
        bias: (C * multiplier,).
        stride, dilation: at least 1; one number or (height, width).
        padding: zeros on both sides, one number or (height, width); or "valid" (none); or "same" (as many outputs as
            inputs, stride 1 only; the odd one at the bottom and on the right).

    Returns:
        (N, C * multiplier, OH, OW) or (C * multiplier, OH, OW) in input's dtype (under autocast in autocast's), with
        OH = (H + 2 padding - dilation (KH - 1) - 1) // stride + 1. As in torch it, and the gradients, are in
        channels_last if input or weight is, else contiguous.

    Raises:
        RuntimeError: shapes do not match, dtypes or devices differ, or the kernel is larger than the padded input.

    Where a weight is inf or NaN, the Triton kernels may return NaN at the border, where torch skips the padding.

    >>> y = depthwise_conv2d(torch.randn(2, 8, 28, 28), torch.randn(8, 1, 5, 5), stride=2, padding=2)
    """
    return _depthwise_conv.depthwise_conv2d(input, weight, bias, stride, padding, dilation)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`relu(x @ weight.T + bias)`: `torch.relu(torch.nn.functional.linear(x, weight, bias))` in one operator.

    NaN passes through, -0.0 stays, and the gradient at 0 is 0, as in torch; docs/ops/linear_relu.md lists the deviations. For
    `relu(a @ b)` pass `weight=b.mT`.

    Args:
        x: (\\*, K), floating point, any strides.
        weight: (N, K), the layout of `torch.nn.Linear`.
        bias: (N,).

    Returns:
        (\\*, N), contiguous, in x's dtype (under autocast in autocast's).

    Raises:
        RuntimeError: shapes do not match, dtypes or devices differ, or they are not floating point.

    >>> y = linear_relu(torch.randn(32, 784), torch.randn(512, 784), torch.zeros(512))
    """
    return _linear_relu.linear_relu(x, weight, bias)


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """A depthwise, then a 1x1 convolution, with nothing between: Keras's `SeparableConv2D`.

    `conv2d(depthwise_conv2d(input, depthwise_weight, None, stride, padding, dilation), pointwise_weight, bias)`. Without
    gradients both may run as one kernel on a GPU, which `explain` tells.

    Args:
        input: (N, C, H, W) or (C, H, W), floating point, any strides.
        depthwise_weight: (C * multiplier, 1, KH, KW).
        pointwise_weight: (F, C * multiplier, 1, 1).
        bias: (F,), added after the 1x1 convolution.
        stride, padding, dilation: of the depthwise convolution, as in `depthwise_conv2d`.

    Returns:
        (N, F, OH, OW) or (F, OH, OW).

    Raises:
        RuntimeError: shapes do not match, dtypes or devices differ, or the kernel is larger than the padded input.

    >>> y = separable_conv2d(torch.randn(2, 8, 28, 28), torch.randn(8, 1, 3, 3), torch.randn(16, 8, 1, 1), padding=1)
    """
    return _separable_conv.separable_conv2d(input, depthwise_weight, pointwise_weight, bias, stride, padding, dilation)


def depthwise_separable_block(
    input: Tensor,
    depthwise_weight: Tensor,
    bn1_weight: Tensor | None,
    bn1_bias: Tensor | None,
    bn1_running_mean: Tensor | None,
    bn1_running_var: Tensor | None,
    pointwise_weight: Tensor,
    bn2_weight: Tensor | None,
    bn2_bias: Tensor | None,
    bn2_running_mean: Tensor | None,
    bn2_running_var: Tensor | None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    *,
    bn1_num_batches_tracked: Tensor | None = None,
    bn2_num_batches_tracked: Tensor | None = None,
) -> Tensor:
    """MobileNet's block: depthwise convolution, batch norm, activation, 1x1 convolution, batch norm, activation.

    In training, batch norm and activation are one operator. In evaluation, where no gradient is wanted, the batch norms are
    folded into the convolutions, and both may run as one kernel on a GPU, which `explain` tells. Source: Howard et al.,
    arXiv 1704.04861.

    Args:
        input: (N, C, H, W), floating point, any strides.
        depthwise_weight: (C, 1, KH, KW); or (C * multiplier, 1, KH, KW), and then bn1 has that many channels.
        pointwise_weight: (F, C * multiplier, 1, 1).
        bn1_*, bn2_*: as in `batch_norm`; in training running_mean and running_var (or None) are updated.
        stride, padding, dilation: of the depthwise convolution, as in `depthwise_conv2d`.
        training, momentum, eps: of both batch norms, as in `batch_norm`.
        activation: "relu" or "relu6".

    Returns:
        (N, F, OH, OW).

    Raises:
        RuntimeError: shapes do not match, dtypes or devices differ, or the kernel is larger than the padded input.
        ValueError: activation is unknown, eps is negative (in training, not positive), or training on one value per channel.

    >>> y = depthwise_separable_block(x, dw, w1, b1, mean1, var1, pw, w2, b2, mean2, var2, training=True)
    """
    return _separable_conv.depthwise_separable_block(
        input,
        depthwise_weight,
        (bn1_weight, bn1_bias, bn1_running_mean, bn1_running_var, bn1_num_batches_tracked),
        pointwise_weight,
        (bn2_weight, bn2_bias, bn2_running_mean, bn2_running_var, bn2_num_batches_tracked),
        stride,
        padding,
        dilation,
        training,
        momentum,
        eps,
        activation,
    )
