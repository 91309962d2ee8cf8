"""batch_norm: what the contract tests do not cover."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import dlaccel
import dlaccel.functional as F
from dlaccel import nn
from dlaccel.bench.accuracy import close_enough
from dlaccel.bench.cases.batch_norm import eager, reference
from dlaccel.fallback import batch_norm as fallback
from dlaccel.ops._register import LAUNCHES
from tests import conformance
from tests.conformance import DTYPES
from tests.kit import COTANGENTS, DEVICE, INTERPRET, LAYOUTS, check, constants, poisoned, sparse, unchanged, with_gradients
from tests.strategies import given, sizes, st
from tests.strategies import tensors as drawn

Function = Callable[..., Tensor]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Call:
    """One call with fresh running statistics for each of (x, weight, bias, residual); absent tensors are left out."""

    def __init__(
        self, channels: int, dtype: torch.dtype = torch.float32, names: str = "input weight bias", **options: Any
    ) -> None:
        self.names = names.split()
        self.options = {"training": True, "activation": "relu"} | options
        generator = torch.Generator().manual_seed(1)
        mean = torch.randn(channels, generator=generator) / 2
        var = torch.rand(channels, generator=generator) + 0.5
        self.start = [t.to(DEVICE, wide(dtype)) for t in (mean, var)]
        self.after: list[Tensor] = []

    def __call__(self, f: Function, *tensors: Tensor) -> Tensor:
        named = dict(zip(self.names, tensors, strict=True))
        exact = f is reference
        running = [t.double() if exact or tensors[0].dtype == torch.float64 else t.clone() for t in self.start]
        running = [t.clone() for t in running]
        y = f(named.pop("input"), *running, **named, **self.options)
        self.after = running
        return y

    def check(self, given: list[Tensor], g: Tensor | None = None) -> None:
        """Values, gradients and running statistics."""
        check(partial(self, F.batch_norm), partial(self, eager), given, g, reference=partial(self, reference))
        results = []
        for f, t in ((F.batch_norm, given), (eager, given), (reference, [t.double() for t in given])):
            self(f, *[a.detach() for a in t])
            results.append(self.after)
        for name, got, theirs, exact in zip(("mean", "variance"), *results, strict=True):
            assert (problem := close_enough(got, theirs, exact)) is None, f"running {name} {problem}"


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, names: str = "input weight bias") -> list[Tensor]:
    made = []
    for name in names.split():
        big = name in ("input", "residual")
        t = torch.randn(shape if big else shape[1:2], device=DEVICE).to(dtype if big else wide(dtype))
        made.append(t.requires_grad_())
    return made


# ---- torch's tables -------------------------------------------------------------------------------------------------


def with_channels(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """torch returns an empty 1-d input as it is; we ask for a dimension of channels."""
    return (args, kwargs) if args[0].dim() > 1 else None


def test_an_empty_input_needs_statistics_in_evaluation() -> None:
    """torch returns it as it is."""
    with pytest.raises(RuntimeError, match="expected both in evaluation, got None"):
        F.batch_norm(torch.ones(0, 3, 2, device=DEVICE), None, None)


@pytest.mark.parametrize("counts", [False, True])
def test_momentum_means_nothing_without_running_statistics(backend: str, counts: bool) -> None:
    x = torch.randn(4, 3, 5, 2, device=DEVICE)
    for chosen in (backend, "auto"):
        counter = torch.tensor(2, device=DEVICE) if counts else None
        with dlaccel.use_backend(chosen):
            y = F.batch_norm(x, None, None, None, None, True, None, num_batches_tracked=counter)
        torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, None, None, True))
        assert counter is None or counter == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conformance(backend: str, dtype: torch.dtype) -> None:
    terms = 8.0 if dtype == torch.float64 else 1.0  # which may cancel; in float64 the truth is rounded as well
    conformance.check_function("nn.functional.batch_norm", F.batch_norm, dtype, at_least=60, adapt=with_channels, terms=terms)


@pytest.mark.parametrize(
    "name, dtype", [(f"BatchNorm{d}d", torch.float32) for d in (1, 2, 3)] + [("BatchNorm1d", torch.bfloat16)]
)
def test_module_conformance(backend: str, name: str, dtype: torch.dtype) -> None:
    conformance.check_module(f"nn.{name}", getattr(nn, name), dtype, at_least=36, terms=1.0)


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"])
def test_module_errors(backend: str, name: str) -> None:
    conformance.check_module_errors(f"nn.{name}", getattr(nn, name), at_least=2)


# ---- values ---------------------------------------------------------------------------------------------------------

ALL = "input weight bias residual"
SHAPES = [(5, 3, 31), (33, 17), (3, 40, 2, 4), (2, 3, 5, 7), (1, 2, 4, 33), (9, 1, 6), (2, 33, 1, 1), (3, 2, 2, 3, 5), (70, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_around_the_blocks(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with poisoned():
        Call(shape[1], dtype).check(tensors(shape, dtype))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("names", ["input", "input weight", "input bias", "input weight bias", ALL, "input residual"])
def test_options(backend: str, names: str, activation: str | None, training: bool) -> None:
    with poisoned():
        call = Call(5, names=names, activation=activation, training=training)
        given = [t.detach().mul_(3).requires_grad_() if t.dim() > 1 else t for t in tensors((4, 5, 3, 3), names=names)]
        call.check(given)


@pytest.mark.parametrize("argument", ["input", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_one_argument(backend: str, layout: str, argument: str) -> None:
    if layout == "expanded scalar":
        pytest.skip("constant channels: test_constant_channel")
    given = tensors((4, 6, 5, 3), names=ALL)
    i = ALL.split().index(argument)
    given[i] = LAYOUTS[layout](given[i])
    Call(6, names=ALL).check(given)


@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "channels_last slice"])
@pytest.mark.parametrize("cotangent", COTANGENTS)
@pytest.mark.parametrize("names", ["input weight bias", ALL])
def test_cotangents(backend: str, names: str, cotangent: str, x_layout: str) -> None:
    given = tensors((3, 6, 5, 3), names=names)
    given[0] = LAYOUTS[x_layout](given[0])
    with poisoned():
        Call(6, names=names).check(given, COTANGENTS[cotangent](given[0].detach()))


@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 4, 1, 1), (1, 3, 4, 1), (3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_ambiguous_strides(backend: str, shape: tuple[int, ...], format: torch.memory_format) -> None:
    given = tensors(shape)
    given[0] = given[0].detach().contiguous(memory_format=format).requires_grad_()
    Call(shape[1]).check(given)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [10, 1e2, 1e4])
def test_mean_far_from_zero(backend: str, ratio: float, layout: str) -> None:
    """The sum of squares minus the square of the sum has no correct digit at mean / std 1e4."""
    x, weight, bias = tensors((16, 4, 8, 8))
    x = LAYOUTS[layout](x.detach() + ratio).requires_grad_()
    call = Call(4, activation=None)
    call.check([x, weight, bias])
    var = (call.after[1] - 0.9 * call.start[1]) * 10  # of the batch, from the last check: float64
    torch.testing.assert_close(var, x.detach().double().var((0, 2, 3)).to(var), rtol=1e-6, atol=0)


def test_an_outlier_in_the_first_values(backend: str) -> None:
    x, weight, bias = tensors((8, 3, 6, 6))
    x.data[0, 1, 0, 0] = 1e3
    Call(3).check([x, weight, bias])


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_constant_channel(backend: str, value: float) -> None:
    x = torch.randn(4, 3, 6, 6, device=DEVICE)
    x[:, 1] = value
    y = F.batch_norm(x, None, None, None, torch.full((3,), 2.0, device=DEVICE), True)
    torch.testing.assert_close(y[:, 1], torch.full_like(y[:, 1], 2.0), rtol=0, atol=1e-4)  # aten: x * scale + shift


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(4, 5, 3, 3), (30, 20)], ids=str)
@pytest.mark.parametrize("at", [0, 2])
def test_nan_and_infinity_stay_in_their_channel(backend: str, shape: tuple[int, ...], bad: float, at: int) -> None:
    x = torch.randn(shape, device=DEVICE)
    x[at, 2] = bad
    x.requires_grad_()
    for activation in (None, "relu", "relu6"):
        results = []
        for f in (F.batch_norm, eager):
            mean, var = torch.zeros(shape[1], device=DEVICE), torch.ones(shape[1], device=DEVICE)
            y = f(x, mean, var, training=True, activation=activation)
            results.append((y, *torch.autograd.grad(y, x, COTANGENTS["dense"](y)), mean, var))
        for p, q in zip(*results, strict=True):
            torch.testing.assert_close(p, q, equal_nan=True)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_activation_of_special_values(backend: str, activation: str) -> None:
    """The input and its mean are 0: what reaches the activation is the residual itself."""
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, -1.0, 1.0, 6.0, 7.0], device=DEVICE)
    zero, one = torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE)
    results = []
    for f in (F.batch_norm, eager):
        residual = special[:, None].clone().requires_grad_()
        y = f(torch.zeros_like(residual), zero, one, residual=residual, activation=activation)
        results.append((y, torch.autograd.grad(y.sum(), residual)[0]))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mask_is_taken_after_rounding(backend: str, dtype: torch.dtype) -> None:
    """A positive number that the output's dtype rounds to 0 gets no gradient: the user sees 0."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 4
    x = torch.zeros(2, 3, device=DEVICE, dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE)
    y = F.batch_norm(x, zero, one, one, torch.full_like(one, tiny), eps=0.0, activation="relu")
    assert not y.any() and not torch.autograd.grad(y.sum(), x)[0].any()


