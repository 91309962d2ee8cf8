"""batch_norm: y = act((x - mean) * rstd * weight + bias + residual) per channel, x (N, C, *), rstd = 1 / sqrt(var + eps).

Two forward operators share one backward. `batch_norm` takes mean and var from x, brings the running statistics up to date and
returns (y, mean, rstd); `batch_norm_inference` is given them and writes nothing, so it batches, exports and shards freely.

Derivatives beyond the first start from x, never from the saved mean and rstd: those are constants, and a formula made of them
loses their dependence on x. (aten's does: its third derivative and its grad(jvp) are wrong, without a word.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dlaccel import backend as _backend
from dlaccel.backend import choose
from dlaccel.fallback.batch_norm import LARGE, activated_, gate, is_dense, statistics_dtype, uses_group_norm
from dlaccel.ops._autograd import transformed
from dlaccel.ops._common import FLOATS, described, plain, total
from dlaccel.ops._register import REGISTRY, Op

ACTIVATIONS = (None, "relu", "relu6")
VECTORS = ("weight", "bias", "running_mean", "running_var")


def check_vectors(prefix: str, x: Tensor, channels: int, vectors: tuple[Tensor | None, ...]) -> None:
    """VECTORS of a batch norm of so many channels, of x's dtype and on its device. prefix: what stands before their names."""
    dtype, device = x.dtype, x.device
    for name, t in zip(VECTORS, vectors, strict=True):
        if t is None:
            continue
        if t.dim() != 1 or t.shape[0] != channels:
            raise RuntimeError(f"{prefix}{name}: expected ({channels},), a number for each channel, got {described(t)}")
        if t.device != device or (t.dtype != dtype and t.dtype != statistics_dtype(x)):
            dtypes = " or ".join(sorted({str(dtype), str(statistics_dtype(x))}))
            raise RuntimeError(f"{prefix}{name}: expected {dtypes} on {device}, got {described(t)}")


def check_given_eps(op: str, eps: float) -> None:
    """Beside statistics that are not taken from the batch."""
    if eps < 0:
        raise ValueError(f"{op}: eps: expected a number that is not negative, got {eps}")


def check_common(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor | None, var: Tensor | None, activation: str | None,
) -> None:  # fmt: skip
    if x.dim() < 2:
        raise IndexError(f"batch_norm: input: expected (N, C, *), got {described(x)}")
    if x.dtype not in FLOATS:
        raise NotImplementedError(f"batch_norm: input: expected a floating-point tensor, got {described(x)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"batch_norm: activation: expected None, 'relu' or 'relu6', got {activation!r}")
    if (mean is None) != (var is None):
        raise ValueError("batch_norm: running_mean and running_var: expected both or neither")
    check_vectors("batch_norm: ", x, x.shape[1], (weight, bias, mean, var))
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device):
        raise RuntimeError(f"batch_norm: residual: expected {described(x)} like input, got {described(residual)}")


def check(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    momentum: float | None, eps: float, activation: str | None,
) -> None:  # fmt: skip
    check_common(x, weight, bias, residual, running_mean, running_var, activation)
    if math.prod(x.shape[2:], start=x.shape[0]) == 1:
        raise ValueError(f"batch_norm: input: expected more than 1 value per channel when training, got {described(x)}")
    if eps <= 0:
        raise ValueError(f"batch_norm: eps: expected a positive number during training, got {eps}")
    if momentum is None and num_batches_tracked is None and running_mean is not None:
        raise ValueError("batch_norm: momentum: None, the cumulative average, needs num_batches_tracked")


def check_inference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    mean: Tensor, var: Tensor, eps: float, activation: str | None,
) -> None:  # fmt: skip
    check_common(x, weight, bias, residual, mean, var, activation)
    check_given_eps("batch_norm", eps)


def fake_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd_or_var: Tensor,
    y: Tensor | None, training: bool, eps: float, activation: str | None, mask: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    like = mean if weight is None else weight
    return tuple(torch.empty_like(t) if wanted else None for t, wanted in zip((x, like, like, x), mask, strict=True))


def unsupported(x: Tensor) -> str | None:
    return "a channel has 2^30 values or more" if x.numel() >= x.shape[1] << 30 else None


