"""cross_entropy: torch.nn.functional.cross_entropy, x (N, C, *) or (C,); the maths is in kernels/cross_entropy.py.

Two families of operators, chosen by the target: class indices (no gradient) and class probabilities (with one). Reductions
are torch's numbers, 0 none, 1 mean, 2 sum. `wide` makes the loss at least float32 whatever the logits are: autocast sets it,
so that 16-bit logits are read as they are where eager converts them first. `save` says what forward leaves for backward:

    0           nothing: backward reads whole rows and finds their maximum and sum again
    STATISTICS  (2, R): every row's maximum m and its sum of exp(x - m), for rows too long for that; probabilities add a
                third, the sum of w q
    GRADIENT    dx for the cotangent 1, so that backward need not read the logits. The first backward scales it in place and
                returns it; a second one computes it from the logits. float16 leaves the mean's divisor to backward as well:
                it would flush gradients to 0 before a loss scale reaches them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dlaccel import backend as _backend
from dlaccel.fallback.cross_entropy import raise_for_bad_target
from dlaccel.ops._common import FLOATS, described, plain, total
from dlaccel.ops._register import Op

NONE, MEAN, SUM = 0, 1, 2
STATISTICS, GRADIENT = 1, 2

# Rows up to this are kept whole by one program, which finds their maximum and sum again for free. Longer ones save 8 bytes.
LONG_ROW = 1024


def class_dim(x: Tensor) -> int:
    return 0 if x.dim() == 1 else 1


def widened(*tensors: Tensor | None) -> torch.dtype:
    """What to compute in."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)


def result_type(wide: bool, *tensors: Tensor | None) -> torch.dtype:
    if wide:
        return widened(*tensors)
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])


def rows_shape(x: Tensor) -> tuple[int, ...]:
    """The shape of the loss without a reduction."""
    return () if x.dim() == 1 else (*x.shape[:1], *x.shape[2:])


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_common(x: Tensor, weight: Tensor | None, smoothing: float, wide: bool, same_dtype: bool) -> None:
    if x.dim() == 0:
        raise RuntimeError(f"cross_entropy: input: expected (C,) or (N, C, *), got {described(x)}")
    if x.dtype not in FLOATS:
        raise NotImplementedError(f"cross_entropy: input: expected a floating-point tensor, got {described(x)}")
    if smoothing > 1.0:
        raise RuntimeError(f"label_smoothing must be between 0.0 and 1.0. Got: {smoothing}")
    if weight is None:
        return
    classes = x.shape[class_dim(x)]
    if weight.dim() != 1 or weight.shape[0] != classes:
        raise RuntimeError(
            f"weight tensor should be defined either for all {classes} classes or no classes but got weight tensor of shape: "
            f"{list(weight.shape)}"
        )
    if weight.device != x.device or (same_dtype and not wide and weight.dtype != x.dtype):
        raise RuntimeError(f"cross_entropy: weight: expected scalar type {x.dtype} on {x.device}, got {described(weight)}")


def check(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    wide: bool,
    save: int,
) -> None:
    check_common(x, weight, label_smoothing, wide, same_dtype=True)
    if x.dim() == 1:
        if target.dim() > 1 or target.numel() != 1:
            raise ValueError(f"For 1D input, 1D target must have size 1, but got target size: {list(target.shape)}")
    elif target.dim() == 0 or target.shape[0] != x.shape[0]:
        got = target.shape[0] if target.dim() else 0
        raise ValueError(f"Expected input batch_size ({x.shape[0]}) to match target batch_size ({got}).")
    elif x.dim() == 2 and target.dim() != 1:
        raise RuntimeError(f"0D or 1D target tensor expected, multi-target not supported: got {described(target)}")
    elif target.shape != rows_shape(x):
        raise RuntimeError(f"Expected target size {list(rows_shape(x))}, got {list(target.shape)}")
    if target.dtype != torch.int64 and not (target.dtype == torch.uint8 and x.dim() <= 2):
        raise RuntimeError(f"expected target dtype to be Long or Byte, but got {target.dtype} for {x.dim()}-dimensional input")
    if target.device != x.device:
        raise RuntimeError(f"cross_entropy: target: expected it on {x.device} like input, got {described(target)}")