@given(st.data())
def test_fuzz(backend: str, data: Any) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64] if DEVICE == "cpu" else [torch.float32]))
    if data.draw(st.booleans()):
        shape = (data.draw(sizes(16, 1)), data.draw(sizes(16, 1)))
    else:  # every channel is a program
        spatial = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 31, 33]), min_size=1, max_size=2))
        shape = (data.draw(st.sampled_from([1, 2, 3, 4, 5, 9])), data.draw(st.integers(1, 3)), *spatial)
    count = torch.Size(shape).numel() // shape[1]
    if not 1 < count <= 500:
        return
    names = data.draw(st.sampled_from(["input", "input weight bias", ALL, "input bias", "input weight residual"]))
    layouts = [name for name in LAYOUTS if name != "expanded scalar"]
    given = []
    for name in names.split():
        big = name in ("input", "residual")
        t = data.draw(
            drawn(shape if big else shape[1:2], dtype if big else wide(dtype), layouts=layouts if big else ["contiguous"])
        )
        given.append(t.requires_grad_())
    if given[0].stride(0) == 0 and count == shape[0]:
        return  # a channel of equal values: its gradient is rounding noise times 1 / sqrt(eps)
    g = data.draw(drawn(shape, dtype))
    options = {
        "activation": data.draw(st.sampled_from([None, "relu", "relu6"])),
        "training": data.draw(st.booleans()),
        "momentum": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    with poisoned():
        fuzz_check(Call(shape[1], dtype, names, **options), given, g)


def fuzz_check(call: Call, given: list[Tensor], g: Tensor) -> None:
    """As Call.check, but where the activation clips is taken from the result under test: near a corner dtypes disagree."""
    dtype, activation, over = given[0].dtype, call.options["activation"], [0, *range(2, g.dim())]
    with unchanged(*given, g):
        got = with_gradients(partial(call, F.batch_norm), given, g)
    y, after, high = got[0], call.after, 6 if activation == "relu6" else float("inf")
    assert y is not None
    passes = torch.ones_like(y) if activation is None else (y > 0) & (y < high)
    call.options["activation"] = None
    others = []
    for f, double in ((eager, False), (reference, True)):
        leaves = [(t.detach().double() if double else t.detach().clone()).requires_grad_() for t in given]
        results = with_gradients(partial(call, f), leaves, g.to(leaves[0].dtype) * passes)
        assert results[0] is not None
        results[0] = results[0] if activation is None else results[0].clamp(0, high)
        others.append(results)
    # Two or three values a channel leave a gradient of 0: what is left of its terms is their rounding.
    rounding = torch.finfo(dtype).eps / torch.finfo(wide(dtype)).eps
    var = given[0].detach().double().var(over, correction=0) if call.options["training"] else call.start[1]
    terms = rounding * float(g.abs().max() * (var + 1e-5).rsqrt().max())
    for i, (p, q, r) in enumerate(zip(got, *others, strict=True)):
        assert (problem := close_enough(p, q, r, terms=terms if i else 0.0)) is None, f"[{i}] {problem}"
    largest = float(given[0].detach().abs().double().nan_to_num(0, 0, 0).max())
    for p, r in zip(after, call.after, strict=True):
        # A mean rounds as the values that it adds up do, however much of them cancels.
        assert (problem := close_enough(p, None, r, terms=max(float(r.abs().max()), largest))) is None, f"running {problem}"


@pytest.mark.skipif(DEVICE == "cuda", reason="maps address space of the CPU")
@pytest.mark.unchecked(reason="the checks hold a copy of the storage, which spans gigabytes")
@pytest.mark.parametrize("shape, strides", [((4, 3, 5), (2**30 + 8, 5, 1)), ((4, 3), (2**30 + 8, 1))], ids=["NCL", "NC"])
def test_offsets_beyond_32_bits(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    x = sparse(shape, strides)
    x.copy_(torch.randn(shape))
    mean, var = torch.zeros(3), torch.ones(3)
    with dlaccel.use_backend("triton"):
        for training in (True, False):
            y = F.batch_norm(x, mean, var, training=training, momentum=0.0)
            torch.testing.assert_close(y, eager(x.contiguous(), mean, var, training=training, momentum=0.0))


# ---- which kernel ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not INTERPRET, reason="changes a constant of the launchers")
@pytest.mark.parametrize("shape", [(9, 2, 5, 17), (90, 20)], ids=str)
def test_sums_of_many_slices(shape: tuple[int, ...]) -> None:
    from dlaccel.kernels import batch_norm as kernels
    from dlaccel.kernels.launch import COUNTS

    COUNTS.clear()
    with constants(kernels, DIRECT=1, GROUPS=2), dlaccel.use_backend("triton"), poisoned():
        Call(shape[1]).check(tensors(shape))
    assert COUNTS["collapse_kernel"] == 3  # forward twice, backward once


@pytest.mark.skipif(not INTERPRET, reason="counts the interpreter's slices")
def test_more_slices_than_are_merged_at_a_time() -> None:
    from dlaccel.kernels.batch_norm import Tiling, forward_config

    given = tensors((290, 5))
    x = given[0].detach()
    tiling = Tiling(forward_config, x.device, x.dtype, x.shape, x.stride())
    assert tiling.parts > tiling.merge
    with dlaccel.use_backend("triton"), poisoned():
        Call(5).check(given)


@pytest.mark.parametrize(
    "layout, want",
    [
        ((4, 6, 5, 3), (4, 6, 15)),
        ("channels_last", (60, 6, 1)),
        ("transposed", (4, 6, 15)),
        ((4, 6), (4, 6, 1)),
        ((4, 1, 5, 3), (1, 1, 60)),
        ((4, 6, 1, 1), (4, 6, 1)),
        ("CNHW", (1, 6, 60)),
        ("NLC", (20, 6, 1)),
    ],
    ids=str,
)
def test_views(layout: Any, want: tuple[int, int, int]) -> None:
    from dlaccel.kernels.batch_norm import View

    made: dict[str, Callable[[], Tensor]] = {
        "channels_last": lambda: torch.empty(4, 6, 5, 3).contiguous(memory_format=torch.channels_last),
        "transposed": lambda: torch.empty(4, 6, 3, 5).mT,
        "CNHW": lambda: torch.empty(6, 4, 5, 3).transpose(0, 1),
        "NLC": lambda: torch.empty(4, 5, 6).mT,
    }
    t = made[layout]() if isinstance(layout, str) else torch.empty(layout)
    like = torch.empty_like(t)
    view = View.of(like.shape, like.stride())
    assert want == (view.R, view.C, view.S)
    strides = view.strides(like.shape, like.stride())
    assert strides is not None and strides[2] == 1


@pytest.mark.parametrize("copied", [False, True])
def test_a_slice_of_the_channels_is_read_in_place(copied: bool) -> None:
    from dlaccel.kernels.batch_norm import Tiling, forward_config

    x = torch.empty(4, 12, 10, 6)
    x = x[:, :, ::2] if copied else x[:, 3:9]
    tiling = Tiling(forward_config, x.device, x.dtype, x.shape, x.stride())
    assert (tiling.inputs(x)[0] is x) != copied


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "target, dtype",
    [
        ("sm_90", torch.bfloat16),
        ("gfx942", torch.bfloat16),
        *[pytest.param(t, d, marks=slow) for t in ("sm_80", "sm_90", "gfx942") for d in (torch.bfloat16, torch.float32)],
    ],
    ids=str,
)
def test_kernels_compile_without_spills(target: str, dtype: torch.dtype) -> None:
    from dlaccel.bench.compile import compile_launches, launches

    names = [
        "256x256x56x56 plain",
        "256x512x7x7 relu",
        "256x64x112x112 relu channels_last",
        "256x256x56x56 add+relu channels_last",
    ]
    found = [launch for name in names for launch in launches("batch_norm", name, dtype, target)]
    assert {launch.name for launch in found} >= {"statistics_kernel", "normalise_kernel", "reduce_kernel", "gradient_kernel"}
    for launch, report in zip(found, compile_launches([(launch, target) for launch in found]), strict=True):
        assert report.status == "ok" and report.spills == 0 and report.stack_bytes == 0, (launch.name, launch.options, report)
        if launch.options.get("VEC", 1) >= 8:
            assert report.vector_loads > 0, (launch.name, launch.options, report)


def test_eight_channels_are_enough_for_wide_loads() -> None:
    """Triton itself knows sizes that are multiples of 16 only; many networks have 24, 40 or 72 channels."""
    from dlaccel.bench.compile import compile_launches
    from dlaccel.kernels import batch_norm as kernels
    from dlaccel.kernels import config, launch

    x = torch.empty(4096, 24, dtype=torch.bfloat16, device="meta")
    with launch.recording() as found, config.assume(config.TARGETS["sm_90"]):
        kernels.batch_norm(x, None, None, None, None, None, None, 0.1, 1e-5, "relu")
    for report in compile_launches([(n, "sm_90") for n in found]):
        assert report.vector_loads > 0, report


# ---- state ----------------------------------------------------------------------------------------------------------


def state_of(m: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in m.state_dict().items()}


def close_state(ours: torch.nn.Module, theirs: torch.nn.Module, **tolerance: float) -> None:
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for (name, p), q in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_modules_keep_torch_s_state(
    backend: str, affine: bool, track: bool, momentum: float | None, dtype: torch.dtype
) -> None:
    options: dict[str, Any] = {"affine": affine, "momentum": momentum, "track_running_stats": track, "device": DEVICE}
    ours, theirs = nn.BatchNorm2d(3, **options), torch.nn.BatchNorm2d(3, **options)
    for training, n in ((True, 4), (False, 2), (True, 0), (True, 3), (False, 1), (True, 2)):
        ours.train(training)
        theirs.train(training)
        x = torch.randn(n, 3, 4, 4, device=DEVICE, dtype=dtype) + 1
        # Without parameters aten rounds the statistics of 16-bit input to 16 bits.
        torch.testing.assert_close(ours(x), theirs(x), **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}))
        close_state(ours, theirs)


