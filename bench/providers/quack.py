"""quack-kernels (Apache-2.0): CuTe DSL kernels for Hopper and newer. Not yet run on a GPU."""

import torch
from torch import Tensor

from dlaccel.bench.case import Case, Function
from dlaccel.bench.provider import importable, need, pick

NAME = "quack"
DISTRIBUTION = "quack-kernels"
DEVICES = ("cuda",)


def available() -> str | None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        return "needs a GPU of compute capability 9.0 or newer"
    return importable("quack")


def implementation(case: Case) -> Function:
    return pick(case, linear_relu=linear_relu, cross_entropy=cross_entropy)


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    from quack.linear import linear_act_func

    need(not torch.is_grad_enabled(), "only the value before the activation is differentiable")
    y: Tensor = linear_act_func(x, weight, "relu", bias, store_preact=False)[1]
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
    from quack.cross_entropy import cross_entropy as function

    need(input.dim() == 2 and not target.is_floating_point(), "takes (N, C) logits and class indices only")
    need(label_smoothing == 0 and num_items is None and size_average is None and reduce is None, "has no such option")
    loss: Tensor = function(input, target, weight=weight, ignore_index=ignore_index, reduction=reduction)
    return loss
