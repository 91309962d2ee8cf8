"""Depthwise-separable convolution, and MobileNet's block of it.

A depthwise convolution filters each channel, a pointwise (1x1) one mixes them. Where somebody may differentiate, the functions
are made of several operators: the depthwise convolution, the pointwise one, which is a matrix product and the vendor library's,
and in the block batch norm with its activation. For inference on a GPU one operator does both convolutions, and the activations
of a block whose batch norms have been folded into the weights:

    y = act(pointwise(act(depthwise(x) + depthwise_bias)) + bias)

It saves nothing but its arguments and y; its derivatives, for those who call it directly, are made of the several operators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from dlaccel import backend as backends
from dlaccel.fallback.batch_norm import activated_, gate
from dlaccel.memory_format import empty, suggests_channels_last
from dlaccel.ops import depthwise_conv
from dlaccel.ops._autograd import transformed
from dlaccel.ops._common import described, is_compiling, total
from dlaccel.ops._register import Op
from dlaccel.ops.batch_norm import batch_norm, check_given_eps, check_vectors
from dlaccel.ops.depthwise_conv import dgrad_op, large_kernel, output_shape, padding_of, pair, wgrad_op

_convolution_backward = torch.ops.aten.convolution_backward.default
Size = int | Sequence[int]


def check_weights(
    name: str, x: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, bias: Tensor | None, cast: bool = False
) -> None:
    """What the depthwise convolution does not check. cast: autocast, where it is on, will bring all to one dtype."""
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[1:] != (depthwise_weight.shape[0], 1, 1):
        raise RuntimeError(
            f"{name}: pointwise_weight: expected (out_channels, {depthwise_weight.shape[0]}, 1, 1) "
            f"for depthwise_weight {tuple(depthwise_weight.shape)}, got {described(pointwise_weight)}"
        )
    filters = pointwise_weight.shape[:1]
    if bias is not None and bias.shape != filters:
        raise RuntimeError(f"{name}: bias: expected {tuple(filters)}, got {described(bias)}")
    weights = ("depthwise_weight", depthwise_weight), ("pointwise_weight", pointwise_weight), ("bias", bias)
    for argument, t in weights:
        if t is None or (t.dtype == x.dtype and t.device == x.device):
            continue
        if not (cast and torch.is_autocast_enabled(x.device.type)):
            raise RuntimeError(f"{name}: {argument}: expected {x.dtype} on {x.device} like input, got {described(t)}")


def check(
    x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, pointwise_weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], activation: str | None,
) -> None:  # fmt: skip
    depthwise_conv.check(x, depthwise_weight, depthwise_bias, stride, padding, dilation)
    check_weights("separable_conv2d", x, depthwise_weight, pointwise_weight, bias)
    if activation not in (None, "relu", "relu6"):
        raise ValueError(f"separable_conv2d: activation: expected None, 'relu' or 'relu6', got {activation!r}")


# ---- the operator of inference


def fake(
    x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, pointwise_weight: Tensor, bias: Tensor | None,
    stride: list[int], padding: list[int], dilation: list[int], activation: str | None,
) -> Tensor:  # fmt: skip
    n, _, height, width = output_shape(x.shape, depthwise_weight.shape, stride, padding, dilation)
    channels_last = any(suggests_channels_last(t) for t in (x, depthwise_weight, pointwise_weight))
    return empty(x, (n, pointwise_weight.shape[0], height, width), channels_last)


def middle(x: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, options: list[Any]) -> Tensor:
    *geometry, activation = options
    mid: Tensor = depthwise_conv.forward_op(x, depthwise_weight, depthwise_bias, *geometry)
    return activated_(mid, activation)


def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, depthwise_weight, depthwise_bias, pointwise_weight, y = ctx.saved_tensors
    *geometry, activation = ctx.options
    mid = middle(x, depthwise_weight, depthwise_bias, ctx.options)
    dz = gate(dy, y, activation)
    reaches_mid, filters = any(ctx.wanted[:3]), [len(pointwise_weight)]
    mask = [reaches_mid, ctx.wanted[3], ctx.wanted[4]]
    dmid, dpointwise, dbias = _convolution_backward(
        dz, mid, pointwise_weight, filters, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, mask
    )
    if not reaches_mid:
        return None, None, None, dpointwise, dbias
    dmid = gate(dmid, mid, activation)
    options = (*geometry, suggests_channels_last(x) or suggests_channels_last(depthwise_weight))
    return (
        dgrad_op(dmid, depthwise_weight, x.shape, *options) if ctx.wanted[0] else None,
        wgrad_op(dmid, x, depthwise_weight.shape, *options) if ctx.wanted[1] else None,
        dmid.sum((0, 2, 3)) if ctx.wanted[2] else None,
        dpointwise,
        dbias,
    )


def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
    x, depthwise_weight, depthwise_bias, pointwise_weight, y = ctx.saved_tensors
    *geometry, activation = ctx.options
    tx, tdepthwise, tdepthwise_bias, tpointwise, tbias = tangents[:5]
    mid = middle(x, depthwise_weight, depthwise_bias, ctx.options)
    tmid = total(
        None if tx is None else depthwise_conv.forward_op(tx, depthwise_weight, None, *geometry),
        None if tdepthwise is None else depthwise_conv.forward_op(x, tdepthwise, None, *geometry),
        None if tdepthwise_bias is None else tdepthwise_bias.view(-1, 1, 1).expand(mid.shape),
    )
    ty = total(
        None if tmid is None else conv2d(gate(tmid, mid, activation), pointwise_weight),
        None if tpointwise is None else conv2d(mid, tpointwise),
        None if tbias is None else tbias.view(-1, 1, 1).expand(y.shape),
    )
    return None if ty is None else gate(ty, y, activation)


def flops(
    x: Sequence[int], depthwise_weight: Sequence[int], _b: Any, pointwise_weight: Sequence[int], _c: Any,
    stride: list[int], padding: list[int], dilation: list[int], activation: str | None,
) -> int:  # fmt: skip
    n, channels, *size = output_shape(x, depthwise_weight, stride, padding, dilation)
    return 2 * n * channels * math.prod(size) * (math.prod(depthwise_weight[2:]) + pointwise_weight[0])


def shard(x: Any, depthwise_weight: Any, depthwise_bias: Any, pointwise_weight: Any, bias: Any, *options: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    whole = Replicate()
    rows: list[tuple[Any, Any, Any]] = [(whole, whole, whole), (Shard(0), Shard(0), whole), (Shard(1), whole, Shard(0))]
    return [
        (
            [py],
            [
                px, whole, None if depthwise_bias is None else whole, ppointwise, None if bias is None else ppointwise,
                *[None] * len(options),
            ],
        )
        for py, px, ppointwise in rows
    ]  # fmt: skip


forward_op = Op(
    module=__name__,
    schema="separable_conv2d(Tensor x, Tensor depthwise_weight, Tensor? depthwise_bias, Tensor pointwise_weight, Tensor? bias, "
    "int[2] stride, int[4] padding, int[2] dilation, str? activation) -> Tensor",
    check=check,
    fake=fake,
    saved=lambda args, y: (*args[:4], y),
    backward=backward,
    jvp=jvp,
    autocast="lower",
    flops=flops,
    sharding=shard,
    prefers_torch=lambda x, depthwise_weight, *_: large_kernel(depthwise_weight.shape[2:]),
).register()


def inference(*tensors: Tensor | None) -> bool:
    """Whether one operator does the convolutions: nobody differentiates, and an operator gains more than it costs."""
    x = tensors[0]
    if x is None or (backends.forced == "auto" and x.is_cpu):
        return False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    return is_compiling() or not transformed()


# ---- the functions


def separable_conv2d(
    input: Tensor, depthwise_weight: Tensor, pointwise_weight: Tensor, bias: Tensor | None,
    stride: Size, padding: str | Size, dilation: Size,
) -> Tensor:  # fmt: skip
    check_weights("separable_conv2d", input, depthwise_weight, pointwise_weight, bias, cast=True)
    return convolved(input, depthwise_weight, None, pointwise_weight, bias, stride, padding, dilation, None)


def convolved(
    input: Tensor, depthwise_weight: Tensor, depthwise_bias: Tensor | None, pointwise_weight: Tensor, bias: Tensor | None,
    stride: Size, padding: str | Size, dilation: Size, activation: str | None,
) -> Tensor:  # fmt: skip
    """Both convolutions, each followed by the activation: as one operator or as two."""
    weights = depthwise_weight, depthwise_bias, pointwise_weight, bias
    if input.dim() in (3, 4) and inference(input, *weights):
        strides, dilations = pair(stride, "stride"), pair(dilation, "dilation")
        options = strides, padding_of(padding, depthwise_weight.shape[2:], strides, dilations), dilations, activation
        y: Tensor = forward_op(input.unsqueeze(0) if input.dim() == 3 else input, *weights, *options)
        return y.squeeze(0) if input.dim() == 3 else y
    mid = depthwise_conv.depthwise_conv2d(input, depthwise_weight, depthwise_bias, stride, padding, dilation)
    return activated_(conv2d(activated_(mid, activation), pointwise_weight, bias), activation)


def folded(
    weight: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that has the batch norm behind it inside. Computed in the statistics' dtype."""
    factor = torch.rsqrt(var + eps) if scale is None else scale * torch.rsqrt(var + eps)
    bias = -mean * factor if shift is None else shift - mean * factor
    return (weight * factor.view(-1, 1, 1, 1)).to(weight.dtype), bias.to(weight.dtype)