def test_half_modules_keep_their_statistics_in_half(backend: str) -> None:
    ours, theirs = nn.BatchNorm1d(3).to(DEVICE).bfloat16(), torch.nn.BatchNorm1d(3).to(DEVICE).bfloat16()
    for _ in range(3):
        x = torch.randn(8, 3, device=DEVICE).bfloat16()
        torch.testing.assert_close(ours(x), theirs(x), rtol=0.02, atol=0.02)
        close_state(ours, theirs, rtol=2**-5, atol=1e-3)  # torch's are rounded at every step, ours once
    assert ours.running_mean is not None and ours.running_mean.dtype == torch.bfloat16


def test_two_forwards_before_a_backward(backend: str) -> None:
    """The statistics of a batch belong to its graph; the running ones may be overwritten in between, by us or by DDP."""
    m = nn.BatchNormReLU2d(3).to(DEVICE)
    a, b = (torch.randn(4, 3, 5, 5, device=DEVICE, requires_grad=True) for _ in range(2))
    ya = m(a)
    assert m.running_mean is not None
    m.running_mean.copy_(torch.zeros(3))
    yb = m(b)
    together = torch.autograd.grad(ya.pow(2).sum() + yb.pow(2).sum(), (a, b))
    alone = [torch.autograd.grad(m(t).pow(2).sum(), t)[0] for t in (a, b)]
    for p, q in zip(together, alone, strict=True):
        assert torch.equal(p, q)


