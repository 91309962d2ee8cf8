"""cross_entropy in plain torch, for any device. The formulas are those of kernels/cross_entropy.py.

On the CPU eager's three buffers of the size of the logits (log-probabilities, their gradient, the logits' gradient) cost more
than the arithmetic once they leave the cache. Here the logits go by in pieces that stay in it, and the one large buffer is the
gradient. There are two ways to the probabilities of a piece: aten's softmax where its rows are longer than a vector and nothing
else is asked, else maximum, difference and exp2, which is several times faster than aten's exp. See docs/ops/cross_entropy.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 19  # elements: small enough for the cache, large enough that the cost of calling aten does not count
LOG2_E = 1.4426950408889634
MEAN = 1  # reductions are torch's: 0 none, 1 mean, 2 sum
STATISTICS, GRADIENT = 1, 2  # what forward saves; see ops/cross_entropy.py
FAR = 69.0  # -log p above which p itself is too small, in float32, for its logarithm

_unsafe_view = torch.ops.aten._unsafe_view.default  # a view that counts as a fresh tensor: users may write to it in place

# ---- how the logits are seen ----------------------------------------------------------------------------------------


def _in_rows(x: Tensor) -> bool:
    """Whether to see x as rows (R, C), its classes neighbours in memory, or as planes (N, C, L).

    aten vectorises a softmax over the classes of the first and over the positions of the second, so that a matrix with fewer
    classes than a vector has lanes is better seen as one plane.
    """
    if x.dim() == 1:
        return True
    if x.shape[1] < 64 // x.element_size():
        return False
    return x.dim() == 2 or (x.stride(1) == 1 and x.stride(0) == x.shape[1] * math.prod(x.shape[2:]))


def _seen(t: Tensor, in_rows: bool) -> Tensor:
    """t (C,), (N, C) or (N, C, *) with its classes in dimension 1 of two or three."""
    if t.dim() == 1:
        return t.unsqueeze(0)
    if t.dim() == 2:
        return t if in_rows else t.t().unsqueeze(0)
    positions = math.prod(t.shape[2:])
    if in_rows:
        return t.movedim(1, -1).reshape(t.shape[0] * positions, t.shape[1])
    return t.reshape(t.shape[0], t.shape[1], positions)


def _per_row(v: Tensor) -> tuple[int, ...]:
    """The shape of v without its classes."""
    return (*v.shape[:1], *v.shape[2:])


def _classes_of(v: Tensor, weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """weight (C,), to broadcast against v."""
    return None if weight is None else weight.to(dtype).view(-1, *[1] * (v.dim() - 2))


def _pieces(v: Tensor) -> Iterator[tuple[Any, Any]]:
    """Indices of the pieces of v, and of the same rows without the classes. Off the CPU one piece is all of it."""
    size = PIECE if v.is_cpu else v.numel()
    classes = max(v.shape[1], 1)
    columns = max(1, min(math.prod(v.shape[2:]), size // classes))
    step = max(1, size // (classes * columns))
    for i in range(0, v.shape[0], step):
        some = slice(i, i + step)
        if v.dim() == 2:
            yield some, some
        else:
            for j in range(0, v.shape[2], columns):
                yield (some, slice(None), slice(j, j + columns)), (some, slice(j, j + columns))


def _gradient_like(x: Tensor, in_rows: bool) -> tuple[Tensor, Tensor]:
    """(dx like x, a tensor to fill in its place): the same memory where dx can be seen that way."""
    dx = torch.empty_like(x)
    dv = _seen(dx, in_rows)
    return dx, dv if dv.data_ptr() == dx.data_ptr() else torch.empty_like(dv)


def _filled(dx: Tensor, dv: Tensor) -> Tensor:
    """dx, once its stand-in is written."""
    if dv.data_ptr() != dx.data_ptr():  # only for three dimensions or more
        if dv.dim() == 2:
            dv = dv.view(dx.shape[0], -1, dx.shape[1]).transpose(1, 2)
        dx.copy_(dv.reshape(dx.shape))
    return dx


def _wide(*tensors: Tensor | None) -> torch.dtype:
    """What to compute in."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None], torch.float32)


