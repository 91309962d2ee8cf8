"""When a result counts as correct: the one rule of the tests and of the bench gate.

    close_enough(got, eager, exact, dtype) -> None if `got` is right, else a sentence saying what is wrong
    relative_error(t, exact) -> float, for tables

`exact` is the float64 reference, `eager` what torch computes in the dtype and on the device of `got`. With the error
e(t) = |t - exact|, both as a maximum and as a 2-norm,

    e(got) <= 2 e(eager) + 4 eps(dtype) |exact| + 4 eps(accumulator) terms

The first term asks for torch's accuracy; the second is the rounding of the result itself, for eager may be exact by chance
(64 times as much in float64, where the reference is no better). The third is 0 unless the caller names `terms`, the largest
sum of absolute products behind one element (max of |a| @ |b|): small random problems need it, where eager happens to be exact
and cancellation makes the result much smaller than its terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

EAGER_FACTOR = 2  # another order of summation may double an error, not more
EPS_FACTOR = 4
FLOAT64_FACTOR = 64  # in float64 the reference is rounded as well, and eager may be the reference itself, its error 0


def close_enough(
    got: Tensor | None,
    eager: Tensor | None,
    exact: Tensor | None,
    dtype: torch.dtype | None = None,
    *,
    terms: float = 0.0,
) -> str | None:
    """What is wrong with `got`, or None.

    Args:
        got: the result under test; None where torch gives None (a gradient that nobody wanted).
        eager: torch's result. None where torch is known to be wrong or to hang: then `exact` alone decides.
        exact: the result in float64, of the same shape.
        dtype: whose rounding is allowed; default: that of `got`. Name it where a result is wider than what it was
            computed in, e.g. float32 gradients under bfloat16 autocast.
        terms: see the module's docstring.
    """
    if got is None or exact is None:
        return None if got is exact else f"is {_kind(got)}, expected {_kind(exact)}"
    if got.shape != exact.shape:
        return f"has shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if eager is not None:
        if eager.shape != exact.shape:
            return f"cannot be judged: eager has shape {tuple(eager.shape)}, the reference {tuple(exact.shape)}"
        if got.dtype != eager.dtype:
            return f"has dtype {got.dtype}, expected {eager.dtype}"
        if got.device != eager.device:
            return f"is on {got.device}, expected {eager.device}"
    if not got.is_floating_point():
        return _first(got != exact, "differs", got, exact) if (got != exact).any() else None

    got, exact = got.detach(), exact.detach().to(got.device)
    eager = exact.to(got.dtype) if eager is None else eager.detach()  # rounded once: as good as a result can be
    finite = eager.isfinite()
    if not (finite.all() and got.isfinite().all() and exact.isfinite().all()):
        for name, test in (("NaN", torch.isnan), ("inf", torch.isposinf), ("-inf", torch.isneginf)):
            if (bad := test(got) != test(eager)).any():
                return _first(bad, f"{name} in one of the two", got, eager)
        if (bad := finite & ~exact.isfinite()).any():
            return _first(bad, "cannot be judged: the reference is not finite", eager, exact)
        got, eager, exact = got[finite], eager[finite], exact[finite]
    if not got.numel():
        return None

    dtype = dtype or got.dtype
    eps = torch.finfo(dtype).eps * (FLOAT64_FACTOR if dtype == torch.float64 else 1)
    accumulator = torch.finfo(torch.float64 if got.dtype == torch.float64 else torch.float32).eps
    error, eager_error = ((t.double() - exact).abs() for t in (got, eager))
    slack = EPS_FACTOR * accumulator * terms
    allowed = EAGER_FACTOR * eager_error.max() + EPS_FACTOR * eps * exact.abs().max() + slack
    if not error.max() <= allowed:
        what = f"error {error.max():.3g} > {allowed:.3g} allowed (eager's: {eager_error.max():.3g})"
        return _first(error == error.max(), what, got, exact)
    norm = torch.linalg.vector_norm
    allowed = EAGER_FACTOR * norm(eager_error) + EPS_FACTOR * eps * norm(exact) + slack * got.numel() ** 0.5
    if not norm(error) <= allowed:
        return f"error norm {norm(error):.3g} > {allowed:.3g} allowed (eager's: {norm(eager_error):.3g})"
    return None


def relative_error(t: Tensor, exact: Tensor) -> float:
    """max |t - exact| / max |exact|, over the elements that are finite in both; 0 for no elements."""
    t, exact = t.detach().double().flatten(), exact.detach().to(t.device).flatten()
    finite = t.isfinite() & exact.isfinite()
    if not finite.any():
        return 0.0
    error, scale = (t - exact)[finite].abs().max(), exact[finite].abs().max()
    return float(error / scale) if scale else float(error)


def _kind(t: Tensor | None) -> str:
    return "None" if t is None else "a tensor"


def _first(bad: Tensor, what: str, got: Tensor, want: Tensor) -> str:
    """The sentence for the first bad element."""
    index = tuple(bad.nonzero()[0].tolist())
    return f"{what}: at {index} {got[index].item()!r}, expected {want[index].item()!r} ({int(bad.sum())} elements)"