def test_evaluation_may_run_twice_before_a_backward(backend: str) -> None:
    m = nn.BatchNormReLU2d(3).to(DEVICE).eval()
    x = torch.randn(4, 3, 5, 5, device=DEVICE, requires_grad=True)
    (m(x) + m(2 * x)).sum().backward()
    assert m.running_mean is not None
    y = m(x)
    m.running_mean.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_a_graph_that_reads_the_running_statistics_notices_the_update(backend: str) -> None:
    """The kernel writes through a pointer; autograd must still know."""
    m = nn.BatchNorm1d(3).to(DEVICE)
    w = torch.ones(3, device=DEVICE, requires_grad=True)
    assert m.running_mean is not None
    loss = (w * m.running_mean).sum()
    m(torch.randn(4, 3, device=DEVICE))
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        loss.backward()


def test_checkpointing_updates_the_statistics_as_torch_does(backend: str) -> None:
    ours, theirs = nn.BatchNorm1d(3).to(DEVICE), torch.nn.BatchNorm1d(3).to(DEVICE)
    x = torch.randn(8, 3, device=DEVICE, requires_grad=True)
    for m in (ours, theirs):
        torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False).sum().backward()
    close_state(ours, theirs)
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_modules_keep_torch_s_state(momentum: float | None) -> None:
    torch._dynamo.reset()
    ours, theirs = nn.BatchNormReLU1d(3, momentum=momentum), torch.nn.BatchNorm1d(3, momentum=momentum)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (5, 6, 2):
        x = torch.randn(n, 3)
        torch.testing.assert_close(compiled(x), theirs(x).relu())
        close_state(ours, theirs)


