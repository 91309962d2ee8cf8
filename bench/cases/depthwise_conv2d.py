"""depthwise_conv2d: what is checked and timed. Names are N x C x H(=W), K, stride and dilation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dlaccel.bench.case import Case, implementation, normal

EAGER = "F.conv2d(x, weight, bias, ..., groups=C)"
COUNTER_DIFFERS = "torch's FLOP counter multiplies the weight gradient of a grouped convolution by the number of groups"


def eager(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Tensor:
    return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, input.shape[-3])


def reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """The sum over the taps of shifted images times weights; for large images aten's own, which in float64 is exact enough."""
    if input.numel() > 2**16:
        return torch.nn.functional.conv2d(input, weight, bias, stride, padding, dilation, input.shape[-3])
    x = input if input.dim() == 4 else input.unsqueeze(0)
    (sh, sw), (dh, dw) = ((v, v) if isinstance(v, int) else v for v in (stride, dilation))
    kh, kw = weight.shape[2:]
    if isinstance(padding, str):
        rows, columns = ((kh - 1) * dh, (kw - 1) * dw) if padding == "same" else (0, 0)
        top, left = rows // 2, columns // 2
        bottom, right = rows - top, columns - left
    else:
        top, left = (padding, padding) if isinstance(padding, int) else padding
        bottom, right = top, left
    x = torch.nn.functional.pad(x, (left, right, top, bottom))
    x = x.repeat_interleave(weight.shape[0] // x.shape[1], 1)
    oh, ow = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1, (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    y = None
    for i in range(kh):
        for j in range(kw):
            image = x[:, :, i * dh : i * dh + (oh - 1) * sh + 1 : sh, j * dw : j * dw + (ow - 1) * sw + 1 : sw]
            term = image * weight[:, 0, i, j, None, None]
            y = term if y is None else y + term
    assert y is not None
    y = y if bias is None else y + bias[:, None, None]
    return y if input.dim() == 4 else y.squeeze(0)


def case(
    n: int,
    c: int,
    size: int | tuple[int, int],
    k: int | tuple[int, int] = 3,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: str | int | tuple[int, int] | None = None,
    multiplier: int = 1,
    bias: bool = False,
    layout: str = "contiguous",
    name: str = "",
    tags: tuple[str, ...] = (),
    devices: tuple[str, ...] = ("cpu", "cuda"),
) -> Case:
    (h, w), (kh, kw) = ((v, v) if isinstance(v, int) else v for v in (size, k))
    if padding is None:
        padding = (dilation * (kh // 2), dilation * (kw // 2))
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def make(generator: torch.Generator, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = normal((n, c, h, w), generator, dtype).contiguous(memory_format=memory_format)
        weight = normal((c * multiplier, 1, kh, kw), generator, dtype) / (kh * kw) ** 0.5
        weight = weight.contiguous(memory_format=memory_format)
        return (x, weight, normal((c * multiplier,), generator, dtype)) if bias else (x, weight)

    def call(f: object, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        assert callable(f)
        y: Tensor = f(x, weight, bias, stride, padding, dilation)
        return y

    def outputs(size: int, kernel: int, d: int) -> int:
        if padding == "same":
            return size
        pad = 0 if isinstance(padding, str) else padding if isinstance(padding, int) else padding[d]
        return (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1

    x_size, y_size = n * c * h * w, n * c * multiplier * outputs(h, kh, 0) * outputs(w, kw, 1)
    products = {"fwd": 1, "dgrad": 1, "wgrad": 1, "bwd": 2, "train": 3}

    def traffic(mode: str, itemsize: int) -> int:
        both = 2 * x_size + y_size  # x, dy; dx
        one = x_size + y_size
        return {"fwd": one, "dgrad": one, "wgrad": one, "bwd": both, "train": one + both}[mode] * itemsize

    def flops(mode: str, itemsize: int) -> int:
        return products[mode] * 2 * y_size * kh * kw

    suffix = f" s{stride}" * (stride > 1) + f" d{dilation}" * (dilation > 1) + f" m{multiplier}" * (multiplier > 1)
    long_name = f"{n}x{c}x{h} K{kh}{suffix}" + " channels_last" * (layout == "channels_last")
    return Case(
        op="depthwise_conv2d", name=name or long_name, make=make, call=call, layout=layout, tags=frozenset(tags),
        shape={"N": n, "C": c, "H": h, "W": w, "KH": kh, "KW": kw, "stride": stride, "dilation": dilation},
        modes=("fwd", "dgrad", "wgrad", "train"), devices=devices, bytes=traffic, flops=flops, eager_form=EAGER,
    )  # fmt: skip


SAMPLES = [
    case(1, 2, (4, 3), padding=1, bias=True, name="bias"),
    case(2, 1, (4, 3), 2, stride=2, padding=(1, 0), name="stride 2"),
    case(1, 2, (5, 4), (2, 3), padding="same", dilation=2, multiplier=2, name="same, dilation 2, multiplier 2"),
    case(0, 3, (5, 4), padding=1, bias=True, name="empty batch"),
    case(1, 5, (6, 5), (4, 5), bias=True, layout="channels_last", name="4x5 channels_last"),
    case(2, 2, (3, 13), (1, 9), stride=2, name="1x9"),
]

GOAL = [(8, 240, 28, 5, 1), (8, 64, 55, 5, 1), (8, 96, 56, 7, 1), (8, 96, 28, 7, 1), (8, 256, 28, 3, 2), (8, 72, 41, 3, 2)]
UNDILATED_3X3 = [(8, 128, 56, 1), (8, 64, 112, 2), (8, 512, 14, 1), (8, 384, 14, 1), (8, 960, 7, 1)]
# Every distinct depthwise layer (C, H, K, stride) of timm 1.0.31's mobilenetv1_100, mobilenetv2_100, efficientnet_b0,
# legacy_xception and convnext_tiny that is not among the rows above.
LAYERS = sorted(
    {
        *[(32, 112, 3, 1), (128, 56, 3, 2), (256, 28, 3, 1), (256, 28, 3, 2), (512, 14, 3, 2), (1024, 7, 3, 1)],
        *[(96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 3, 2), (192, 28, 3, 1), (192, 28, 3, 2), (576, 14, 3, 1)],
        *[(576, 14, 3, 2), (144, 56, 5, 2), (240, 28, 3, 2), (480, 14, 3, 1), (480, 14, 5, 1), (672, 14, 5, 1)],
        *[(672, 14, 5, 2), (1152, 7, 5, 1), (1152, 7, 3, 1), (64, 147, 3, 1), (128, 147, 3, 1), (128, 74, 3, 1)],
        *[(256, 74, 3, 1), (256, 37, 3, 1), (728, 37, 3, 1), (728, 19, 3, 1), (1024, 10, 3, 1), (1536, 10, 3, 1)],
        *[(192, 28, 7, 1), (384, 14, 7, 1), (768, 7, 7, 1)],
    }
)
LAYOUTS = ("contiguous", "channels_last")

CASES = [
    *[
        case(n, c, h, k, dilation=d, layout=layout, tags=("goal", "quick") if h == 28 and c < 256 else ("goal",))
        for n, c, h, k, d in GOAL
        for layout in LAYOUTS
    ],
    *[
        case(n, c, h, stride=s, layout=layout, tags=("no loss", "quick") if (h, s) == (56, 1) else ("no loss",))
        for n, c, h, s in UNDILATED_3X3
        for layout in LAYOUTS
    ],
    *[case(2 if h > 100 else 8, c, h, k, stride=s, layout=layout) for c, h, k, s in LAYERS for layout in LAYOUTS],
    *[case(2, 64, 32, 31, layout=layout, devices=("cpu",)) for layout in LAYOUTS],
    *[case(2, 64, 56, 3, multiplier=2, layout=layout) for layout in LAYOUTS],
    *[case(4, 256, 33, 3, dilation=12, layout=layout) for layout in LAYOUTS],
    *[case(1, 8, 8, layout="contiguous", tags=("overhead",))],
    # ConvNeXt's, RepLKNet's (arXiv 2203.06717) and KernelBench's level 1 problem 82.
    *[
        case(n, c, h, k, layout=layout, devices=("cuda",))
        for n, c, h, k in ((128, 128, 56, 3), (128, 240, 28, 5), (128, 96, 56, 7), (64, 128, 56, 31), (16, 64, 512, 3))
        for layout in LAYOUTS
    ],
]

_ones = torch.ones
_conv = implementation("depthwise_conv2d")
REFUSED = [
    (lambda: _conv(_ones(4, 4), _ones(2, 1, 3, 3)), RuntimeError, r"input: expected \(C, H, W\) or \(N, C, H, W\)"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3)), RuntimeError, r"weight: expected \(C \* multiplier, 1, KH, KW\)"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 2, 3, 3)), RuntimeError, r"weight: expected \(C \* multiplier, 1, KH, KW\)"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(3, 1, 3, 3)), RuntimeError, r"weight: expected \(2 \* multiplier, 1, KH, KW\)"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3).double()), RuntimeError, "weight: expected torch.float32"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3, device="meta")), RuntimeError, "weight: expected torch.float32 on cpu"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), _ones(3)), RuntimeError, r"bias: expected \(2,\)"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), _ones(2).double()), RuntimeError, "bias: expected torch.float32"),
    (lambda: _conv(_ones(1, 2, 4, 4).int(), _ones(2, 1, 3, 3).int()), RuntimeError, "floating-point"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 5, 5)), RuntimeError, "does not fit into"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), stride=0), RuntimeError, "non-positive stride is not supported"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), padding=-1), RuntimeError, "negative padding is not supported"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), dilation=0), RuntimeError, "dilation: expected at least 1"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), padding="all"), RuntimeError, "Invalid padding string"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), None, 2, "same"), RuntimeError, "not supported for strided"),
    (lambda: _conv(_ones(1, 2, 4, 4), _ones(2, 1, 3, 3), stride=(1, 1, 1)), RuntimeError, "expected stride to be a single"),
]
