"""linear_relu in plain torch, for any device.

aten multiplies float32 matrices on the CPU with MKL, which takes a generic 256-bit path on AMD processors; oneDNN uses
AVX-512. Where the vector units are 512 bits wide (Zen 5) that doubles the rate; where they are 256 (Zen 4) it helps some
shapes by 5 to 50 % (docs/performance.md). oneDNN's fused ReLU turns NaN into 0, so ReLU runs in place afterwards.
"""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
_unsafe_view = aten._unsafe_view.default  # a view that counts as a fresh tensor: users may write to it in place
_threshold_backward = aten.threshold_backward.default
_linear = torch.nn.functional.linear
_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

ZEN_4, ZEN_5 = 25, 26  # the processors' family; family 25 with AVX-512 is Zen 4


@functools.cache
def onednn_family() -> int:
    """ZEN_4 or ZEN_5 where oneDNN's float32 product pays, else 0. A rule and not a timing: results do not vary by run."""
    if _onednn is None or not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return 0
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return 0
    try:
        about = Path("/proc/cpuinfo").read_text()
        family = re.search(r"cpu family\s*: (\d+)", about)
        if "AuthenticAMD" not in about or family is None:
            return 0
        # The operator is private to torch: trust it only if it still does this. Dtype and device may not be torch's defaults.
        a = torch.arange(6, dtype=torch.float32, device="cpu").view(2, 3)
        if not torch.equal(_onednn(a, a[:1], None, "none", [], ""), a @ a[:1].t()):
            return 0
    except (OSError, RuntimeError, TypeError, NotImplementedError):
        return 0
    return ZEN_5 if int(family[1]) >= ZEN_5 else ZEN_4


@functools.cache
def least_products() -> int:
    """From how many multiply-adds M K N on oneDNN saves more than a Python operator costs; without oneDNN none is enough."""
    return {ZEN_5: 2**22, ZEN_4: 2**26}.get(onednn_family(), 2**63)


def beats_aten(x: Tensor, weight: Tensor) -> bool:
    """Whether linear_relu here is more than aten's linear and ReLU."""
    return x.dtype == torch.float32 and x.is_cpu and x.numel() * weight.shape[0] >= least_products()


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b.T + bias for matrices of any strides."""
    if bias is not None:  # which oneDNN takes for contiguous, whatever its stride
        bias = bias.contiguous()
    result: Tensor = _onednn(a, b, bias, "none", [], "")
    return result


def _as_2d(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def linear_relu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = _onednn_product if beats_aten(x, weight) else _linear
    y = product(_as_2d(x), weight, bias).relu_()
    if x.dim() == 2:
        return y
    view: Tensor = _unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
    return view


def linear_relu_backward(
    dy: Tensor, x: Tensor, weight: Tensor, y: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dz = _as_2d(_threshold_backward(dy, y, 0))
    onednn = beats_aten(x, weight)
    dx = dweight = None
    if mask[0]:
        dx = _onednn_product(dz, weight.t()) if onednn else dz.mm(weight)
        if x.dim() != 2:
            dx = _unsafe_view(dx, x.shape)
    if mask[1]:
        # On Zen 4 oneDNN is slower at the weight gradient where its rows are short.
        onednn = onednn and (x.shape[-1] >= 1024 or onednn_family() == ZEN_5)
        dweight = _onednn_product(dz.t(), _as_2d(x).t()) if onednn else dz.t().mm(_as_2d(x))
    return dx, dweight, dz.sum(0) if mask[2] else None


def explain(name: str, *args: Any) -> str:
    x, weight = args[1:3] if name == "linear_relu_backward" else args[:2]
    return f"{'oneDNN' if beats_aten(x, weight) else 'aten'}'s matrix products, ReLU in place"
