"""attorch (MIT), from a checkout that DLACCEL_ATTORCH names: it is on no package index. Not yet run on a GPU.

Under Triton's interpreter its kernels run with their first configuration (autotuning cannot time there).
"""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import importable, need, pick

NAME = "attorch"
TRITON = True


def available() -> str | None:
    folder = os.environ.get("DLACCEL_ATTORCH")
    if not folder:
        return "set DLACCEL_ATTORCH to a checkout of github.com/BobMcDear/attorch"
    if folder not in sys.path:
        sys.path.append(folder)
    if os.environ.get("TRITON_INTERPRET") == "1":
        _prepare_interpreter()
    return importable("attorch")


def _prepare_interpreter() -> None:
    import triton

    triton.autotune = _first_configuration
    if not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda *_: (9, 0)  # asked for at import, to decide on TF32


def _first_configuration(configs: list[Any], key: list[str], **_: Any) -> Callable[[Any], Any]:
    class Launcher:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *args, **options: self.kernel[grid](*args, **{**configs[0].kwargs, **options})

    return Launcher


def implementation(case: Case) -> Function:
    return pick(
        case, linear_relu=linear_relu, cross_entropy=cross_entropy, batch_norm=batch_norm, depthwise_conv2d=depthwise_conv2d
    )


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from attorch.linear_layer import LinearAutoGrad

    need(x.dim() >= 2, "takes batches only")
    y: Tensor = LinearAutoGrad.apply(x, weight.t(), bias, "relu")
    return y


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
    num_items: int | Tensor | None = None,
) -> Tensor:
    from attorch.cross_entropy_loss_layer import CrossEntropyLossAutoGrad

    options = reduction == "mean" and label_smoothing == 0 and num_items is None and size_average is None and reduce is None
    need(input.dim() == 2, "takes (N, C) only")
    need(options and not target.is_floating_point(), "has the mean over class indices only")
    loss: Tensor = CrossEntropyLossAutoGrad.apply(input, target, weight)
    return loss


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
    from attorch.batch_norm_layer import BatchNormAutoGrad

    need(num_batches_tracked is None, "has no cumulative average")
    track = running_mean is not None
    arguments = (input, training, weight, bias, running_mean, running_var, momentum, eps, track, residual, activation)
    y: Tensor = BatchNormAutoGrad.apply(*arguments)
    return y


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    from attorch.conv_layer import Conv2dAutoGrad

    need(dilation in (1, (1, 1)) and not isinstance(padding, str), "has no dilation and no padding by name")
    pairs = [v if isinstance(v, tuple) else (v, v) for v in (stride, padding)]
    y: Tensor = Conv2dAutoGrad.apply(input, weight, bias, *pairs[0], *pairs[1], input.shape[1])
    return y
