"""FlagGems (Apache-2.0): Triton kernels behind aten's signatures. Not yet run on a GPU.

Its batch norm is a forward and a backward without autograd between them, so only the forward is compared.
"""

import torch
from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import importable, need, pick

NAME = "flag_gems"
DISTRIBUTION = "flag-gems"
DEVICES = ("cuda",)


def available() -> str | None:
    return importable("flag_gems")


def implementation(case: Case) -> Function:
    return pick(
        case, linear_relu=linear_relu, cross_entropy=cross_entropy, batch_norm=batch_norm, depthwise_conv2d=depthwise_conv2d
    )


def _forward_only() -> None:
    need(not torch.is_grad_enabled(), "has no autograd here")


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from flag_gems import ops

    _forward_only()
    need(bias is not None and x.dim() == 2, "takes a matrix and a bias")
    y: Tensor = ops.relu_(ops.addmm(bias, x, weight.t()))
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
    from flag_gems.fused import cross_entropy_loss

    need(num_items is None and size_average is None and reduce is None, "has no such option")
    loss: Tensor = cross_entropy_loss(input, target, weight, reduction, ignore_index, label_smoothing)
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
    from flag_gems import ops

    _forward_only()
    need(activation in (None, "relu"), "has no relu6 in place")
    need(num_batches_tracked is None, "has no cumulative average")
    y: Tensor = ops.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]
    y = y if residual is None else ops.add(y, residual)
    return y if activation is None else ops.relu_(y)  # type: ignore[no-any-return]


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
) -> Tensor:
    from flag_gems import ops

    y: Tensor = ops.conv2d(input, weight, bias, stride, padding, dilation, input.shape[1])
    return y
