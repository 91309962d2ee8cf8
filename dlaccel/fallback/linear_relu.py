"""linear_relu in plain torch, for any device.

On AMD processors with AVX-512, float32 products go to oneDNN: MKL, which aten calls, takes its generic path there and
reaches half of oneDNN's rate (docs/performance.md). oneDNN's fused ReLU turns NaN into 0, so ReLU runs in place afterwards.
"""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_unsafe_view = aten._unsafe_view.default  # a view that counts as a fresh tensor: users may write to it in place
_threshold_backward = aten.threshold_backward.default
_linear = torch.nn.functional.linear
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN's float32 product beats aten's here: a rule and not a timing, so that results do not vary by run."""
    if _onednn is None or not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    try:
        if "AuthenticAMD" not in Path("/proc/cpuinfo").read_text():
            return False
        a = torch.arange(6.0).view(2, 3)  # the operator is private to torch: trust it only if it still does this
        return torch.equal(_onednn(a, a[:1], None, "none", [], ""), a @ a[:1].t())
    except (OSError, RuntimeError, TypeError, NotImplementedError):
        return False


def _use_onednn(x: Tensor, *sizes: int) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and 0 not in sizes and onednn_is_faster()


def _matmul_t(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias for matrices of any strides."""
    if _use_onednn(a, *a.shape, b.shape[0]):
        if bias is not None:  # which oneDNN takes for contiguous, whatever its stride
            bias = bias.contiguous()
        result: Tensor = _onednn(a, b, bias, "none", [], "")
        return result
    return _linear(a, b, bias)


def _as_2d(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _matmul_t(_as_2d(x), weight, bias).relu_()
    if x.dim() == 2:
        return y
    view: Tensor = _unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
    return view


def linear_relu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dz = _as_2d(_threshold_backward(dy, y, 0))
    dx = _matmul_t(dz, weight.t()) if mask[0] else None
    if dx is not None and x.dim() != 2:
        dx = _unsafe_view(dx, x.shape)
    dweight = _matmul_t(dz.t(), _as_2d(x).t()) if mask[1] else None
    return dx, dweight, dz.sum(0) if mask[2] else None


def explain(name: str, x: Tensor, *args: Any) -> str:
    product = "oneDNN" if _use_onednn(x) else "aten"
    return f"{product}'s matrix product, then ReLU in place"
