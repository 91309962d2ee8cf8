"""linear_relu: y = relu(x @ weight.T + bias), x (*, K), weight (N, K), bias (N,), y (*, N)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dlaccel import backend as _backend
from dlaccel.fallback import linear_relu as fallback
from dlaccel.ops._common import FLOATS, as_2d, at_front, described, is_compiling, total
from dlaccel.ops._register import Op

_threshold_backward = torch.ops.aten.threshold_backward.default


def gate(grad: Tensor, y: Tensor) -> Tensor:
    """The gradient in front of the ReLU, from its output: 0 where it clips, and a NaN output passes it, as in aten."""
    result: Tensor = _threshold_backward(grad, y, 0)
    return result


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2:
        raise RuntimeError(f"linear_relu: weight: expected (N, K), got {described(weight)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"linear_relu: x: expected (*, {weight.shape[1]}) for weight {tuple(weight.shape)}, got {described(x)}"
        )
    if x.dtype not in FLOATS:
        raise RuntimeError(f"linear_relu: x: expected a floating-point tensor, got {described(x)}")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise RuntimeError(f"linear_relu: weight: expected {x.dtype} on {x.device} like x, got {described(weight)}")
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"linear_relu: bias: expected ({weight.shape[0]},), got {described(bias)}")
    if bias.dtype != x.dtype or bias.device != x.device:
        raise RuntimeError(f"linear_relu: bias: expected {x.dtype} on {x.device} like x, got {described(bias)}")


def prefers_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision != "tf32":
        return "cuBLAS multiplies float32 without TF32 at the rate of the hardware; ReLU then runs in place"
    return None


def preactivation_tangent(
    x: Tensor, weight: Tensor, y: Tensor, tx: Tensor | None, tweight: Tensor | None, tbias: Tensor | None
) -> Tensor | None:
    return total(
        None if tx is None else tx @ weight.t(),
        None if tweight is None else x @ tweight.t(),
        None if tbias is None else tbias.expand_as(y),
    )


def backward_of_backward(ctx: Any, gdx: Tensor | None, gdweight: Tensor | None, gdbias: Tensor | None) -> tuple[Any, ...]:
    dy, x, weight, y = ctx.saved_tensors
    dz, gdz = gate(dy, y), preactivation_tangent(x, weight, y, gdx, gdweight, gdbias)
    return (
        gate(gdz, y) if ctx.wanted[0] and gdz is not None else None,
        dz @ gdweight if ctx.wanted[1] and gdweight is not None else None,
        as_2d(dz).t() @ as_2d(gdx) if ctx.wanted[2] and gdx is not None else None,
    )


def jvp_of_backward(
    ctx: Any, tdy: Tensor | None, tx: Tensor | None, tweight: Tensor | None, _ty: Tensor | None, _mask: None
) -> tuple[Any, ...]:
    dy, x, weight, y = ctx.saved_tensors
    (mask,) = ctx.options
    dz, tdz = gate(dy, y), gate(torch.zeros_like(dy) if tdy is None else tdy, y)
    return (
        total(tdz @ weight, None if tweight is None else dz @ tweight) if mask[0] else None,
        total(as_2d(tdz).t() @ as_2d(x), None if tx is None else as_2d(dz).t() @ as_2d(tx)) if mask[1] else None,
        as_2d(tdz).sum(0) if mask[2] else None,
    )


def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, int]:
    x_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    if weight_dim is None and bias_dim is None:  # x may have any number of leading dimensions: one launch
        return forward_op(x.movedim(x_dim, 0), weight, bias), 0
    batched = [at_front(t, d, info.batch_size) for t, d in ((x, x_dim), (weight, weight_dim), (bias, bias_dim))]
    z = torch.einsum("b...k,bnk->b...n", batched[0], batched[1])
    if batched[2] is not None:
        z = z + batched[2].view(info.batch_size, *[1] * (z.dim() - 2), -1)
    return z.relu(), 0


def shard(x: Any, weight: Any, bias: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate, Shard

    whole, last = Replicate(), x.ndim - 1

    def row(y: Any, x: Any, weight: Any, bias_placement: Any) -> Any:
        return [y], [x, weight, None if bias is None else bias_placement]

    # A sharded K would leave a partial sum in front of the ReLU: not offered, DTensor redistributes.
    return [
        row(whole, whole, whole, whole),
        row(Shard(last), whole, Shard(0), Shard(0)),
        *[row(Shard(d), Shard(d), whole, whole) for d in range(last)],
    ]


def shard_backward(dy: Any, x: Any, weight: Any, y: Any, mask: list[bool]) -> list[Any]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, part, last = Replicate(), Partial(), dy.ndim - 1

    def row(gradients: tuple[Any, ...], *inputs: Any) -> Any:
        return [p if wanted else None for p, wanted in zip(gradients, mask, strict=True)], [*inputs, None]

    return [
        row((whole, whole, whole), whole, whole, whole, whole),
        row((part, Shard(0), Shard(0)), Shard(last), whole, Shard(0), Shard(last)),
        *[row((Shard(d), part, part), Shard(d), Shard(d), whole, Shard(d)) for d in range(last)],
    ]


backward_op = Op(
    module=__name__,
    schema="linear_relu_backward(Tensor dy, Tensor x, Tensor weight, Tensor y, bool[3] mask) -> (Tensor, Tensor, Tensor)",
    check=lambda dy, x, weight, y, mask: None,  # reached through the forward op only
    fake=lambda dy, x, weight, y, mask: (
        x.new_empty(x.shape) if mask[0] else None,
        weight.new_empty(weight.shape) if mask[1] else None,
        weight.new_empty(weight.shape[:1]) if mask[2] else None,
    ),
    saved=lambda args, outputs: args[:4],
    backward=backward_of_backward,
    jvp=jvp_of_backward,
    flops=lambda dy, x, weight, y, mask: 2 * math.prod(dy) * weight[1] * (mask[0] + mask[1]),
    sharding=shard_backward,
    prefers_torch=lambda dy, x, weight, y, mask: prefers_torch(x, weight, None),
).register()


def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gradients: tuple[Any, ...] = backward_op(dy, *ctx.saved_tensors, ctx.wanted)
    return gradients


def jvp(ctx: Any, tx: Tensor | None, tweight: Tensor | None, tbias: Tensor | None) -> Tensor | None:
    x, weight, y = ctx.saved_tensors
    tangent = preactivation_tangent(x, weight, y, tx, tweight, tbias)
    return None if tangent is None else gate(tangent, y)


forward_op = Op(
    module=__name__,
    schema="linear_relu(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor",
    check=check,
    fake=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    saved=lambda args, y: (args[0], args[1], y),
    backward=backward,
    jvp=jvp,
    vmap=vmap,
    autocast="lower",
    flops=lambda x, weight, bias: 2 * math.prod(x) * weight[0],
    sharding=shard,
    prefers_torch=prefers_torch,
).register()

_linear, _relu_, _Tensor = torch.nn.functional.linear, torch.relu_, Tensor


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # An operator written in Python costs 12 to 70 us more than aten's own: on the CPU `auto` calls aten unless ours gains more.
    if (
        type(x) is _Tensor  # subclasses, DTensor and fake tensors keep the operator
        and x.is_cpu
        and _backend.forced == "auto"
        and not torch.is_autocast_enabled("cpu")  # the operator casts its arguments before it checks them
        and weight.dim() == 2
        and not is_compiling()  # before the next question: what it asks of torch once, Dynamo cannot follow
        and not fallback.beats_aten(x, weight)
    ):
        check(x, weight, bias)
        return _relu_(_linear(x, weight, bias))
    y: Tensor = forward_op(x, weight, bias)
    return y