class Normalised:
    """What the derivatives are made of, in aten: `derivative(v)` is that of x_hat along v, which is its own adjoint."""

    def __init__(self, x: Tensor, weight: Tensor | None, mean: Tensor, rstd_or_var: Tensor, training: bool, eps: float) -> None:
        wide = statistics_dtype(x)
        x = x.to(wide)
        self.over = [d for d in range(x.dim()) if d != 1]
        self.training = training
        if training:
            centred = x - self.mean(x)
            self.rstd = (self.mean(centred.square()) + eps).rsqrt()
        else:
            centred = x - self.of_channel(mean.to(wide))
            self.rstd = (self.of_channel(rstd_or_var.to(wide)) + eps).rsqrt()
        self.x_hat = centred * self.rstd
        self.weight: Any = 1 if weight is None else self.of_channel(weight.to(wide))

    def of_channel(self, v: Tensor) -> Tensor:
        return v.view(1, -1, *[1] * (len(self.over) - 1))

    def sum(self, v: Tensor) -> Tensor:
        return v.sum(self.over)

    def mean(self, v: Tensor) -> Tensor:
        return v.mean(self.over, keepdim=True)

    def project(self, v: Tensor) -> Tensor:
        return v - self.mean(v) - self.x_hat * self.mean(v * self.x_hat) if self.training else v

    def derivative(self, v: Tensor) -> Tensor:
        return self.rstd * self.project(v)

    def tangent(
        self, tx: Tensor | None, tweight: Tensor | None, tbias: Tensor | None, tresidual: Tensor | None
    ) -> Tensor | None:
        """That of weight * x_hat + bias + residual."""
        return total(
            None if tx is None else self.weight * self.derivative(tx),
            None if tweight is None else self.of_channel(tweight) * self.x_hat,
            None if tbias is None else self.of_channel(tbias).expand_as(self.x_hat),
            tresidual,
        )


def jvp(
    ctx: Any, tx: Tensor | None, tweight: Tensor | None, tbias: Tensor | None, tresidual: Tensor | None, *_: Any
) -> Tensor | None:
    x, weight, _bias, mean, rstd_or_var, y = ctx.saved_tensors
    *rest, eps, activation = ctx.options
    ty = Normalised(x, weight, mean, rstd_or_var, bool(rest), eps).tangent(tx, tweight, tbias, tresidual)
    return None if ty is None else gate(ty.to(x.dtype), y, activation)


def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Any, ...]:
    *rest, eps, activation = ctx.options  # training has momentum, inference has not
    x, weight, bias, mean, rstd_or_var, y = ctx.saved_tensors
    # Not with a DTensor, which has no rule for relu6's gradient.
    if activation is not None and type(dy) is Tensor and choose(REGISTRY["batch_norm_backward"], (dy, x)) == "torch":
        dy = gate(dy, y, activation)
        bias = y = activation = None
        if not transformed():  # as in aten's graph, where y is freed before dx takes its place
            ctx.maybe_clear_saved_tensors()
    # Without activation the residual's gradient is dy itself, and an operator must not return its argument.
    mask = [*ctx.wanted[:3], ctx.wanted[3] and activation is not None]
    *gradients, dresidual = backward_op(dy, x, weight, bias, mean, rstd_or_var, y, bool(rest), eps, activation, mask)
    return *gradients, dy if activation is None and ctx.wanted[3] else dresidual


def backward_of_backward(
    ctx: Any, gdx: Tensor | None, gdweight: Tensor | None, gdbias: Tensor | None, gdresidual: Tensor | None
) -> tuple[Any, ...]:
    dy, x, weight, _bias, mean, rstd_or_var, y = ctx.saved_tensors
    training, eps, activation, _mask = ctx.options
    n = Normalised(x, weight, mean, rstd_or_var, training, eps)
    dz = gate(dy, y, activation).to(n.x_hat.dtype)
    to_dz = n.tangent(gdx, gdweight, gdbias, gdresidual)
    to_x = to_weight = None
    if ctx.wanted[1]:
        to_x_hat = None if gdweight is None else n.of_channel(gdweight) * dz
        if gdx is not None and training:
            to_x_hat = total(to_x_hat, -n.weight * n.rstd * (gdx * n.mean(dz * n.x_hat) + dz * n.mean(gdx * n.x_hat)))
            to_x = -n.rstd.square() * n.x_hat * n.mean(gdx * n.weight * n.project(dz))  # through rstd
        to_x = total(to_x, None if to_x_hat is None else n.derivative(to_x_hat))
    if ctx.wanted[2] and gdx is not None:
        to_weight = n.sum(gdx * n.derivative(dz)).to(weight.dtype)
    return (
        None if to_dz is None else gate(to_dz.to(dy.dtype), y, activation),
        None if to_x is None else to_x.to(x.dtype),
        to_weight,
    )