def test_statistics_of_many_samples_under_vmap() -> None:
    x, mean, var = torch.randn(5, 6, 3), torch.zeros(5, 3), torch.ones(5, 3)
    want = mean.clone(), var.clone()

    def run(f: Any, *state: Tensor) -> Tensor:
        return torch.func.vmap(lambda x, m, v: f(x, m, v, training=True))(x, *state)  # type: ignore[no-any-return]

    with dlaccel.use_backend("torch"):
        torch.testing.assert_close(run(F.batch_norm, mean, var), run(torch.nn.functional.batch_norm, *want))
    torch.testing.assert_close((mean, var), want)


@pytest.mark.parametrize("training", [True, False])
def test_repeats_are_bitwise_equal(backend: str, training: bool) -> None:
    call, given = Call(20, names=ALL, training=training), tensors((40, 20), names=ALL)
    first, second = (with_gradients(partial(call, F.batch_norm), given) for _ in range(2))
    for p, q in zip(first, second, strict=True):
        assert p is not None and q is not None and torch.equal(p, q)


def test_inputs_are_left_alone(backend: str) -> None:
    given = tensors((4, 5, 3, 3), names=ALL)
    with unchanged(*given):
        F.batch_norm(given[0], None, None, *given[1:3], True, residual=given[3], activation="relu").sum().backward()