def check_prob(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float, wide: bool, save: int
) -> None:
    check_common(x, weight, label_smoothing, wide, same_dtype=False)
    if target.shape != x.shape:
        raise RuntimeError(f"cross_entropy: target: expected probabilities {tuple(x.shape)}, got {described(target)}")
    if target.dtype not in FLOATS:
        raise RuntimeError(f"Expected floating point type for target with class probabilities, got {target.dtype}")
    if target.device != x.device:
        raise RuntimeError(f"cross_entropy: target: expected it on {x.device} like input, got {described(target)}")


# ---- formulas in aten, for derivatives of any order -----------------------------------------------------------------


class Index:
    """A row's loss is sum_c a_c (lse - x_c) with a_c = v ((1 - eps) w_t [c = t] + eps / C w_c), v = [t != ignore_index].

    Its gradient is A p - a, its Hessian A (diag(p) - p p^T), A = sum_c a_c. Class sums keep their dimension.
    """

    def __init__(self, x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float) -> None:
        self.dim, self.smoothing = class_dim(x), max(smoothing, 0.0)
        dtype, classes = widened(x), x.shape[self.dim]
        target = target.reshape(rows_shape(x)).long().unsqueeze(self.dim)
        self.valid = target != ignore_index
        self.target = torch.where(self.valid, target, 0)
        self.p = torch.softmax(x.to(dtype), self.dim)
        self.weight = x.new_ones((classes,), dtype=dtype) if weight is None else weight.to(dtype)
        self.at_target = (1 - self.smoothing) * self.weight[self.target]
        self.elsewhere = self.smoothing / classes * self.weight.view(-1, *[1] * (x.dim() - 1 - self.dim))
        self.total = self.at_target + self.elsewhere.sum()

    def slope(self, t: Tensor) -> Tensor:
        """sum_c t_c (A p_c - a_c): the derivative of the rows' losses along t."""
        along = self.total * (self.p * t).sum(self.dim, keepdim=True) - self.at_target * t.gather(self.dim, self.target)
        if self.smoothing:
            along = along - (self.elsewhere * t).sum(self.dim, keepdim=True)
        return torch.where(self.valid, along, 0)

    def curve(self, t: Tensor, cotangent: Tensor) -> Tensor:
        """The Hessian of the rows' losses times t, rows scaled by their cotangents."""
        scale = torch.where(self.valid, self.total * cotangent, 0)
        return scale * self.p * (t - (self.p * t).sum(self.dim, keepdim=True))

    def gradient(self, cotangent: Tensor) -> Tensor:
        one_hot = torch.zeros_like(self.p).scatter(self.dim, self.target, 1)
        scale = torch.where(self.valid, cotangent, 0)
        return scale * (self.total * self.p - self.at_target * one_hot - self.elsewhere)


def row_cotangent(dy: Tensor, x: Tensor, reduction: int, divisor: Tensor | int) -> Tensor:
    """The cotangent of the rows' losses, to broadcast against x."""
    if reduction:
        return dy / divisor if reduction == MEAN else dy
    return dy.unsqueeze(class_dim(x))


def reduced(rows: Tensor, x: Tensor, reduction: int, divisor: Tensor | int) -> Tensor:
    """From class sums that kept their dimension."""
    if reduction:
        return rows.sum() / divisor if reduction == MEAN else rows.sum()
    return rows.squeeze(class_dim(x))


# ---- class indices: backward ----------------------------------------------------------------------------------------


