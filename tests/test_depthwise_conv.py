"""depthwise_conv1d and depthwise_conv2d: what the contract tests do not cover."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import dlaccel
import dlaccel.functional as F
from dlaccel.bench.accuracy import close_enough
from dlaccel.bench.cases.depthwise_conv2d import eager, reference
from dlaccel.fallback import depthwise_conv as fallback
from dlaccel.memory_format import suggests_channels_last
from dlaccel.nn import DepthwiseConv1d, DepthwiseConv2d
from dlaccel.ops._register import LAUNCHES, REGISTRY
from tests import conformance
from tests.conformance import DTYPES
from tests.kit import COTANGENTS, DEVICE, LAYOUTS, check, poisoned, sparse, unchanged
from tests.strategies import given, st
from tests.strategies import tensors as drawn_tensors

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def tensors(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    multiplier: int = 1,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    bias: bool = True,
) -> list[Tensor]:
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=FORMATS[layout])
    weight = torch.randn(shape[1] * multiplier, 1, *kernel, device=DEVICE) / (kernel[0] * kernel[1]) ** 0.5
    made = [x, weight.to(dtype), *([torch.randn(len(weight), device=DEVICE).to(dtype)] if bias else [])]
    return [t.requires_grad_() for t in made]


def compare(given_tensors: list[Tensor], g: Tensor | None = None, **options: Any) -> None:
    """Ours against F.conv2d, and against the sum over taps in float64."""
    channels = given_tensors[0].shape[1]
    weight = given_tensors[1].detach().abs().double()
    x_max, g_max = (
        float(t.detach().abs().double().amax()) if t is not None and t.numel() else 4.0 for t in (given_tensors[0], g)
    )
    per_output = float(weight.sum((1, 2, 3)).max())
    outputs = given_tensors[0].shape[0] * 4096
    terms = [
        x_max * per_output,
        g_max * per_output * len(weight) / channels,
        min(x_max * g_max * outputs, 1e4),
        g_max * outputs,
    ]
    wanted = [i for i, t in enumerate(given_tensors) if t.requires_grad]
    check(
        lambda *t: F.depthwise_conv2d(*t, **options),
        lambda *t: torch.nn.functional.conv2d(*t, **options, groups=channels),
        given_tensors,
        g,
        reference=lambda *t: reference(*t, **options),
        terms=[terms[0], *(terms[1 + i] for i in wanted)],
    )


# ---- values ---------------------------------------------------------------------------------------------------------

# (H, W), kernel, stride, padding, dilation, multiplier: the edges of a tile of 16 x 16 that slides by 4, and every path
GEOMETRIES: list[tuple[Any, ...]] = [
    ((5, 17), (3, 3), 1, 1, 1, 1),
    ((17, 6), (3, 3), 2, 1, 1, 1),
    ((9, 8), (5, 5), 2, 2, 1, 2),
    ((5, 7), (7, 7), 1, 3, 1, 1),
    ((8, 9), (3, 3), 1, 2, 2, 1),
    ((9, 11), (3, 3), 2, 2, 2, 1),
    ((12, 7), (3, 2), (3, 2), (1, 0), (2, 1), 3),
    ((11, 10), (1, 7), 1, (0, 3), 1, 1),
    ((7, 12), (3, 1), (2, 1), (1, 0), 1, 1),
    ((5, 6), (1, 1), 3, 2, 1, 1),
    ((1, 1), (3, 3), 1, 1, 1, 2),
    ((6, 7), (4, 4), 1, "same", 1, 1),
    ((9, 9), (2, 3), 1, "same", 2, 1),
    ((4, 5), (3, 3), 1, 5, 1, 1),
    ((6, 7), (3, 3), 1, 9, 9, 1),
    ((3, 12), (1, 11), 1, (0, 5), 1, 1),
    ((4, 11), (1, 10), 2, (0, 4), 1, 2),
]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_geometries(backend: str, geometry: tuple[Any, ...], layout: str) -> None:
    size, kernel, stride, padding, dilation, multiplier = geometry
    dtype = torch.bfloat16 if max(kernel) == 5 else torch.float32
    with poisoned():
        compare(tensors((2, 3, *size), kernel, multiplier, dtype, layout), stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("channels", [1, 15, 16, 17, 33])
def test_channels_around_the_blocks(backend: str, channels: int, layout: str) -> None:
    with poisoned():
        compare(tensors((2, channels, 3, 5), (2, 2), layout=layout), padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_layouts_of_one_argument(backend: str, argument: int, layout: str) -> None:
    given_tensors = tensors((2, 3, 5, 6), (3, 3))
    given_tensors[argument] = LAYOUTS[layout](given_tensors[argument])
    compare(given_tensors, padding=1)


@pytest.mark.parametrize("cotangent", COTANGENTS)
def test_cotangents(backend: str, cotangent: str) -> None:
    given_tensors = tensors((2, 3, 5, 6), (3, 3))
    g = COTANGENTS[cotangent](torch.empty(2, 3, 5, 6, device=DEVICE))
    with poisoned():
        compare(given_tensors, g, padding=1)


@pytest.mark.parametrize("kernel", [13, 31])
@pytest.mark.parametrize("layout", FORMATS)
def test_large_kernels_of_the_fallback(kernel: int, layout: str) -> None:
    with dlaccel.use_backend("torch"):
        compare(tensors((2, 24, 9, 18), (kernel, kernel), layout=layout), padding=kernel // 2)


def test_one_large_kernel(backend: str) -> None:
    compare(tensors((1, 2, 5, 4), (5, 31)), padding=(2, 15))


def test_large_kernels_are_left_to_torch_on_a_gpu() -> None:
    x, narrow, wide = torch.ones(1, 2, 40, 40), torch.ones(2, 1, 11, 11), torch.ones(2, 1, 3, 13)
    prefers = REGISTRY["depthwise_conv2d"].prefers_torch
    assert prefers is not None
    assert prefers(x, narrow) is None and "tensor cores" in str(prefers(x, wide))
    for name, args in (("dgrad", (x, wide)), ("wgrad", (x, x, (2, 1, 13, 3)))):
        prefers = REGISTRY[f"depthwise_conv2d_{name}"].prefers_torch
        assert prefers is not None and "tensor cores" in str(prefers(*args))


@pytest.mark.parametrize("backend_name", ["torch", "auto"])
def test_shapes_on_which_onednn_never_returns(backend_name: str) -> None:
    """Eager is not called; the error of one rounding decides."""
    x, weight = tensors((1, 8, 15, 40), (15, 15), dtype=torch.bfloat16, layout="channels_last", bias=False)
    with dlaccel.use_backend(backend_name):
        y = F.depthwise_conv2d(x, weight, padding=7)
        g = torch.randn_like(y)
        got = [y, *torch.autograd.grad(y, (x, weight), g)]
    assert all(suggests_channels_last(t) for t in got[:2])
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = reference(*wide, padding=7)
    for p, q in zip(got, [want, *torch.autograd.grad(want, wide, g.double())], strict=True):
        assert (problem := close_enough(p, None, q)) is None, problem


def test_weight_gradient_on_which_onednn_never_returns() -> None:
    """The gradient of a 31 x 31 filter is a convolution whose filter is dy."""
    x, weight = tensors((1, 8, 32, 32), (31, 31), dtype=torch.bfloat16, layout="channels_last", bias=False)
    with dlaccel.use_backend("torch"):
        y = F.depthwise_conv2d(x, weight, padding=15)
        (got,) = torch.autograd.grad(y.sum(), weight)
    padded = torch.nn.functional.pad(x.detach().double(), (15, 15, 15, 15))
    want = padded.unfold(2, 32, 1).unfold(3, 32, 1).sum((0, 4, 5))[:, None]
    assert (problem := close_enough(got, None, want)) is None, problem


def test_sum_of_many_terms_is_accumulated_wide(backend: str) -> None:
    """2116 products of 16-bit ones: a 16-bit accumulator stops at 2048."""
    x, weight = torch.ones(1, 1, 46, 46, device=DEVICE).half(), torch.ones(1, 1, 1, 1, device=DEVICE).half().requires_grad_()
    (dw,) = torch.autograd.grad(F.depthwise_conv2d(x, weight).sum(), weight)
    assert dw.item() == 2116


def test_nan_spreads_to_the_outputs_that_see_it(backend: str) -> None:
    x, weight = (t.detach() for t in tensors((1, 2, 6, 7), (3, 3), bias=False))
    weight[0, 0, 1, 1] = 0
    x[0, 0, 2, 3], x[0, 1, 5, 0] = float("nan"), float("inf")
    got, want = F.depthwise_conv2d(x, weight, padding=1), eager(x, weight, None, 1, 1, 1)
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("stride, width, padding", [(1, 7, 1), (2, 7, 1), (1, 6, 0)])
def test_nan_spreads_to_the_taps_that_see_it(backend: str, layout: str, stride: int, width: int, padding: int) -> None:
    x, weight = (t.detach() for t in tensors((2, 2, 6, width), (3, 3), bias=False))
    x[1, 0, 5, -1], x[0, 1, 0, 0] = float("nan"), float("-inf")
    found = []
    for f in (F.depthwise_conv2d, eager):
        w = weight.clone().requires_grad_()
        y = f(x.contiguous(memory_format=FORMATS[layout]), w, None, stride, padding, 1)
        found += torch.autograd.grad(y, w, torch.ones_like(y))
    got, want = found
    assert torch.equal(got.isfinite(), want.isfinite()) and torch.equal(got.isnan(), want.isnan())


# ---- memory format --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 3, 1, 5), (1, 1, 1, 1)], ids=str)
def test_memory_formats_are_torchs(backend: str, shape: tuple[int, ...]) -> None:
    for x_layout, w_layout, kernel in itertools.product(FORMATS, FORMATS, (1, 3)):
        x, w = torch.randn(shape, device=DEVICE), torch.randn(shape[1], 1, kernel, kernel, device=DEVICE)
        x, w = (
            torch.empty(t.shape, memory_format=FORMATS[name], device=DEVICE).copy_(t).requires_grad_()
            for t, name in ((x, x_layout), (w, w_layout))
        )
        strides = []
        for f in (F.depthwise_conv2d, eager):
            y = f(x, w, None, 1, kernel // 2, 1)
            dx, dw = torch.autograd.grad(y, (x, w), COTANGENTS["channels_last"](y))
            # The stride of a size of 1 means nothing.
            strides.append([[s for s, n in zip(t.stride(), t.shape, strict=True) if n > 1] for t in (y, dx, dw)])
        assert strides[0] == strides[1], (x_layout, w_layout, kernel)
        with FakeTensorMode(allow_non_fake_inputs=True):
            fake = F.depthwise_conv2d(x.detach(), w.detach(), padding=kernel // 2)
        assert [s for s, n in zip(fake.stride(), fake.shape, strict=True) if n > 1] == strides[1][0]


# ---- torch's tables and fuzz ----------------------------------------------------------------------------------------


def runs(backend: str, dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not take float64 on a GPU")


def depthwise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> conformance.Call:
    """A sample of a convolution with one filter per channel, or as many as it had where these are a multiple."""
    x, weight, *rest = args
    options = {k: v for k, v in kwargs.items() if k != "groups"}
    channels = x.shape[-weight.dim() + 1]
    if kwargs.get("groups", 1) == channels:
        return args, options

    def part(t: Tensor) -> Tensor:
        return t.detach().requires_grad_(t.requires_grad)

    filters = part(weight.flatten(0, 1)[:channels, None].clone())
    bias = rest[0] if rest else None
    short = bias is not None and len(bias) < channels
    return (x, filters, None if bias is None or short else part(bias[:channels].clone())), options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dimensions", [1, 2])
def test_conformance(backend: str, dtype: torch.dtype, dimensions: int) -> None:
    runs(backend, dtype)
    ours = F.depthwise_conv1d if dimensions == 1 else F.depthwise_conv2d
    theirs = torch.nn.functional.conv1d if dimensions == 1 else torch.nn.functional.conv2d
    count = itertools.count()
    every = 1 if backend == "torch" else 17  # an interpreted call takes long, and the samples come back with other values

    conformance.check_function(
        f"nn.functional.conv{dimensions}d",
        ours,
        dtype,
        at_least=(40 if dimensions == 1 else 100) // every,
        eager=lambda x, weight, *rest, **options: theirs(
            x, weight, *rest, **options, groups=weight.shape[0] // (weight.shape[0] // x.shape[-dimensions - 1])
        ),
        adapt=lambda args, kwargs: None if next(count) % every else depthwise(args, kwargs),
    )


@pytest.mark.parametrize("dimensions", [1, 2])
def test_errors(dimensions: int) -> None:
    ours = F.depthwise_conv1d if dimensions == 1 else F.depthwise_conv2d

    def adapt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> conformance.Call | None:
        return None if "groups" in kwargs else (args, kwargs)

    conformance.check_errors(f"nn.functional.conv{dimensions}d", ours, at_least=4, adapt=adapt)


@pytest.mark.parametrize(
    "args, match",
    [
        ((torch.ones(3, 1, 9),), r"input: a kernel of \(9,\) with dilation \[1\] does not fit into \(5,\) padded by \[0, 0\]"),
        ((torch.ones(4, 1, 3),), r"weight: expected \(3 \* multiplier, 1, K\) for input \(2, 3, 5\), got \(4, 1, 3\) torch"),
        ((torch.ones(3, 2, 3),), r"weight: expected \(C \* multiplier, 1, K\), got \(3, 2, 3\) torch"),
        ((torch.ones(3, 1, 3).double(),), r"weight: expected torch.float32 on \w+ like input, got \(3, 1, 3\) torch.float64"),
        ((torch.ones(3, 1, 3), torch.ones(2)), r"bias: expected \(3,\), got \(2,\)"),
        ((torch.ones(3, 1, 3), None, 0), r"stride: non-positive stride is not supported, got \[0\]"),
        ((torch.ones(3, 1, 3), None, 1, -1), r"padding: negative padding is not supported, got \[-1, -1\]"),
        ((torch.ones(3, 1, 3), None, 1, 1, 0), r"dilation: expected at least 1, got \[0\]"),
    ],
)
@pytest.mark.parametrize("chosen", ["auto", "torch"])
def test_errors_of_one_dimension_speak_of_one(chosen: str, args: tuple[Any, ...], match: str) -> None:
    weight, *rest = args
    with dlaccel.use_backend(chosen), pytest.raises(RuntimeError, match=f"^depthwise_conv1d: {match}"):
        F.depthwise_conv1d(torch.ones(2, 3, 5, device=DEVICE), weight.to(DEVICE), *rest)


@pytest.mark.parametrize("integer", [np.int64, np.uint8, torch.tensor], ids=["int64", "uint8", "tensor"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_integers_are_those_that_torch_takes(integer: Any, dimensions: int) -> None:
    ours = F.depthwise_conv1d if dimensions == 1 else F.depthwise_conv2d
    x, weight = torch.randn(2, 3, *[9] * dimensions, device=DEVICE), torch.randn(3, 1, *[3] * dimensions, device=DEVICE)
    want = ours(x, weight, None, 2, 3, 2)
    assert torch.equal(ours(x, weight, None, integer(2), integer(3), integer(2)), want)
    assert torch.equal(ours(x, weight, None, 2, [integer(3)] * dimensions, integer(2)), want)
    for bad in ([1] * (dimensions + 1), []):
        with pytest.raises(RuntimeError, match="expected dilation to be a single integer value or a list of"):
            ours(x, weight, None, [1], [1], bad)
    with pytest.raises(TypeError):
        ours(x, weight, None, 1, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("module", [DepthwiseConv1d, DepthwiseConv2d])
def test_module_conformance(module: Any, dtype: torch.dtype) -> None:
    def adapt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> conformance.Call:
        if not kwargs and args and isinstance(args[0], Tensor):
            return args, kwargs
        channels = kwargs.get("in_channels", args[0] if args else None)
        rest = {k: v for k, v in kwargs.items() if k not in ("in_channels", "out_channels", "groups")}
        return (channels, channels, *args[2:]), {**rest, "groups": channels}

    with dlaccel.use_backend("torch"):
        conformance.check_module(f"nn.{module.__name__.removeprefix('Depthwise')}", module, dtype, at_least=12, adapt=adapt)


@given(st.data())
def test_fuzz(backend: str, data: Any) -> None:
    draw, pick = data.draw, st.sampled_from
    dtype = draw(pick([torch.float32, torch.bfloat16, torch.float16]))
    interpreted = backend == "triton"
    n, channels, multiplier = draw(pick([0, 1, 2])), draw(pick([1, 2, 5, 17])), draw(pick([1, 1, 1, 2]))
    kernel = (
        draw(pick([1, 2, 3] if interpreted else [1, 2, 3, 5, 7])),
        draw(pick([1, 2, 3, 4] if interpreted else [1, 2, 3, 5, 13, 31])),
    )
    stride = draw(pick([1, 1, 2, 3])), draw(pick([1, 1, 2, 3]))
    dilation = draw(pick([1, 1, 2, 3])), draw(pick([1, 1, 2, 5]))
    padding = draw(pick(["same", "valid", *[(p, q) for p in (0, 1, 3, 8) for q in (0, 1, 2, 7)]]))
    if padding == "same":
        stride = (1, 1)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    pads = [0, 0] if padding == "valid" else [r // 2 for r in reach] if padding == "same" else padding
    least = [max(1, r - 2 * p) for r, p in zip(reach, pads, strict=True)]
    size = [m + draw(pick([0, 1, 2, 5])) for m in least]
    if dtype == torch.bfloat16 and channels * multiplier <= 16 and kernel[1] >= 13:
        dtype = torch.float32  # where eager may never return
    shapes = [
        (n, channels, *size),
        (channels * multiplier, 1, *kernel),
        *([(channels * multiplier,)] if draw(st.booleans()) else []),
    ]
    given_tensors = [draw(drawn_tensors(shape, dtype)).requires_grad_(draw(st.booleans())) for shape in shapes]
    outputs = eager(
        *[t.detach().float() for t in given_tensors], *([None] * (3 - len(shapes))), stride, padding, dilation
    ).shape
    with poisoned():
        compare(given_tensors, draw(drawn_tensors(outputs, dtype)), stride=stride, padding=padding, dilation=dilation)


# ---- big tensors ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="maps address space of the CPU")
@pytest.mark.unchecked("memory", reason="the check holds a copy of the storage, which spans gigabytes")
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_offsets_beyond_32_bits(axis: int) -> None:
    shape, strides = (3, 3, 4, 4), [48, 16, 4, 1]
    strides[axis] = 2**30 + 8
    x, dy = sparse(shape, strides), sparse(shape, strides)
    weight = torch.randn(3, 1, 3, 3)
    for t in (x, dy):
        t.copy_(torch.randn(shape))
    ops, geometry = torch.ops.dlaccel, ([1, 1], [1, 1, 1, 1], [1, 1])
    for channels_last in (False, True):
        got, want = [], []
        for name, a, b in (("triton", x, dy), ("torch", x.contiguous(), dy.contiguous())):
            w = weight.contiguous(memory_format=torch.channels_last) if channels_last else weight
            with dlaccel.use_backend(name):
                (got if name == "triton" else want).extend([
                    ops.depthwise_conv2d(a, w, None, *geometry),
                    ops.depthwise_conv2d_dgrad(b, w, shape, *geometry, channels_last),
                    ops.depthwise_conv2d_wgrad(b, a, w.shape, *geometry, channels_last),
                ])  # fmt: skip
        for p, q in zip(got, want, strict=True):
            torch.testing.assert_close(p, q)


# ---- machine code ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [72, 728])
def test_eight_channels_are_enough_for_wide_loads(channels: int) -> None:
    """Triton itself knows sizes that are multiples of 16 only."""
    from dlaccel.bench.compile import compile_launches
    from dlaccel.kernels import config, launch
    from dlaccel.kernels import depthwise_conv as kernels

    x = torch.empty((2, channels, 19, 19), dtype=torch.bfloat16, device="meta").to(memory_format=torch.channels_last)
    weight = torch.empty((channels, 1, 3, 3), dtype=torch.bfloat16, device="meta")
    options = [1, 1], [1, 1, 1, 1], [1, 1]
    with launch.recording() as found, config.assume(config.TARGETS["sm_90"]):
        kernels.depthwise_conv2d(x, weight, None, *options)
        kernels.depthwise_conv2d_dgrad(x, weight, x.shape, *options, True)
    for report in compile_launches([(n, "sm_90") for n in found]):
        assert report.vector_loads >= 6 and report.vector_stores >= 4 and not report.spills, report


# ---- the torch backend ----------------------------------------------------------------------------------------------


def test_auto_calls_aten_where_that_is_as_fast() -> None:
    LAUNCHES.clear()
    x, weight, bias = tensors((1, 4, 8, 8), (3, 3))
    y = F.depthwise_conv2d(x, weight, bias, padding=1)
    if DEVICE == "cpu":
        assert not LAUNCHES and type(y.grad_fn).__name__ == "ConvolutionBackward0"
        y = F.depthwise_conv2d(*tensors((1, 64, 28, 28), (5, 5)), padding=2)
        assert LAUNCHES["depthwise_conv2d", "torch"] == 1
    with dlaccel.use_backend("torch"):
        assert type(F.depthwise_conv2d(x, weight).grad_fn).__name__ == "depthwise_conv2dBackward"


@pytest.mark.parametrize("size", [8, 40])
def test_autocast_casts_before_auto_chooses(size: int) -> None:
    x, layer = torch.randn(2, 16, size, size, dtype=torch.bfloat16), DepthwiseConv2d(16, 16, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, F.depthwise_conv2d(x, layer.weight.bfloat16(), layer.bias.bfloat16()))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_formulations_of_the_gradients(channels_last: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the rules choose, both ways give the gradient."""
    for composed in (False, True):
        monkeypatch.setattr(fallback, "_dgrad_by_convolution", lambda *args: composed)
        monkeypatch.setattr(fallback, "_wgrad_by_convolution", lambda *args: composed)
        monkeypatch.setattr(fallback, "TERMS", 20)
        layout = "channels_last" if channels_last else "contiguous"
        for kernel, stride, padding, dilation in (
            ((3, 3), 2, 1, 1),
            ((5, 4), 1, 8, 1),
            ((3, 3), 1, 2, 2),
            ((1, 3), (3, 7), 2, 1),
        ):
            with dlaccel.use_backend("torch"), poisoned():
                options = {"stride": stride, "padding": padding, "dilation": dilation}
                compare(tensors((3, 4, 9, 10), kernel, 2, dtype, layout), **options)