# ---- the torch backend ----------------------------------------------------------------------------------------------


def form_of_statistics(x: Tensor) -> str | None:
    """Which form of the statistics serves x; None: aten's."""
    if not fallback.uses_group_norm(x):
        return None
    with mock.patch.object(fallback, "_centred", side_effect=fallback._centred) as centred:
        found = fallback._statistics(x)
    return None if found is None else "centred" if centred.called else "sums"


@pytest.mark.skipif(DEVICE == "cuda", reason="a path of the CPU")
@pytest.mark.parametrize(
    "shape, offset, form",
    [
        ((3, 5, 14, 14), 0.0, "sums"),
        ((3, 5, 14, 14), 1.5, "sums"),
        ((3, 5, 14, 14), 3.0, "centred"),
        ((2, 3, 55, 55), 1.0, "sums"),  # runs of 55 * 55 / 25 values
        ((3, 2, 1009), 1.0, "centred"),  # a prime
        ((2, 3, 3, 24, 24), 1.0, "sums"),
        ((40, 8, 4, 4), 1.0, "sums"),
        ((40, 8, 4, 4), 3.0, None),
    ],
    ids=str,
)
def test_statistics_by_group_norm(
    shape: tuple[int, ...], offset: float, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "LEAST", 1)
    monkeypatch.setattr(fallback, "PIECE", 4000)
    given = tensors(shape, names=ALL)
    given[0] = (given[0].detach() + offset).requires_grad_()
    assert form_of_statistics(given[0].detach()) == form
    with dlaccel.use_backend("torch"), poisoned():
        Call(shape[1], names=ALL).check(given)