def backward_of_backward(ctx: Any, ddx: Tensor) -> tuple[Any, ...]:
    dy, x, target, weight, _statistics, divisor = ctx.saved_tensors
    ignore_index, reduction, smoothing = ctx.options
    rows, wide = Index(x, target, weight, ignore_index, smoothing), ddx.to(widened(x))
    ddy = reduced(rows.slope(wide), x, reduction, divisor).to(dy.dtype) if ctx.wanted[0] else None
    if not ctx.wanted[1]:
        return (ddy,)
    return ddy, rows.curve(wide, row_cotangent(dy.to(wide.dtype), x, reduction, divisor)).to(x.dtype)


def jvp_of_backward(ctx: Any, tdy: Tensor | None, tx: Tensor | None, *_: None) -> Tensor | None:
    dy, x, target, weight, _statistics, divisor = ctx.saved_tensors
    ignore_index, reduction, smoothing = ctx.options
    rows = Index(x, target, weight, ignore_index, smoothing)
    dtype = rows.p.dtype
    tangent = total(
        None if tdy is None else rows.gradient(row_cotangent(tdy.to(dtype), x, reduction, divisor)),
        None if tx is None else rows.curve(tx.to(dtype), row_cotangent(dy.to(dtype), x, reduction, divisor)),
    )
    return None if tangent is None else tangent.to(x.dtype)


# ---- DTensor --------------------------------------------------------------------------------------------------------


def placements(x: Any, reduction: int) -> list[tuple[Any, Any, Any, Any]]:
    """Of x and target, the rows' statistics, the loss, its gradient: whole, or by rows. The mean needs the whole divisor."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    whole, rows = Replicate(), Shard(0)
    ways: list[tuple[Any, Any, Any, Any]] = [(whole, whole, whole, whole)]
    if x.ndim == 2 and reduction != MEAN:
        ways.append((rows, Shard(1), rows, rows) if reduction == NONE else (rows, Shard(1), Partial(), whole))
    return ways


def shard(x: Any, target: Any, weight: Any, ignore_index: int, reduction: int, *options: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    rest = [None if weight is None else whole] + [None] * (2 + len(options))
    return [([loss, s, whole, of_x], [of_x, of_x, *rest]) for of_x, s, loss, _ in placements(x, reduction)]


def shard_backward(
    dy: Any,
    x: Any,
    target: Any,
    weight: Any,
    statistics: Any,
    divisor: Any,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> list[Any]:
    from torch.distributed.tensor import Replicate

    whole = Replicate()
    w = None if weight is None else whole
    return [([of_x], [of_dy, of_x, of_x, w, s, whole, None, None, None]) for of_x, s, _, of_dy in placements(x, reduction)]


backward_op = Op(
    module=__name__,
    schema="cross_entropy_backward(Tensor dy, Tensor x, Tensor target, Tensor? weight, Tensor statistics, Tensor divisor, "
    "int ignore_index, int reduction, float label_smoothing) -> Tensor",
    check=lambda *args: None,  # reached through the forward op only
    fake=lambda dy, x, *args: torch.empty_like(x),
    saved=lambda args, dx: args[:6],
    backward=backward_of_backward,
    jvp=jvp_of_backward,
    sharding=shard_backward,
).register()


def backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Any, ...]:
    x, target, weight, statistics, divisor = ctx.saved_tensors
    ignore_index, reduction, smoothing, _wide, save = ctx.options
    if save == GRADIENT and ctx.owned is not None and not torch.is_grad_enabled() and type(ctx.owned) is Tensor:
        dx, ctx.owned = ctx.owned, None
        if reduction == MEAN and x.dtype == torch.float16:
            dy = dy.float() / divisor
        return (scale_(dx, dy if reduction else dy.unsqueeze(class_dim(x))),)
    return (backward_op(dy, x, target, weight, statistics, divisor, ignore_index, reduction, smoothing),)


def scale_(dx: Tensor, cotangent: Tensor) -> Tensor:
    """dx times the cotangent of the loss, in place: nobody else has seen it, so AccumulateGrad can keep it as it is."""
    if cotangent.dim() == 0 and cotangent.is_cpu:
        return dx if cotangent.item() == 1.0 else dx.mul_(cotangent)
    return dx.mul_(cotangent)


def jvp(ctx: Any, tx: Tensor | None, *_: None) -> tuple[Any, ...]:
    x, target, weight, _statistics, divisor = ctx.saved_tensors
    ignore_index, reduction, smoothing, wide, _save = ctx.options
    if tx is None:
        return None, None, None, None
    rows = Index(x, target, weight, ignore_index, smoothing)
    tangent = reduced(rows.slope(tx.to(rows.p.dtype)), x, reduction, divisor)
    return tangent.to(result_type(wide, x)), None, None, None


def fake(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    wide: bool,
    save: int,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(() if reduction else rows_shape(x), dtype=result_type(wide, x)),
        x.new_empty((2, target.numel() if save == STATISTICS else 0), dtype=widened(x)),
        x.new_empty(() if reduction == MEAN else (0,), dtype=widened(x)),
        torch.empty_like(x) if save == GRADIENT else x.new_empty((0,)),
    )


def autocast(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors as they are and a wide loss: the values and dtypes of aten's cast to float32, without its traffic."""
    return (*args[:-2], True, args[-1])