def jvp_of_backward(ctx: Any, tdy: Tensor | None, tx: Tensor | None, tweight: Tensor | None, *_: Any) -> tuple[Any, ...]:
    dy, x, weight, _bias, mean, rstd_or_var, y = ctx.saved_tensors
    training, eps, activation, mask = ctx.options
    n = Normalised(x, weight, mean, rstd_or_var, training, eps)
    dz = gate(dy, y, activation).to(n.x_hat.dtype)
    tdz = gate(torch.zeros_like(dy) if tdy is None else tdy, y, activation)
    tx_hat: Any = None if tx is None else n.derivative(tx)
    tdx: Any = None
    tdweight = tdbias = None
    if mask[0]:
        tdx = n.weight * n.derivative(tdz)
        if tweight is not None:
            tdx = tdx + n.of_channel(tweight) * n.derivative(dz)
        if tx is not None and training:
            through_rstd = -n.rstd.square() * n.mean(n.x_hat * tx) * n.project(dz)
            through_x_hat = tx_hat * n.mean(dz * n.x_hat) + n.x_hat * n.mean(dz * tx_hat)
            tdx = tdx + n.weight * (through_rstd - n.rstd * through_x_hat)
        tdx = tdx.to(x.dtype)
    like = mean if weight is None else weight
    if mask[1]:
        tdweight = n.sum(tdz * n.x_hat if tx_hat is None else tdz * n.x_hat + dz * tx_hat).to(like.dtype)
    if mask[2]:
        tdbias = n.sum(tdz).to(like.dtype)
    return tdx, tdweight, tdbias, tdz if mask[3] else None


def saved(args: tuple[Any, ...], y: Tensor, mean: Tensor, rstd_or_var: Tensor) -> tuple[Tensor | None, ...]:
    """y for the activation's mask. The kernels rather recompute it from x: the bias goes with it where that is possible."""
    x, weight, bias, residual, *_, activation = args
    recomputable = activation is not None and residual is None
    return x, weight, bias if recomputable else None, mean, rstd_or_var, None if activation is None else y