@pytest.mark.skipif(DEVICE == "cuda", reason="a path of the CPU")
@pytest.mark.parametrize("change", ["offset", "NaN", "inf", "overflow", "constant", "channels_last", "bfloat16", "small"])
def test_group_norm_only_where_it_is_as_accurate(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(12, 64, 14, 14)
    monkeypatch.setattr(fallback, "LEAST", x.numel())
    assert form_of_statistics(x) == "sums"
    if change == "offset":
        x[:, 3] += 10
    elif change in ("NaN", "inf"):
        x[-1, 3, 1, 1] = float(change)
    elif change == "overflow":
        x *= 1e25
    elif change == "constant":
        x[:, 3] = 5
    elif change == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif change == "bfloat16":
        x = x.bfloat16()
    else:
        x = x[:-1]
    assert form_of_statistics(x) is None
    with dlaccel.use_backend("torch"):
        got, want = F.batch_norm(x, None, None, training=True), eager(x, None, None, training=True)
    tolerance = {"rtol": 0.02, "atol": 0.02} if change == "bfloat16" else {}
    torch.testing.assert_close(got, want, equal_nan=True, **tolerance)


@pytest.mark.skipif(DEVICE == "cuda", reason="a path of the CPU")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("names", ["input weight bias", ALL])
def test_large_tensors_in_pieces(
    names: str, training: bool, dtype: torch.dtype, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "LARGE", 1000)
    monkeypatch.setattr(fallback, "PIECE", 3000)
    given = [LAYOUTS[layout](t) if t.dim() == 4 else t for t in tensors((7, 6, 8, 8), dtype, names)]
    with dlaccel.use_backend("torch"), poisoned():
        Call(6, dtype, names, training=training).check(given)


def peak_of_a_step(f: Function, names: str, shape: tuple[int, ...]) -> float:
    """In tensors of x's size, above what was there before."""
    from torch.profiler import ProfilerActivity, profile

    call, given = Call(shape[1], names=names), tensors(shape, names=names)
    g = torch.randn(shape)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        torch.autograd.grad(call(f, *given) * 2, given, g)  # y itself is not held
    live, peak = 0, 0
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    for event in sorted((e for e in results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / given[0].nbytes


@pytest.mark.skipif(DEVICE == "cuda", reason="measures the CPU's allocator")
@pytest.mark.parametrize("names", ["input weight bias", ALL])
def test_peak_memory_of_a_step(names: str) -> None:
    """One tensor above eager: Python holds dy until the backward ends."""
    with dlaccel.use_backend("torch"):
        ours, theirs = (peak_of_a_step(f, names, (8, 64, 40, 40)) for f in (F.batch_norm, eager))
    assert 2 < ours <= theirs + 1.02, (ours, theirs)


# ---- modules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d, shape", [(1, (6, 5)), (1, (3, 5, 7)), (2, (3, 5, 4, 2)), (3, (2, 5, 3, 2, 2))], ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_fused_modules(backend: str, activation: str, d: int, shape: tuple[int, ...]) -> None:
    theirs = getattr(torch.nn, f"BatchNorm{d}d")(5).to(DEVICE)
    ours = getattr(nn, f"BatchNormReLU{d}d")(5, activation=activation, device=DEVICE)
    for p in theirs.parameters():
        torch.nn.init.normal_(p)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    act = torch.nn.functional.relu if activation == "relu" else torch.nn.functional.relu6
    x, z = torch.randn(shape, device=DEVICE) * 4, torch.randn(shape, device=DEVICE) * 4
    for training in (True, False):
        for m in (ours, theirs):
            m.train(training)
        torch.testing.assert_close(ours(x), act(theirs(x)))
        torch.testing.assert_close(ours(x, z), act(theirs(x) + z))
        close_state(ours, theirs)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert isinstance(ours, type(theirs)) and f"activation={activation}" in repr(ours)


def test_fused_modules_refuse_what_they_do_not_know() -> None:
    with pytest.raises(ValueError, match="activation: expected 'relu' or 'relu6', got 'gelu'"):
        nn.BatchNormReLU2d(3, activation="gelu")
    with pytest.raises(ValueError, match="SyncBatchNorm: activation: expected None, 'relu' or 'relu6', got 'gelu'"):
        nn.SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="expected 4D input"):
        nn.BatchNormReLU2d(3)(torch.ones(2, 3))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies_share_nothing(copied: Any) -> None:
    module = nn.BatchNormReLU1d(5)
    x = torch.randn(3, 5)
    module(x)
    other = copied(module)
    module(x)
    assert other.num_batches_tracked == 1 and module.num_batches_tracked == 2
    assert torch.equal(other.eval()(x), other(x)) and other.weight is not module.weight


class Block(torch.nn.Module):
    """A residual block, with torch's modules or with the fused ones."""

    def __init__(self, channels: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        norm = nn.BatchNormReLU2d if fused else torch.nn.BatchNorm2d
        self.conv1 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.fused:
            return self.bn2(self.conv2(self.bn1(self.conv1(x))), x)  # type: ignore[no-any-return]
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + x)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_residual_network_trains_as_with_torch(backend: str, format: torch.memory_format) -> None:
    def network(fused: bool) -> torch.nn.Module:
        stem = torch.nn.Conv2d(1, 6, 3, padding=1)
        head = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(6, 3))
        return torch.nn.Sequential(stem, Block(6, fused), Block(6, fused), head).to(DEVICE, memory_format=format)

    theirs, ours = network(False), network(True)
    ours.load_state_dict(theirs.state_dict())
    torch.manual_seed(3)
    x = torch.randn(8, 1, 6, 6, device=DEVICE).contiguous(memory_format=format)
    target = torch.randint(3, (8,), device=DEVICE)
    curves = []
    for model in (theirs, ours):
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        curves.append(losses)
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-4, atol=1e-5)
    assert curves[0][-1] < 0.8 * curves[0][0]
    close_state(ours, theirs)
    assert LAUNCHES["batch_norm", backend] > 0


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(DEVICE == "cuda", reason="the short cut to aten is the CPU's")
def test_auto_calls_aten_where_that_is_as_fast(
    dtype: torch.dtype, training: bool, with_residual: bool, activation: str | None
) -> None:
    """The same results, gradients, statistics and counter as the operator's, without an operator."""
    x = torch.randn(6, 5, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    results = []
    for chosen in ("auto", "torch"):
        mean, var, count = torch.zeros(5), torch.ones(5), torch.tensor(3)
        LAUNCHES.clear()
        with dlaccel.use_backend(chosen):
            options = {"residual": residual, "activation": activation, "num_batches_tracked": count}
            y = F.batch_norm(x, mean, var, weight, bias, training, 0.2, 1e-5, **options)
            wanted = [x, weight, bias, *([] if residual is None else [residual])]
            gradients = torch.autograd.grad(y, wanted, torch.full_like(y, 0.3))
        assert bool(LAUNCHES) == (chosen == "torch")
        results.append((y, *gradients, mean, var, count))
    torch.testing.assert_close(results[0], results[1])
