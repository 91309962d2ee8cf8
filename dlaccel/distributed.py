"""Batch norm over the processes of a group: what `dlaccel.nn.SyncBatchNorm` runs in training.

Forward: each process takes the mean and the sum of squared deviations of its part; one all_gather, then every process merges
them in the order of the ranks, in float64 (Chan, Golub and LeVeque 1979). Backward: one all_reduce of two sums per channel.
Parts may differ in size or be empty; nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from dlaccel import backend
from dlaccel.fallback.batch_norm import statistics_dtype
from dlaccel.ops._register import REGISTRY
from dlaccel.ops.batch_norm import backward_op, check_common, inference_op


class _Synchronised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running_mean: Tensor | None, running_var: Tensor | None, momentum: float | Tensor, eps: float,
        activation: str | None, group: dist.ProcessGroup,
    ) -> Tensor:  # fmt: skip
        channels, wide = x.shape[1], statistics_dtype(x)
        declaration = REGISTRY["batch_norm_inference"]
        chosen = backend.choose(declaration, (x, weight, bias, residual, x, x, eps, activation))
        mean, deviations = declaration.floor(chosen).statistics(x)
        mine = torch.cat([mean, deviations, mean.new_full((1,), x.numel() // max(channels, 1))])
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(all_ranks, mine, group)
        means, deviations, counts = torch.stack(all_ranks).split([channels, channels, 1], 1)
        count = counts.sum().clamp_min(1)
        mean = (counts * means).sum(0) / count
        var = (deviations + counts * (means - mean).square()).sum(0) / count
        if running_mean is not None and running_var is not None:
            unbiased = var * (count / (count - 1).clamp_min(1))
            for running, new in ((running_mean, mean), (running_var, unbiased)):
                running.copy_(torch.where(counts.sum() > 0, running * (1 - momentum) + new * momentum, running))
        mean, var = mean.to(wide), var.to(wide)
        y: Tensor = inference_op(x, weight, bias, residual, mean, var, eps, activation)
        recomputable = activation is not None and residual is None
        ctx.save_for_backward(
            x, weight, bias if recomputable else None, mean, var, count, y if activation is not None else None
        )
        ctx.options = eps, activation, group
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias, mean, var, count, y = ctx.saved_tensors
        eps, activation, group = ctx.options
        wants_x, wants_weight, wants_bias, wants_residual = ctx.needs_input_grad[:4]
        w = torch.ones_like(mean) if weight is None else weight.to(mean.dtype)
        mask = [False, wants_x or wants_weight, wants_x or wants_bias, wants_residual and activation is not None]
        _, dweight, dbias, dresidual = backward_op(dy, x, w, bias, mean, var, y, False, eps, activation, mask)
        if wants_residual and activation is None:
            dresidual = dy
        dx = None
        if wants_x:
            sums = torch.stack([dbias, dweight])  # those of this process are its parameters' gradients: users average them
            dist.all_reduce(sums, group=group)
            declaration = REGISTRY["batch_norm_backward"]
            floor = declaration.floor(backend.choose(declaration, (dy, x)))
            if dresidual is not None:  # it is the gradient in front of the activation
                dy, bias, y, activation = dresidual, None, None, None
            dx = floor.projected(dy, x, w, bias, mean, var, y, *(sums / count).to(mean.dtype), eps, activation)
        like = mean if weight is None else weight
        return (
            dx,
            dweight.to(like.dtype) if wants_weight else None,
            dbias.to(like.dtype) if wants_bias else None,
            dresidual,
            *[None] * 6,
        )


def sync_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    momentum: float | None, eps: float, group: dist.ProcessGroup,
    *, residual: Tensor | None = None, activation: str | None = None, num_batches_tracked: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`dlaccel.functional.batch_norm` in training, with the statistics of all processes of `group`.

    Every process of the group must make the call, and the backward pass, also with an empty input. Differentiable once.
    """
    check_common(input, weight, bias, residual, running_mean, running_var, activation)
    if eps <= 0:
        raise ValueError(f"sync_batch_norm: eps: expected a positive number during training, got {eps}")
    share: float | Tensor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        share = num_batches_tracked.reciprocal() if momentum is None else momentum
    apply: Any = _Synchronised.apply
    y: Tensor = apply(input, weight, bias, residual, running_mean, running_var, share, eps, activation, group)
    return y