forward_op = Op(
    module=__name__,
    schema="cross_entropy(Tensor x, Tensor target, Tensor? weight=None, int ignore_index=-100, int reduction=1, "
    "float label_smoothing=0.0, bool wide=False, int save=0) -> (Tensor, Tensor, Tensor, Tensor)",
    check=check,
    fake=fake,
    saved=lambda args, outputs: (*args[:3], outputs[1], outputs[2]),
    backward=backward,
    jvp=jvp,
    non_differentiable=(1, 2, 3),
    owned=3,
    autocast=autocast,
    sharding=shard,
).register()


# ---- class probabilities --------------------------------------------------------------------------------------------


def count(x: Tensor) -> int:
    """Rows: what "mean" divides by, which is 0 for no classes, as in torch."""
    return x.numel() // x.shape[class_dim(x)] if x.numel() else 0


class Prob:
    """A row's loss is sum_c w_c q_c n_c with n = -log p, q the smoothed target. S = sum_c w_c q_c, k = 1 - eps.

    Its gradients are S p - w q for x, k w n for the target and q n for the weight; those of n_c are p - [c = .].
    """

    def __init__(self, x: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> None:
        self.dim, smoothing = class_dim(x), max(smoothing, 0.0)
        self.dtype, classes = widened(x, target, weight), x.shape[self.dim]
        self.n = -torch.log_softmax(x.to(self.dtype), self.dim)
        self.p = (-self.n).exp()
        self.k = 1 - smoothing
        self.q = target.to(self.dtype) * self.k + (smoothing / classes if smoothing else 0.0)
        self.w = self.per_class(x.new_ones((classes,)) if weight is None else weight)
        self.s = self.sum(self.w * self.q)

    def per_class(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype).view(-1, *[1] * (self.n.dim() - 1 - self.dim))

    def sum(self, t: Tensor) -> Tensor:
        return t.sum(self.dim, keepdim=True)

    def by_class(self, t: Tensor) -> Tensor:
        """Sums over the rows: (C,)."""
        return t if t.dim() == 1 else t.sum((0, *range(2, t.dim())))

    def centred(self, t: Tensor) -> Tensor:
        """sum_c p_c t_c - t: minus the derivative of n along t is this, and so is its transpose's for sum t = 0."""
        return self.sum(self.p * t) - t

    def tangent(self, t: Tensor | None) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=self.n.device) if t is None else t.to(self.dtype)