def depthwise_separable_block(
    input: Tensor,
    depthwise_weight: Tensor,
    bn1: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    pointwise_weight: Tensor,
    bn2: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    stride: Size,
    padding: str | Size,
    dilation: Size,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: str,
) -> Tensor:
    """bn1, bn2: weight, bias, running_mean, running_var, num_batches_tracked."""
    name = "depthwise_separable_block"
    if activation not in ("relu", "relu6"):
        raise ValueError(f"{name}: activation: expected 'relu' or 'relu6', got {activation!r}")
    if input.dim() != 4:
        raise RuntimeError(f"{name}: input: expected (N, C, H, W), got {described(input)}")
    check_weights(name, input, depthwise_weight, pointwise_weight, None, cast=True)
    tensors = (input, depthwise_weight, pointwise_weight, *bn1[:4], *bn2[:4])
    if not training and not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return folded_block(input, depthwise_weight, bn1, pointwise_weight, bn2, stride, padding, dilation, eps, activation)

    def normalised(x: Tensor, bn: tuple[Tensor | None, ...]) -> Tensor:
        weight, bias, mean, var, count = bn
        return batch_norm(x, mean, var, weight, bias, training, momentum, eps, None, activation, count)

    mid = normalised(depthwise_conv.depthwise_conv2d(input, depthwise_weight, None, stride, padding, dilation), bn1)
    return normalised(conv2d(mid, pointwise_weight), bn2)


def folded_block(
    input: Tensor,
    depthwise_weight: Tensor,
    bn1: tuple[Tensor | None, ...],
    pointwise_weight: Tensor,
    bn2: tuple[Tensor | None, ...],
    stride: Size,
    padding: str | Size,
    dilation: Size,
    eps: float,
    activation: str,
) -> Tensor:
    """Inference: both batch norms inside the convolutions."""
    check_given_eps("depthwise_separable_block", eps)
    pairs = []
    for name, weight, bn in (("bn1", depthwise_weight, bn1), ("bn2", pointwise_weight, bn2)):
        scale, shift, mean, var, _ = bn
        if mean is None or var is None:
            raise RuntimeError("depthwise_separable_block: running_mean and running_var: expected both in evaluation, got None")
        check_vectors(f"depthwise_separable_block: {name}_", weight, weight.shape[0], bn[:4])
        pairs.append(folded(weight, scale, shift, mean, var, eps))
    return convolved(input, *pairs[0], *pairs[1], stride, padding, dilation, activation)