@pytest.mark.skipif(DEVICE != "cpu", reason="oneDNN's")
@pytest.mark.parametrize("backend_name", ["torch", "auto"])
@pytest.mark.parametrize(
    "kernel, stride, padding, dilation, multiplier",
    [((3, 3), 1, 1, 1, 1), ((3, 3), 2, 1, 1, 1), ((2, 4), 1, "same", 1, 1), ((5, 3), (1, 2), 8, 2, 1), ((3, 3), 1, 1, 1, 2)],
)
def test_images_in_the_channels(
    backend_name: str, kernel: tuple[int, int], stride: Any, padding: Any, dilation: int, multiplier: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where channels do not fill oneDNN's blocks, all images are one."""
    monkeypatch.setattr(fallback, "PIXELS", 1)
    monkeypatch.setattr(fallback, "VALUES", 1)
    folded = []
    monkeypatch.setattr(fallback, "_one_image", lambda t, once=fallback._one_image: folded.append(t.shape) or once(t))
    x, weight, bias = tensors((4, 4, 9, 10), kernel, multiplier)
    options = {"stride": stride, "padding": padding, "dilation": dilation}
    with dlaccel.use_backend(backend_name), poisoned():
        with torch.no_grad():
            y = F.depthwise_conv2d(x, weight, bias, **options)
        torch.testing.assert_close(y, torch.nn.functional.conv2d(x, weight, bias, groups=4, **options).detach())
        assert y.is_contiguous() and y.untyped_storage().nbytes() == y.nbytes
        if fallback._onednn(x):
            assert (
                len(folded) == 1
                and "images in the channels" in dlaccel.explain(F.depthwise_conv2d, x, weight, **options).kernel
            )
        compare((x, weight, bias), **options)
        if fallback._onednn(x):
            assert len(folded) == 3
        folded.clear()
        for tensor in (x.contiguous(memory_format=torch.channels_last), x[:3], x.double(), x.bfloat16()):
            F.depthwise_conv2d(tensor.detach(), weight.detach().to(tensor.dtype), **options)
        assert not folded


def test_explain_names_the_formulation() -> None:
    x, weight = torch.empty(8, 64, 28, 28), torch.empty(64, 1, 5, 5)
    options = ([1, 1], [2, 2, 2, 2], [1, 1], False)
    if fallback._onednn(x):
        found = dlaccel.explain("depthwise_conv2d_wgrad", x, x, weight.shape, *options)
        assert "dy as its filter" in found.kernel
        filters = torch.empty(8, 72, 32, 32), torch.empty(72, 1, 5, 5)
        assert "images in the channels" in dlaccel.explain("depthwise_conv2d_dgrad", *filters, (8, 72, 32, 32), *options).kernel
        filters = torch.empty(8, 144, 32, 32), torch.empty(144, 1, 5, 5)  # two of each channel: full blocks
        assert "images" not in dlaccel.explain("depthwise_conv2d_dgrad", *filters, (8, 72, 32, 32), *options).kernel
    found = dlaccel.explain("depthwise_conv2d_wgrad", x, x, (64, 1, 3, 3), *options)
    assert "convolution_backward" in found.kernel
    with dlaccel.use_backend("triton"):
        explained = dlaccel.explain(F.depthwise_conv2d, x.to(DEVICE), weight.to(DEVICE), padding="same")
        assert explained.kernel == "depthwise_planes_kernel, contiguous"


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_module_is_torchs(backend: str, dimensions: int, mode: str) -> None:
    torchs = torch.nn.Conv1d if dimensions == 1 else torch.nn.Conv2d
    module: Any = DepthwiseConv1d if dimensions == 1 else DepthwiseConv2d
    theirs = torchs(3, 6, 3, padding=1, groups=3, padding_mode=mode, device=DEVICE)
    ours = module(3, 6, 3, padding=1, padding_mode=mode, device=DEVICE)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    LAUNCHES.clear()
    for shape in ((2, 3, 6, 5), (3, 6, 5)):
        x = torch.randn(shape[: len(shape) + dimensions - 2], device=DEVICE)
        torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, torchs) and ours.groups == 3
    assert LAUNCHES["depthwise_conv2d", backend] > 0


@pytest.mark.parametrize("module", [DepthwiseConv1d, DepthwiseConv2d])
def test_module_refuses_other_groups(module: Any) -> None:
    with pytest.raises(ValueError, match=rf"{module.__name__}: groups: expected in_channels, 4, got 2"):
        module(4, 4, 3, groups=2)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies_share_nothing(copied: Any) -> None:
    module, x = DepthwiseConv2d(4, 4, 3), torch.randn(1, 4, 6, 6)
    y = module(x)
    other = copied(module)
    assert torch.equal(other(x), y) and other.weight.data_ptr() != module.weight.data_ptr()


def test_inputs_are_left_alone(backend: str) -> None:
    given_tensors = tensors((2, 3, 5, 6), (3, 3))
    with unchanged(*given_tensors):
        F.depthwise_conv2d(*given_tensors, padding=1).sum().backward()