def _reduced(rows: Tensor, divisor: Tensor | int, reduction: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    if reduction:
        total = rows.sum()
        return (total / divisor if reduction == MEAN else total).to(dtype)
    losses: Tensor = _unsafe_view(rows.to(dtype), x.shape[:1] + x.shape[2:] if x.dim() > 1 else ())
    return losses


def _row_cotangent(dy: Tensor, v: Tensor, reduction: int, divisor: Tensor | int) -> Tensor:
    """The cotangent of the rows' losses: one for all, or one each."""
    if reduction:
        return dy / divisor if reduction == MEAN else dy
    return dy.reshape(_per_row(v))


def _spread(rows: Tensor) -> Tensor:
    """Numbers of rows, or one for all, to broadcast against the logits."""
    return rows if rows.dim() == 0 else rows.unsqueeze(1)


def _part(rows: Tensor, index: Any) -> Tensor:
    return rows if rows.dim() == 0 else rows[index].unsqueeze(1)


# ---- class indices --------------------------------------------------------------------------------------------------


def raise_for_bad_target(target: Tensor, classes: int, ignore_index: int) -> None:
    """IndexError for the first target that is neither a class nor ignore_index. On a GPU this waits for the device."""
    bad = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bad.any():
        row = tuple(bad.nonzero()[0].tolist())
        raise IndexError(f"Target {int(target[row])} is out of bounds: at {row}, for {classes} classes")


class _Rows:
    """What the targets say about each row."""

    def __init__(self, v: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float) -> None:
        self.classes, self.smoothing, self.dtype = v.shape[1], max(smoothing, 0.0), _wide(v)
        target = target.reshape(_per_row(v)).long()
        self.valid = self._check(target, ignore_index)  # None: all of them
        if self.valid is not None:
            target = torch.where(self.valid, target, 0)
        self.index = target.unsqueeze(1)
        self.class_weight = _classes_of(v, weight, self.dtype)
        self.weight = None if weight is None or not self.classes else weight.to(self.dtype)[target]

    def _check(self, target: Tensor, ignore_index: int) -> Tensor | None:
        if target.is_cpu and target.numel():
            low, high = (int(bound) for bound in torch.aminmax(target))
            if low >= 0 and high < self.classes and not low <= ignore_index <= high:
                return None
            raise_for_bad_target(target, self.classes, ignore_index)
        return target != ignore_index

    def divisor(self) -> Tensor:
        """What "mean" divides by."""
        if self.weight is not None:
            return (self.weight if self.valid is None else torch.where(self.valid, self.weight, 0)).sum()
        if self.valid is not None:
            return self.valid.sum().to(self.dtype)
        return torch.full((), float(self.index.numel()), dtype=self.dtype, device=self.index.device)

    def losses(self, nll: Tensor, smooth: Tensor | None) -> Tensor:
        """From -log p of the target and, where labels are smoothed, the sum of w (-log p) over the classes."""
        if self.weight is not None:
            nll = nll * self.weight
        if smooth is not None:
            nll = (1 - self.smoothing) * nll + self.smoothing / self.classes * smooth
        return nll if self.valid is None else torch.where(self.valid, nll, 0)

    def scales(self, cotangent: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(a, b, extra): dx = a p - b w, and at the target a (p - 1) + extra, the same without cancellation."""
        if self.valid is not None:
            cotangent = torch.where(self.valid, cotangent, 0)
        if not self.smoothing:
            return cotangent if self.weight is None else cotangent * self.weight, None, None
        b = cotangent * (self.smoothing / self.classes)
        if self.weight is None or self.class_weight is None:
            return cotangent, b, b * (self.classes - 1)
        total = self.class_weight.sum()
        return cotangent * ((1 - self.smoothing) * self.weight) + b * total, b, b * (total - self.weight)


def _softmax_suffices(v: Tensor, rows: _Rows) -> bool:
    return v.dim() == 2 and rows.dtype == torch.float32 and not rows.smoothing


def _repaired(nll: Tensor, v: Tensor, rows: _Rows) -> Tensor:
    """nll = -log p, taken again from the logits where p was too small for its logarithm."""
    far = (nll > FAR).nonzero().squeeze(1)
    if far.numel():
        x = v[far]
        nll[far] = torch.logsumexp(x, 1) - x.gather(1, rows.index[far]).squeeze(1)
    return nll


def _losses(v: Tensor, rows: _Rows, statistics: Tensor) -> Tensor:
    """The rows' losses; fills statistics (2, R) unless it is empty."""
    shape = _per_row(v)
    nll = torch.empty(shape, dtype=rows.dtype, device=v.device)
    if not rows.classes:  # all targets are ignored
        return nll.zero_()
    smooth = torch.empty_like(nll) if rows.smoothing else None
    if _softmax_suffices(v, rows) and not statistics.numel():
        for piece, part in _pieces(v):
            p = torch.softmax(v[piece], 1, dtype=rows.dtype)
            torch.gather(p, 1, rows.index[piece], out=nll[part].unsqueeze(1))
        return rows.losses(_repaired(nll.log_().neg_(), v, rows), None)
    m, s = statistics.view(2, *shape) if statistics.numel() else (None, None)
    for piece, part in _pieces(v):
        log_p = torch.log_softmax(v[piece], 1, dtype=rows.dtype)
        torch.neg(log_p.gather(1, rows.index[piece]).squeeze(1), out=nll[part])
        if smooth is not None:
            weighted = log_p if rows.class_weight is None else log_p * rows.class_weight
            torch.sum(weighted, 1, out=smooth[part]).neg_()
        if m is not None and s is not None:
            m[part], s[part] = v[piece].amax(1), log_p.amax(1).neg_().exp_()
    return rows.losses(nll, smooth)


def _gradient(v: Tensor, rows: _Rows, cotangent: Tensor, dv: Tensor) -> Tensor:
    """Fills dv with the gradient of v and returns the rows' losses. cotangent: of those losses, one for all or one each."""
    nll = torch.empty(_per_row(v), dtype=rows.dtype, device=v.device)
    if not rows.classes:
        return nll.zero_()
    smooth = torch.empty_like(nll) if rows.smoothing else None
    a, b, extra = rows.scales(cotangent)
    use_softmax = _softmax_suffices(v, rows) and v.dtype == rows.dtype
    for piece, part in _pieces(v):
        x, dx, index, scale = v[piece], dv[piece], rows.index[piece], _part(a, part)
        if use_softmax:
            p = torch.softmax(x, 1, out=dx)
            log_p = p.gather(1, index).log_()
            p.mul_(scale)
        else:
            x = x.to(rows.dtype)
            p = dx if dx.dtype == rows.dtype else x
            torch.sub(x, x.amax(1, keepdim=True), out=p)
            log_p = p.gather(1, index)
            if smooth is not None:
                smooth[part] = -(p.sum(1) if rows.class_weight is None else (p * rows.class_weight).sum(1))
            p.mul_(LOG2_E).exp2_()
            s = p.sum(1, keepdim=True)
            p.mul_(scale / s)
            log_p.sub_(s.log_())
            if smooth is not None:
                total = rows.classes if rows.class_weight is None else rows.class_weight.sum()
                smooth[part] += total * s.squeeze(1)
        torch.neg(log_p.squeeze(1), out=nll[part])
        at_target = log_p.expm1_().mul_(scale)
        if b is not None and extra is not None:
            p.sub_(_part(b, part) if rows.class_weight is None else _part(b, part) * rows.class_weight)
            at_target += _part(extra, part)
        p.scatter_(1, index, at_target)
        if rows.valid is not None:  # an ignored row has no gradient, whatever it holds
            bad = nll[part].isnan().logical_and_(~rows.valid[part])
            if not v.is_cpu or bad.any():
                p.masked_fill_(bad.unsqueeze(1), 0)
        if p.data_ptr() != dx.data_ptr():
            dx.copy_(p)
    return rows.losses(_repaired(nll, v, rows) if use_softmax else nll, smooth)


def cross_entropy(
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
    wide: bool,
    save: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    in_rows, dtype = _in_rows(x), _wide(x)
    v = _seen(x, in_rows)
    rows = _Rows(v, target, weight, ignore_index, label_smoothing)
    divisor = rows.divisor() if reduction == MEAN else x.new_empty((0,), dtype=dtype)
    statistics = x.new_empty((2, target.numel() if save == STATISTICS else 0), dtype=dtype)
    if save == GRADIENT:
        dx, dv = _gradient_like(x, in_rows)
        scaled = reduction == MEAN and x.dtype != torch.float16  # float16 would flush what a loss scale is to save
        losses = _gradient(v, rows, divisor.reciprocal() if scaled else x.new_ones((), dtype=dtype), dv)
        dx = _filled(dx, dv)
    else:
        dx = x.new_empty((0,))
        losses = _losses(v, rows, statistics)
    return _reduced(losses, divisor, reduction, x, dtype if wide else x.dtype), statistics, divisor, dx


def cross_entropy_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    divisor: Tensor,
    ignore_index: int,
    reduction: int,
    label_smoothing: float,
) -> Tensor:
    in_rows = _in_rows(x)
    v = _seen(x, in_rows)
    rows = _Rows(v, target, weight, ignore_index, label_smoothing)
    dx, dv = _gradient_like(x, in_rows)
    _gradient(v, rows, _row_cotangent(dy.to(rows.dtype), v, reduction, divisor), dv)
    return _filled(dx, dv)


# ---- class probabilities --------------------------------------------------------------------------------------------


def _smoothed(q: Tensor, smoothing: float, dtype: torch.dtype) -> Tensor:
    q = q.to(dtype)
    return q * (1 - smoothing) + smoothing / q.shape[1] if smoothing > 0 else q


def cross_entropy_prob(
    x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, label_smoothing: float, wide: bool, save: int
) -> tuple[Tensor, Tensor]:
    in_rows, dtype = _in_rows(x), _wide(x, target, weight)
    v, t = _seen(x, in_rows), _seen(target, in_rows)
    class_weight, shape = _classes_of(v, weight, dtype), _per_row(v)
    losses = torch.empty(shape, dtype=dtype, device=x.device)
    statistics = x.new_empty((3, losses.numel() if save == STATISTICS else 0), dtype=dtype)
    m, s, u = statistics.view(3, *shape) if save == STATISTICS else (None, None, None)
    for piece, part in _pieces(v):
        log_p, q = torch.log_softmax(v[piece], 1, dtype=dtype), _smoothed(t[piece], label_smoothing, dtype)
        if class_weight is not None:
            q = q * class_weight
        torch.sum(log_p * q, 1, out=losses[part]).neg_()
        if m is not None and s is not None and u is not None:
            m[part], s[part], u[part] = v[piece].amax(1), log_p.amax(1).neg_().exp_(), q.sum(1)
    divisor = x.numel() // max(v.shape[1], 1)
    return _reduced(losses, divisor, reduction, x, _result_type(x, target, weight, wide)), statistics


def _result_type(x: Tensor, target: Tensor, weight: Tensor | None, wide: bool) -> torch.dtype:
    return (
        _wide(x, target, weight)
        if wide
        else functools.reduce(torch.promote_types, [t.dtype for t in (x, target, weight) if t is not None])
    )


def cross_entropy_prob_backward(
    dy: Tensor,
    x: Tensor,
    target: Tensor,
    weight: Tensor | None,
    statistics: Tensor,
    reduction: int,
    label_smoothing: float,
    mask: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    in_rows, dtype = _in_rows(x), _wide(x, target, weight)
    v, t = _seen(x, in_rows), _seen(target, in_rows)
    class_weight = _classes_of(v, weight, dtype)
    cotangent = _row_cotangent(dy.to(dtype), v, reduction, x.numel() // max(v.shape[1], 1))
    dx, dv = _gradient_like(x, in_rows) if mask[0] else (None, None)
    dt, dtv = _gradient_like(target, in_rows) if mask[1] else (None, None)
    for piece, part in _pieces(v):
        log_p, g = torch.log_softmax(v[piece], 1, dtype=dtype), _part(cotangent, part)
        if dtv is not None:
            slope = -g * (1 - max(label_smoothing, 0.0))
            dtv[piece] = log_p * (slope if class_weight is None else slope * class_weight)
        if dv is not None:
            q = _smoothed(t[piece], label_smoothing, dtype)
            if class_weight is not None:
                q = q * class_weight
            dv[piece] = (log_p.mul_(LOG2_E).exp2_() * q.sum(1, keepdim=True)).sub_(q).mul_(g)
    return (
        None if dx is None or dv is None else _filled(dx, dv),
        None if dt is None or dtv is None else _filled(dt, dtv),
    )


def explain(name: str, x: Tensor, *args: Any) -> str:
    if name.startswith("cross_entropy_prob"):
        return "log_softmax and products, piece by piece"
    return "softmax or log_softmax, gather and scatter, piece by piece"