def prob_backward_of_backward(ctx: Any, ddx: Tensor | None, ddtarget: Tensor | None) -> tuple[Any, ...]:
    dy, x, target, weight, _statistics = ctx.saved_tensors
    reduction, smoothing, _mask = ctx.options
    r = Prob(x, target, weight, smoothing)
    u, v = r.tangent(ddx).expand_as(r.n), r.tangent(ddtarget).expand_as(r.n)
    g, kwv, centred = row_cotangent(dy.to(r.dtype), x, reduction, count(x)), r.k * r.w * v, r.centred(u)
    slope = r.sum(u * (r.s * r.p - r.w * r.q) + kwv * r.n)
    return (
        reduced(slope, x, reduction, count(x)).to(dy.dtype) if ctx.wanted[0] else None,
        (g * (r.sum(kwv) * r.p - kwv - r.s * r.p * centred)).to(x.dtype) if ctx.wanted[1] else None,
        (g * r.k * r.w * centred).to(target.dtype) if ctx.wanted[2] else None,
        r.by_class(g * (r.q * centred + r.k * v * r.n)).to(weight.dtype) if ctx.wanted[3] else None,
    )


def prob_jvp_of_backward(
    ctx: Any, tdy: Tensor | None, tx: Tensor | None, ttarget: Tensor | None, tweight: Tensor | None, *_: None
) -> tuple[Any, ...]:
    dy, x, target, weight, _statistics = ctx.saved_tensors
    reduction, smoothing, mask = ctx.options
    r = Prob(x, target, weight, smoothing)
    g = row_cotangent(dy.to(r.dtype), x, reduction, count(x))
    tg = row_cotangent(torch.zeros_like(dy, dtype=r.dtype) if tdy is None else tdy.to(r.dtype), x, reduction, count(x))
    centred = r.centred(r.tangent(tx).expand_as(r.n))
    tw = r.tangent(None) if tweight is None else r.per_class(tweight)
    twq = r.w * r.k * r.tangent(ttarget) + tw * r.q
    dx = tg * (r.s * r.p - r.w * r.q) + g * (r.sum(twq.expand_as(r.n)) * r.p - twq - r.s * r.p * centred)
    dtarget = r.k * (tg * r.w * r.n + g * (r.w * centred + tw * r.n))
    return dx.to(x.dtype) if mask[0] else None, dtarget.to(target.dtype) if mask[1] else None


def shard_prob(x: Any, target: Any, weight: Any, reduction: int, *options: Any) -> list[Any]:
    from torch.distributed.tensor import Replicate

    w = None if weight is None else Replicate()
    rest = [w] + [None] * (1 + len(options))
    return [([loss, s], [of_x, of_x, *rest]) for of_x, s, loss, _ in placements(x, reduction)]


def shard_prob_backward(
    dy: Any, x: Any, target: Any, weight: Any, statistics: Any, reduction: int, smoothing: float, mask: list[bool]
) -> list[Any]:
    from torch.distributed.tensor import Replicate

    w = None if weight is None else Replicate()
    return [
        ([of_x if wanted else None for wanted in mask], [of_dy, of_x, of_x, w, s, None, None, None])
        for of_x, s, _, of_dy in placements(x, reduction)
    ]


prob_backward_op = Op(
    module=__name__,
    schema="cross_entropy_prob_backward(Tensor dy, Tensor x, Tensor target, Tensor? weight, Tensor statistics, "
    "int reduction, float label_smoothing, bool[2] mask) -> (Tensor, Tensor)",
    check=lambda *args: None,  # reached through the forward op only
    fake=lambda dy, x, target, weight, statistics, reduction, label_smoothing, mask: (
        torch.empty_like(x) if mask[0] else None,
        torch.empty_like(target) if mask[1] else None,
    ),
    saved=lambda args, outputs: args[:5],
    backward=prob_backward_of_backward,
    jvp=prob_jvp_of_backward,
    sharding=shard_prob_backward,
).register()


def prob_backward(ctx: Any, dy: Tensor, *_: None) -> tuple[Any, ...]:
    x, target, weight, statistics = ctx.saved_tensors
    reduction, smoothing, _wide, _save = ctx.options
    dx = dtarget = dweight = None
    if ctx.wanted[0] or ctx.wanted[1]:
        dx, dtarget = prob_backward_op(dy, x, target, weight, statistics, reduction, smoothing, [ctx.wanted[0], ctx.wanted[1]])
    if ctx.wanted[2]:  # rare, and aten's
        r = Prob(x, target, weight, smoothing)
        g = row_cotangent(dy.to(r.dtype), x, reduction, count(x))
        dweight = r.by_class(g * r.q * r.n).to(weight.dtype)
    return dx, dtarget, dweight