def placements(dims: Iterable[int]) -> list[tuple[Any, Any, Any]]:
    """Of tensors like x, of vectors and of their gradients: whole; by channel; along `dims`, where all statistics are given."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole = Replicate()
    return [(whole, whole, whole), (Shard(1), Shard(0), Shard(0)), *[(Shard(d), whole, Partial()) for d in dims]]


def of_inputs(*tensors_and_placements: tuple[Any, Any], options: int) -> list[Any]:
    return [None if t is None else p for t, p in tensors_and_placements] + [None] * options


def shard(
    x: Any, weight: Any, bias: Any, residual: Any, running_mean: Any, running_var: Any, counter: Any, *options: Any
) -> list[Any]:
    from torch.distributed.tensor import Replicate

    state, vectors = (running_mean, running_var), (weight, bias, running_mean, running_var)
    rows = []
    for like_x, vector, _ in placements(()):
        # State is updated where it lies: DTensor would bring it to another placement in a copy, and lose the update.
        if all(p == vector for t in state if t is not None for p in t.placements):
            of_vectors = [(t, vector) for t in vectors]
            tensors = (x, like_x), *of_vectors[:2], (residual, like_x), *of_vectors[2:], (counter, Replicate())
            rows.append(([like_x, vector, vector], of_inputs(*tensors, options=len(options))))
    if not rows:
        raise NotImplementedError(
            "batch_norm: running_mean and running_var: expected both replicated or both sharded by channel, on every mesh "
            f"dimension, got {[t.placements for t in state if t is not None]}"
        )
    return rows


def shard_inference(x: Any, weight: Any, bias: Any, residual: Any, mean: Any, var: Any, *options: Any) -> list[Any]:
    rows = []
    for like_x, vector, _ in placements(d for d in range(x.ndim) if d != 1):
        tensors = (x, like_x), (weight, vector), (bias, vector), (residual, like_x), (mean, vector), (var, vector)
        rows.append(([like_x], of_inputs(*tensors, options=len(options))))
    return rows


def shard_backward(
    dy: Any, x: Any, weight: Any, bias: Any, mean: Any, rstd_or_var: Any, y: Any, training: bool, *options: Any
) -> list[Any]:
    wanted, rows = options[-1], []
    for like_x, vector, gradient in placements(d for d in range(x.ndim) if d != 1 and not training):
        of_vectors = [(t, vector) for t in (weight, bias, mean, rstd_or_var)]
        tensors = (dy, like_x), (x, like_x), *of_vectors, (y, like_x)
        outputs = [p if w else None for p, w in zip((like_x, gradient, gradient, like_x), wanted, strict=True)]
        rows.append((outputs, of_inputs(*tensors, options=1 + len(options))))
    return rows


backward_op = Op(
    module=__name__,
    schema="batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd_or_var, Tensor? y, "
    "bool training, float eps, str? activation, bool[4] mask) -> (Tensor, Tensor, Tensor, Tensor)",
    check=lambda *args: None,  # reached through the forward operators only
    fake=fake_backward,
    saved=lambda args, outputs: args[:7],
    backward=backward_of_backward,
    jvp=jvp_of_backward,
    sharding=shard_backward,
    unsupported=lambda dy, x, *args: unsupported(x),
).register()


training_op = Op(
    module=__name__,
    schema="batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
    "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float? momentum, float eps, str? activation) "
    "-> (Tensor, Tensor, Tensor)",
    check=check,
    fake=lambda x, *args: (
        torch.empty_like(x),
        x.new_empty(x.shape[1], dtype=statistics_dtype(x)),
        x.new_empty(x.shape[1], dtype=statistics_dtype(x)),
    ),
    saved=lambda args, outputs: saved(args, *outputs),
    backward=backward,
    jvp=lambda ctx, *tangents: (jvp(ctx, *tangents), None, None),
    non_differentiable=(1, 2),
    sharding=shard,
    unsupported=lambda x, *args: unsupported(x),
).register()


inference_op = Op(
    module=__name__,
    schema="batch_norm_inference(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, Tensor var, float eps, "
    "str? activation) -> Tensor",
    check=check_inference,
    fake=lambda x, *args: torch.empty_like(x),
    saved=lambda args, y: saved(args, y, args[4], args[5]),
    backward=backward,
    jvp=jvp,
    sharding=shard_inference,
    unsupported=lambda x, *args: unsupported(x),
).register()


def _is_atens(
    x: Tensor, tensors: tuple[Tensor | None, ...], residual: Tensor | None, training: bool, momentum: float | None
) -> bool:
    """On the CPU: whether the torch backend would only call aten, which then is cheaper without an operator around it.

    Not where aten's answer differs: it rounds statistics to 16 bits unless all parameters are float32, and loses odd layouts.
    """
    if x.dim() < 2 or x.numel() <= x.shape[1] or not is_dense(x):
        return False
    if training and (uses_group_norm(x) or (momentum is None and tensors[2] is not None)):
        return False
    if x.nbytes > LARGE and not (training and residual is None):  # the torch backend goes by pieces
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or not residual.is_cpu):
        return False
    if x.dtype is torch.float32 or x.dtype is torch.float64:
        return True
    return x.dtype in FLOATS and tensors[0] is not None and all(t is None or t.dtype is torch.float32 for t in tensors)


def _in_any_order(gradients: tuple[Tensor | None, ...], dys: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...] | None:
    """A hook on aten's backward in training, whose third derivative is wrong: what is to be derived again comes from ours."""
    dy = dys[0]
    if dy is None or not torch.is_grad_enabled():
        return None
    # The gradient's node has what it needs. That of the forward, which under checkpointing hands out what it saved only once,
    # is asked where gradients are batched by vmap and show no node.
    node: Any = next((g.grad_fn for g in gradients if g is not None and g.grad_fn is not None), None)
    if node is None:
        node = torch._C._current_autograd_node()
        statistics = node._saved_result1, node._saved_result2
    else:
        statistics = node._saved_save_mean, node._saved_save_invstd
    x, weight = node._saved_input, node._saved_weight
    mask = [g is not None for g in gradients]
    dx, dweight, dbias, _ = backward_op(dy, x, weight, None, *statistics, None, True, node._saved_eps, None, [*mask, False])
    return dx, dweight, dbias


def batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    training: bool, momentum: float | None, eps: float,
    residual: Tensor | None, activation: str | None, num_batches_tracked: Tensor | None,
) -> Tensor:  # fmt: skip
    y: Tensor
    if not training and (running_mean is None or running_var is None):
        raise RuntimeError("batch_norm: running_mean and running_var: expected both in evaluation, got None")
    # The questions that aten does not ask itself, and no more: with cold caches a line of Python takes 2 us. What aten refuses
    # goes on to the operator, which says why.
    if (
        _backend.forced == "auto"
        and input.is_cpu
        and plain(input)
        and _is_atens(input, (weight, bias, running_mean, running_var), residual, training, momentum)
        and activation in ACTIVATIONS
        and eps > 0
        and (running_mean is None) == (running_var is None)
        and not torch.is_autocast_enabled("cpu")
    ):
        try:
            y = torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum or 0.0, eps, False)
        except RuntimeError:
            pass
        else:
            if training:
                if num_batches_tracked is not None:
                    num_batches_tracked.add_(1)
                if input.requires_grad and y.grad_fn is not None:
                    y.grad_fn.register_hook(_in_any_order)
            if residual is not None:
                y = y.add_(residual)
            return activated_(y, activation)
    if training:
        state_and_count = running_mean, running_var, num_batches_tracked
        y, _, _ = training_op(input, weight, bias, residual, *state_and_count, momentum, eps, activation)
        return y
    y = inference_op(input, weight, bias, residual, running_mean, running_var, eps, activation)
    return y
