"""cuDNN, also where eager would choose a kernel of torch's own. Not yet run on a GPU.

Depthwise convolutions in contiguous tensors mostly go to torch's own kernels (`use_cudnn_depthwise`, aten's Convolution.cpp).
From torch 2.13 a switch sends them to cuDNN, gradients included; before it only the forward can be asked for.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import conv2d, relu, relu6

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import need, pick, switched

NAME = "cudnn"
DISTRIBUTION = "torch"
DEVICES = ("cuda",)


def available() -> str | None:
    return None if torch.cuda.is_available() and torch.backends.cudnn.is_available() else "no CUDA device with cuDNN"


def implementation(case: Case) -> Function:
    return pick(case, batch_norm=batch_norm, depthwise_conv2d=depthwise_conv2d, separable_conv2d=separable_conv2d)


def has_switch() -> bool:
    return hasattr(torch.backends.cudnn, "depthwise_kernel")


def context() -> AbstractContextManager[Any]:
    return switched(torch.backends.cudnn, depthwise_kernel="cudnn") if has_switch() else nullcontext()


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
    need(weight is not None and bias is not None and input.dim() > 2, "needs weight, bias and at least 3 dimensions")
    need(num_batches_tracked is None, "has no cumulative average")
    arguments = (input, weight, bias, running_mean, running_var, training, momentum, eps)
    y: Tensor = torch.ops.aten.cudnn_batch_norm(*arguments)[0]
    if residual is not None:
        y = y + residual
    return y if activation is None else {"relu": relu, "relu6": relu6}[activation](y)


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    if has_switch():
        return conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])
    need(not isinstance(padding, str), "cudnn_convolution takes no padding by name")
    channels_last = input.is_contiguous(memory_format=torch.channels_last)  # always cuDNN's
    need(channels_last or not torch.is_grad_enabled(), "this torch has no switch for the gradients of contiguous tensors")
    pairs = [list(v) if isinstance(v, tuple) else [v, v] for v in (padding, stride, dilation)]
    flags: Any = torch.backends.cudnn
    tail = (flags.benchmark, flags.deterministic, flags.conv.fp32_precision == "tf32")
    y: Tensor = torch.ops.aten.cudnn_convolution(input, weight, *pairs, input.shape[1], *tail)
    return y if bias is None else y + bias.view(-1, 1, 1)


def separable_conv2d(
    input: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    return conv2d(depthwise_conv2d(input, depthwise_weight, None, stride, padding, dilation), pointwise_weight, bias)