def prob_jvp(ctx: Any, tx: Tensor | None, ttarget: Tensor | None, tweight: Tensor | None, *_: None) -> tuple[Any, ...]:
    x, target, weight, _statistics = ctx.saved_tensors
    reduction, smoothing, wide, _save = ctx.options
    r = Prob(x, target, weight, smoothing)
    slope = r.tangent(tx) * (r.s * r.p - r.w * r.q) + r.k * r.w * r.n * r.tangent(ttarget)
    if tweight is not None:
        slope = slope + r.per_class(tweight) * r.q * r.n
    return reduced(r.sum(slope), x, reduction, count(x)).to(result_type(wide, x, target, weight)), None


prob_op = Op(
    module=__name__,
    schema="cross_entropy_prob(Tensor x, Tensor target, Tensor? weight=None, int reduction=1, float label_smoothing=0.0, "
    "bool wide=False, int save=0) -> (Tensor, Tensor)",
    check=check_prob,
    fake=lambda x, target, weight, reduction, label_smoothing, wide, save: (
        x.new_empty(() if reduction else rows_shape(x), dtype=result_type(wide, x, target, weight)),
        x.new_empty((3, math.prod(rows_shape(x)) if save == STATISTICS else 0), dtype=widened(x, target, weight)),
    ),
    saved=lambda args, outputs: (*args[:3], outputs[1]),
    backward=prob_backward,
    jvp=prob_jvp,
    non_differentiable=(1,),
    autocast=autocast,
    sharding=shard_prob,
).register()


# ---- the public function --------------------------------------------------------------------------------------------

_aten: Any = torch._C._nn.cross_entropy_loss

LARGE = 1 << 22  # logits from which our operator beats eager on the CPU: eager's three buffers no longer fit the cache
PIECE = 1 << 16  # from where our operator's constant cost no longer counts
FEW_ROWS = 256  # a matrix with fewer is not worth two views
EXACT_ROWS = 2048  # float16 counts no further


def _fewer_than_lanes(x: Tensor) -> bool:
    return x.shape[class_dim(x)] < 64 // x.element_size()


def _in_rows(x: Tensor) -> bool:
    return x.dim() <= 2 or (x.stride(1) == 1 and x.stride(0) == x.shape[1] * math.prod(x.shape[2:]))


def _op_is_faster(x: Tensor, reduction: int, needs_grad: bool) -> bool:
    """On the CPU, for class indices; measured (docs/ops/cross_entropy.md)."""
    if x.dim() == 2 and _fewer_than_lanes(x) and not needs_grad:  # as fast as aten's plane, which takes a copy of the logits
        return x.numel() >= PIECE
    if x.numel() < LARGE or _fewer_than_lanes(x) or x.dtype == torch.float64:
        return False
    classes, half = x.shape[class_dim(x)], x.element_size() == 2
    if not needs_grad:
        return _in_rows(x) and (not half or (x.dtype == torch.float16 and classes < 512 and reduction != NONE))
    if _in_rows(x):
        return classes >= 64 and reduction != NONE if half else classes >= 24
    return not half and math.prod(x.shape[2:]) >= 64


def _by_aten(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, smoothing: float, wide: bool
) -> Tensor:
    """aten's operator: the answer of ours, with two exceptions that are mended here. Sums of float16 rows overflow in aten;
    and a matrix of a few classes is shown to it as one plane, along which it vectorises."""
    half = x.element_size() == 2 and not torch.is_autocast_enabled("cpu")  # which makes aten's loss float32
    if half and reduction and (wide or (x.dtype == torch.float16 and count(x) > EXACT_ROWS)):
        loss = _wide_by_aten(x, target, weight, ignore_index, reduction, smoothing)
        return loss.to(result_type(wide, x, target, weight))
    if x.dim() == 2 and _fewer_than_lanes(x) and x.shape[0] >= FEW_ROWS:
        plane = target.long() if target.dim() == 1 else target.t()
        loss = _aten(x.t().unsqueeze(0), plane.unsqueeze(0), weight, reduction, ignore_index, smoothing)
        loss = loss if reduction else loss.squeeze(0)
    else:
        loss = _aten(x, target, weight, reduction, ignore_index, smoothing)
    if reduction and loss.dtype == torch.float16 and not math.isfinite(loss.item()):
        loss = _wide_by_aten(x, target, weight, ignore_index, reduction, smoothing).half()
    return loss  # type: ignore[no-any-return]


def _wide_by_aten(
    x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: int, smoothing: float
) -> Tensor:
    """16-bit rows summed in float32."""
    loss = _by_aten(x, target, weight, ignore_index, NONE, smoothing, False).sum(dtype=widened(x, target, weight))
    return loss / _divisor(x, target, weight, ignore_index) if reduction == MEAN else loss


def _divisor(x: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor | int:
    if target.shape == x.shape:
        return count(x)
    valid = target != ignore_index
    if weight is None:
        return valid.sum()
    return torch.where(valid, weight.float()[torch.where(valid, target, 0).long()], 0).sum()


def _loss(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    smoothing: float,
    wide: bool,
    fused: bool | None,
) -> Tensor:
    prob = target.shape == x.shape
    bare = plain(x)
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if prob and ignore_index >= 0:
        check_prob(x, target, weight, reduction, smoothing, wide, 0)
        raise RuntimeError("ignore_index is not supported for floating point target")
    if not prob and weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("cross_entropy: weight: its gradient is defined for class probabilities only")
    save = STATISTICS if x.dim() and x.shape[class_dim(x)] > LONG_ROW else 0
    if bare and x.is_cpu and _backend.forced == "auto":
        if prob:
            check_prob(x, target, weight, reduction, smoothing, wide, 0)
        else:
            casts = weight is not None and torch.is_autocast_enabled("cpu")  # then weights may have another dtype
            check(x, target, weight, ignore_index, reduction, smoothing, wide or casts, 0)
        if fused is None and (prob or not _op_is_faster(x, reduction, needs_grad)):
            # Where an ignored row holds NaN aten's gradient has NaN too.
            strange = not prob and needs_grad and bool((target == ignore_index).any()) and not x.detach().sum().isfinite()
            if not strange:
                return _by_aten(x, target, weight, ignore_index, reduction, smoothing, wide)
        save, fused = 0, needs_grad if fused is None else fused
    if prob:
        loss: Tensor = prob_op(x, target, weight, reduction, smoothing, wide, save)[0]
        return loss
    if _backend.CHECK and bare and not x.is_meta:
        raise_for_bad_target(target, x.shape[class_dim(x)], ignore_index)
    if fused and bare and needs_grad:
        save = GRADIENT
    loss = forward_op(x, target, weight, ignore_index, reduction, smoothing, wide, save)[0]
    return loss


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    num_items: float | Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    if not (isinstance(x, Tensor) and isinstance(target, Tensor) and (weight is None or isinstance(weight, Tensor))):
        got = ", ".join(type(t).__name__ for t in (x, target, weight))
        raise TypeError(f"cross_entropy: input, target, weight: expected tensors, got {got}")
    number = torch.nn._reduction.get_enum(reduction)
    if num_items is None:
        return _loss(x, target, weight, ignore_index, number, label_smoothing, False, fused)
    if number != MEAN:
        raise ValueError(f"num_items: the divisor of reduction 'mean', got reduction {reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected a number or a tensor of one element, got {described(num_items)}")
        num_items = num_items.reshape(())
    loss = _loss(x, target, weight, ignore_index, SUM, label_smoothing, True, fused) / num_items
    return loss.to(widened(x) if torch.is_autocast_enabled(x.device.type) else x.dtype)
