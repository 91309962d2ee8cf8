"""cross_entropy: what the contract tests do not cover."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import dlaccel
import dlaccel.functional as F
from dlaccel import backend as backend_module
from dlaccel.bench.cases.cross_entropy import reference
from dlaccel.nn import CrossEntropyLoss
from dlaccel.ops import cross_entropy as op
from dlaccel.ops._register import LAUNCHES
from tests import conformance
from tests.conformance import DTYPES
from tests.kit import COTANGENTS, DEVICE, INTERPRET, LAYOUTS, check, constants, poisoned, sparse, unchanged, with_gradients
from tests.strategies import given, sizes, st
from tests.strategies import tensors as drawn_tensors

theirs = torch.nn.functional.cross_entropy
TERMS = 100.0  # the tables have logits and weights between -9 and 9, of both signs: losses cancel
NAN, INF = float("nan"), float("inf")
NARROW = [torch.float32, torch.float16, torch.bfloat16]


def eager(x: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    """torch's, with our gradient of ignored rows: 0, whatever they hold. Ours has 0 there and torch's NaN."""
    if target.shape != x.shape:
        ignored = target.reshape(x.shape[:1] + x.shape[2:] if x.dim() > 1 else ()) == options.get("ignore_index", -100)
        x = torch.where(ignored.unsqueeze(min(x.dim() - 1, 1)), 0, x)
    return theirs(x, target, weight, **options)


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * 2).to(dtype).requires_grad_()


def classes(x: Tensor, ignored: int | None = None) -> Tensor:
    t = torch.randint(x.shape[1], (x.shape[0], *x.shape[2:]), device=DEVICE)
    if ignored is not None:
        t.view(-1)[::3] = ignored
    return t


def weights(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(n, device=DEVICE) + 0.5).to(dtype)


def agree(x: Tensor, target: Tensor, weight: Tensor | None = None, g: Tensor | None = None, **options: Any) -> None:
    """Ours against torch's and float64, poisoned, inputs unchanged."""

    def bound(f: Any) -> Any:
        return lambda x, target, *weight: f(x, target, *weight, **options)

    reach = float(x.detach().double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0
    scale = target.numel() if options.get("reduction") == "sum" else 1
    given_tensors = [x, target, *([] if weight is None else [weight])]
    wanted = sum(t.requires_grad for t in given_tensors)
    with poisoned():
        check(bound(F.cross_entropy), bound(eager), given_tensors, g, terms=[scale * (2 * reach + 10), *[2.0 + reach] * wanted])


# ---- torch's tables -------------------------------------------------------------------------------------------------


def runs(backend: str, dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not take float64 on a GPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conformance(backend: str, dtype: torch.dtype) -> None:
    runs(backend, dtype)
    ignoring = 0

    def adapt(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal ignoring
        ignoring += not args[1].is_floating_point() and bool((args[1] == kwargs.get("ignore_index", -100)).any())
        return args, kwargs

    conformance.check_function("nn.functional.cross_entropy", F.cross_entropy, dtype, at_least=100, adapt=adapt, terms=TERMS)
    assert ignoring


def test_module_conformance(backend: str, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    if backend == "triton":  # interpreted, the 630 cases of three seeds would take minutes
        monkeypatch.setattr(conformance, "SEEDS", (0,))
    conformance.check_module("nn.CrossEntropyLoss", CrossEntropyLoss, dtype, at_least=100, terms=TERMS)


def test_module_errors(backend: str) -> None:
    conformance.check_module_errors("nn.CrossEntropyLoss", CrossEntropyLoss, at_least=5)


@pytest.mark.skipif(DEVICE == "cuda", reason="on CUDA auto is the Triton backend")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_auto_on_the_cpu_conforms(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with aten for the small calls of the tables, once as if they were large."""
    for large in (op.LARGE, 0):
        monkeypatch.setattr(op, "LARGE", large)
        monkeypatch.setattr(op, "FEW_ROWS", 2)
        conformance.check_function("nn.functional.cross_entropy", F.cross_entropy, dtype, at_least=100, terms=TERMS)


# ---- options, layouts, blocks ---------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "all smoothed": {"label_smoothing": 1.0, "reduction": "none"},
    "negative smoothing": {"label_smoothing": -0.5},
    "ignore a class": {"ignore_index": 2},
    "ignore beyond the classes": {"ignore_index": 255, "label_smoothing": 0.2},
}


@pytest.fixture(params=["whole rows", "rows in steps"])
def rows_of_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both forms of the kernels at sizes that the interpreter can afford."""
    if request.param == "whole rows":
        yield request.param
        return
    monkeypatch.setattr(op, "LONG_ROW", 4)
    with constants(pytest.importorskip("dlaccel.kernels.cross_entropy"), WHOLE=4):
        yield request.param


@pytest.mark.parametrize("shape", [(9, 7), (3, 41), (9, 70), (2, 41, 3), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(backend: str, rows_of_kernels: str, shape: tuple[int, ...], weighted: bool, options: str) -> None:
    x, chosen = logits(*shape), OPTIONS[options]
    agree(x, classes(x, chosen.get("ignore_index", -100)), weights(shape[1]) if weighted else None, **chosen)


@pytest.mark.parametrize("shape", [(9, 7), (3, 70), (2, 41, 3)], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("options", ["mean", "sum", "none", "smoothing"])
def test_options_of_probabilities(
    backend: str, rows_of_kernels: str, shape: tuple[int, ...], weighted: bool, options: str
) -> None:
    x = logits(*shape)
    target = torch.rand(shape, device=DEVICE, requires_grad=True)  # not normalised: nothing says that it must be
    agree(x, target, weights(shape[1]).requires_grad_() if weighted else None, **OPTIONS[options])


@pytest.mark.parametrize("wanted", ["input", "target", "weight"])
def test_one_gradient_of_probabilities(backend: str, rows_of_kernels: str, wanted: str) -> None:
    tensors = {"input": logits(5, 9).detach(), "target": torch.rand(5, 9, device=DEVICE), "weight": weights(9)}
    tensors[wanted].requires_grad_()
    agree(*tensors.values(), label_smoothing=0.1)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(9, 6), (3, 40), (2, 6, 3, 5)], ids=str)
def test_layouts(backend: str, rows_of_kernels: str, shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](logits(*shape, dtype=dtype))
    agree(x, LAYOUTS[layout](classes(x)), LAYOUTS[layout](weights(shape[1], dtype)), label_smoothing=0.1)
    target = torch.rand(shape, device=DEVICE).to(dtype).requires_grad_()
    agree(x, target)
    agree(LAYOUTS["contiguous"](x), LAYOUTS[layout](target))


@pytest.mark.parametrize("cotangent", COTANGENTS)
def test_cotangents_of_rows(backend: str, cotangent: str) -> None:
    x = logits(2, 6, 3, 5)
    target = classes(x)
    g = COTANGENTS[cotangent](theirs(x, target, reduction="none").detach())
    agree(x, target, g=g, reduction="none")
    agree(x, torch.rand_like(x), g=g, reduction="none")


@pytest.mark.parametrize("C", [1, 2, 31, 32, 33, 63, 64, 65, 1000])
@pytest.mark.parametrize("R", [1, 7, 8, 9])
def test_sizes_around_the_blocks(backend: str, rows_of_kernels: str, R: int, C: int) -> None:
    x = logits(R, C)
    agree(x, classes(x))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_more_rows_than_one_program_sums(backend: str, reduction: str) -> None:
    x = logits(70, 3)
    with constants(pytest.importorskip("dlaccel.kernels.cross_entropy"), SUM_BLOCK=2, DIVISOR_BLOCK=16):
        fused_agrees(x, classes(x, -100), weights(3), reduction=reduction)


@pytest.mark.skipif(not INTERPRET, reason="maps address space of the CPU; the kernels run in the interpreter")
@pytest.mark.unchecked("memory", reason="the check holds a copy of the storage, which spans gigabytes")
@pytest.mark.parametrize("large", ["row", "class"])
def test_offsets_beyond_32_bits(large: str, rows_of_kernels: str) -> None:
    stride = 2**30 + 16
    x = sparse((5, 6), (stride, 1) if large == "row" else (1, stride))
    x.copy_(torch.randn(5, 6))
    target = torch.tensor([0, 5, 3, 5, 1])
    with dlaccel.use_backend("triton"):
        torch.testing.assert_close(F.cross_entropy(x, target), theirs(x.contiguous(), target))


# ---- special values -------------------------------------------------------------------------------------------------

CORNERS: dict[str, dict[tuple[int, int], float] | float] = {
    "-inf elsewhere": {(1, 3): -INF},
    "-inf at the target": {(1, 0): -INF},
    "-inf in the first block": {(1, c): -INF for c in range(1, 36)},
    "a row of -inf": {(1, c): -INF for c in range(40)},
    "inf elsewhere": {(1, 3): INF},
    "inf at the target": {(1, 0): INF},
    "two inf": {(1, 0): INF, (1, 39): INF},
    "NaN": {(1, 39): NAN},
    "NaN at the target": {(1, 0): NAN},
    "NaN in an ignored row": {(2, 5): NAN},
    "inf in an ignored row": {(2, 5): INF},
    "a far target": {(1, 0): -300.0},
    "a subnormal probability": {(1, 0): -95.0},
    "a sure target": {(1, 0): 60.0},
    "large logits": 1e4,
    "very negative logits": -1e4,
}


@pytest.mark.parametrize("plane", [False, True], ids=["rows", "plane"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("corner", CORNERS)
def test_special_values(backend: str, rows_of_kernels: str, corner: str, smoothing: float, plane: bool) -> None:
    x, change = torch.randn(4, 40, device=DEVICE), CORNERS[corner]
    if isinstance(change, float):
        x += change
    else:
        for place, value in change.items():
            x[place] = value
    target = torch.tensor([3, 0, -100, 39], device=DEVICE)
    probabilities = torch.softmax(torch.randn(4, 40, device=DEVICE), 1)
    if plane:
        x, target, probabilities = x.t()[None], target[None], probabilities.t()[None]
    for reduction in ("none", "mean"):
        agree(x.clone().requires_grad_(), target, reduction=reduction, label_smoothing=smoothing)
        agree(x.clone().requires_grad_(), probabilities, reduction=reduction, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nothing_counts(backend: str, reduction: str, smoothing: float) -> None:
    """All rows ignored, no rows, zero weights, one class, unbatched and ignored: torch's answers, NaN where torch has NaN."""
    x = logits(4, 5)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    agree(x, torch.full((4,), -100, device=DEVICE), **options)
    agree(x, torch.full((4,), -100, device=DEVICE), weights(5), **options)
    agree(x, classes(x), torch.zeros(5, device=DEVICE), **options)
    agree(logits(0, 5), torch.zeros(0, dtype=torch.int64, device=DEVICE), **options)
    agree(logits(2, 5, 0), torch.zeros(2, 0, dtype=torch.int64, device=DEVICE), **options)
    agree(logits(0, 5), torch.zeros(0, 5, device=DEVICE), **options)
    agree(logits(4, 1), torch.zeros(4, dtype=torch.int64, device=DEVICE), **options)
    agree(logits(5), torch.tensor(-100, device=DEVICE), **options)
    x, one = torch.randn(5, device=DEVICE), torch.tensor([3], device=DEVICE)  # torch 2.13 takes it, but not its gradient
    torch.testing.assert_close(F.cross_entropy(x, one, **options), theirs(x, one[0], **options))
    agree(logits(5), torch.rand(5, device=DEVICE), **options)
    agree(logits(3, 0), torch.full((3,), -100, device=DEVICE), reduction=reduction)


def test_negative_weights_and_bytes(backend: str) -> None:
    x = logits(6, 5)
    agree(x, classes(x), -weights(5), reduction="sum")
    agree(x, classes(x).byte(), ignore_index=255)


def test_an_average_of_float16_rows_does_not_overflow(backend: str) -> None:
    x = torch.zeros(20000, 40, device=DEVICE, dtype=torch.float16)[:, :: 1 if backend == "torch" else 8].requires_grad_()
    if backend == "triton" and INTERPRET:
        x = torch.full((300, 4), 0.0, dtype=torch.float16)
        x[:, 0] = -1000.0  # 300 losses of 1000 and more: their sum is beyond float16
        x.requires_grad_()
    loss = F.cross_entropy(x, torch.zeros(x.shape[0], dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert loss.isfinite() and x.grad is not None and x.grad.isfinite().all()
    torch.testing.assert_close(
        loss.float(), theirs(x.detach().float(), torch.zeros(x.shape[0], dtype=torch.int64, device=DEVICE)), rtol=1e-3, atol=0
    )


@pytest.mark.skipif(DEVICE == "cuda", reason="auto on the CPU")
@pytest.mark.parametrize("rows", [300, 20000])
def test_an_average_of_float16_rows_does_not_overflow_in_auto(rows: int) -> None:
    x = torch.zeros(rows, 40, dtype=torch.float16)
    x[:, 0] = -1000.0 if rows == 300 else 0.0
    target = torch.zeros(rows, dtype=torch.int64)
    want = theirs(x.float(), target)
    torch.testing.assert_close(F.cross_entropy(x, target).float(), want, rtol=1e-3, atol=0)
    x.requires_grad_()
    F.cross_entropy(x, target).backward()
    torch.testing.assert_close(x.grad[:, 1].float().sum(), torch.tensor(1 / 39 if rows == 300 else 1 / 40), rtol=2e-2, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="auto on the CPU")
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_many_float16_rows_have_a_loss_of_torchs_dtype_in_auto(reduction: str, probabilities: bool) -> None:
    for rows in (60, op.EXACT_ROWS + 1):
        x = torch.randn(rows, 40).half()
        dtypes = (torch.float16, torch.bfloat16, torch.float64) if probabilities else (torch.int64,)
        for dtype in dtypes:
            target = torch.rand(rows, 40).to(dtype) if probabilities else classes(x).cpu()
            exact = theirs(x.double(), target.double() if probabilities else target, reduction=reduction)
            want = exact.to(theirs(x, target, reduction=reduction).dtype)  # a mean over so many overflows there
            torch.testing.assert_close(F.cross_entropy(x, target, reduction=reduction), want, rtol=1e-3, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="auto on the CPU")
@pytest.mark.parametrize("rows", [300, 3000])
def test_a_sum_beyond_float16_is_inf_in_auto(rows: int) -> None:
    x = torch.zeros(rows, 40, dtype=torch.float16)
    x[:, 0] = -1000.0
    loss = F.cross_entropy(x, torch.zeros(rows, dtype=torch.int64), reduction="sum")
    assert loss.dtype == torch.float16 and loss.item() == INF


# ---- targets out of range -------------------------------------------------------------------------------------------


@pytest.mark.skipif(DEVICE == "cuda", reason="a device-side assertion would end the process")
@pytest.mark.parametrize("chosen", ["auto", "torch"])
@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_targets_out_of_range_raise(chosen: str, bad: int) -> None:
    x = logits(4, 5)
    with dlaccel.use_backend(chosen):
        for target in (torch.tensor([0, bad, 1, 2]), torch.tensor([-100, bad, -100, 2])):
            with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
                F.cross_entropy(x, target)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_kernels_make_rows_with_bad_targets_nan(rows_of_kernels: str, bad: int, reduction: str) -> None:
    x, target = logits(4, 5), torch.tensor([0, bad, -100, 2], device=DEVICE)
    for fused in (False, True):
        with dlaccel.use_backend("triton"), poisoned():
            loss, dx = with_gradients(lambda x: F.cross_entropy(x, target, weights(5), reduction=reduction, fused=fused), [x])
        assert dx is not None and dx[1].isnan().all() and (dx[2] == 0).all()
        if reduction == "none":
            assert loss is not None and loss.isnan().tolist() == [False, True, False, False]
            assert dx[[0, 3]].isfinite().all()


def test_checked_targets_raise_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_module, "CHECK", True)
    x = logits(2, 5, 3)
    target = classes(x)
    with dlaccel.use_backend("triton"):
        F.cross_entropy(x, target)
        target[1, 2] = 7
        with pytest.raises(IndexError, match=r"Target 7 is out of bounds: at \(1, 2\), for 5 classes"):
            F.cross_entropy(x, target)
        F.cross_entropy(x, target, ignore_index=7)


def test_what_is_no_tensor_is_refused(backend: str) -> None:
    x = logits(2, 3)
    for arguments in ((3, classes(x)), (x, 3), (x, classes(x), 3)):
        for f in (F.cross_entropy, theirs):
            with pytest.raises(TypeError, match=r"\bint\b"):
                f(*arguments)


def test_weights_of_class_indices_have_no_gradient(backend: str) -> None:
    with pytest.raises(RuntimeError, match="weight"):
        F.cross_entropy(logits(2, 3), torch.tensor([0, 1], device=DEVICE), weights(3).requires_grad_())
    with torch.no_grad():
        F.cross_entropy(logits(2, 3), torch.tensor([0, 1], device=DEVICE), weights(3).requires_grad_())


# ---- the gradient that forward computes -----------------------------------------------------------------------------


def fused_agrees(x: Tensor, target: Tensor, weight: Tensor | None = None, g: Tensor | None = None, **options: Any) -> None:
    agree(x, target, weight, g, **options)
    tensors = [x, target, *([] if weight is None else [weight])]
    with poisoned(), unchanged(*tensors):
        fused, plain = (
            with_gradients(lambda *t, f=f: F.cross_entropy(*t, fused=f, **options), tensors, g)  # type: ignore[misc]
            for f in (True, False)
        )
    eps = torch.finfo(x.dtype).eps
    torch.testing.assert_close(fused, plain, rtol=4 * eps, atol=4 * eps, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (3, 70), (2, 41, 3)], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_fused(backend: str, shape: tuple[int, ...], options: str, dtype: torch.dtype) -> None:
    x, chosen = logits(*shape, dtype=dtype), OPTIONS[options]
    target = classes(x, chosen.get("ignore_index", -100))
    fused_agrees(x, target, **chosen)
    fused_agrees(x, target, weights(shape[1], dtype), **chosen)


def test_fused_rows_too_long_for_one_program() -> None:
    kernels = pytest.importorskip("dlaccel.kernels.cross_entropy")
    x = logits(3, 70)
    with constants(kernels, WHOLE=4, WHOLE_WITH_GRADIENT=4), dlaccel.use_backend("triton"):
        for options in ({}, {"reduction": "none"}, {"reduction": "sum"}):
            fused_agrees(x, classes(x), weights(70), **options)


@pytest.mark.parametrize("g", [1.0, -2.5])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fused_gradient_is_handed_over_once(backend: str, reduction: str, g: float) -> None:
    """The first backward returns forward's buffer; those that follow compute the gradient, and none changes another's."""
    x, target = logits(5, 8), torch.tensor([0, 7, 3, -100, 1], device=DEVICE)
    loss = F.cross_entropy(x, target, reduction=reduction, fused=True)
    want = torch.autograd.grad(theirs(x, target, reduction=reduction), x, torch.full_like(loss, g))[0]
    owned = loss.grad_fn.owned  # type: ignore[union-attr]
    first, second, third = (torch.autograd.grad(loss, x, torch.full_like(loss, g), retain_graph=True)[0] for _ in range(3))
    assert first.data_ptr() == owned.data_ptr() and len({t.data_ptr() for t in (first, second, third)}) == 3
    for dx in (first, second, third):
        torch.testing.assert_close(dx, want)


def test_fused_gradient_becomes_grad_without_a_copy(backend: str) -> None:
    x = logits(5, 8)
    loss = F.cross_entropy(x, classes(x), fused=True)
    address = loss.grad_fn.owned.data_ptr()  # type: ignore[union-attr]
    loss.backward()
    assert x.grad is not None and x.grad.data_ptr() == address


def test_fused_is_differentiable_twice(backend: str) -> None:
    x = logits(3, 5)
    target = classes(x)

    def penalty(loss: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), x)[0]

    torch.testing.assert_close(penalty(F.cross_entropy(x, target, fused=True)), penalty(theirs(x, target)))


def test_fused_float16_keeps_what_a_loss_scale_saves(backend: str) -> None:
    """1 / R alone takes these gradients below the smallest float16; the loss scale brings them back."""
    R = 4000 if backend == "torch" or not INTERPRET else 200
    x = (torch.randn(R, 40, device=DEVICE) * 3).half().requires_grad_()
    target = classes(x)
    got, want = (
        torch.autograd.grad(f(x), x, torch.tensor(65504.0, device=DEVICE, dtype=torch.float16))[0]
        for f in (lambda x: F.cross_entropy(x, target, fused=True), lambda x: theirs(x.float(), target).half())
    )
    torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-3)


def test_fused_where_it_does_not_apply(backend: str) -> None:
    """Under a transform or without gradients the flag changes nothing."""
    x = logits(3, 5)
    target = classes(x)
    want = torch.autograd.grad(theirs(x, target), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: F.cross_entropy(x, target, fused=True))(x.detach()), want)
    with torch.no_grad():
        torch.testing.assert_close(F.cross_entropy(x, target, fused=True), theirs(x, target))


# ---- num_items ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_num_items_accumulates_micro_batches(backend: str, as_tensor: bool, dtype: torch.dtype) -> None:
    """3 targets that count in one micro-batch and 1 in the next: the mean over 4, not the mean of two means."""
    x = logits(6, 5, dtype=dtype)
    target = torch.tensor([1, 2, 3, -100, -100, 4], device=DEVICE)
    items: float | Tensor = torch.tensor(4, device=DEVICE) if as_tensor else 4
    parts = [F.cross_entropy(x[i : i + 3], target[i : i + 3], num_items=items) for i in (0, 3)]
    assert parts[0].dtype == dtype
    total = parts[0] + parts[1]
    total.backward()
    want = torch.autograd.grad(theirs(x.float(), target), x)[0]
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(total.float(), theirs(x.float(), target), rtol=4 * eps, atol=0)
    torch.testing.assert_close(x.grad, want, rtol=4 * eps, atol=eps)


def test_num_items_of_a_sum_beyond_float16(backend: str) -> None:
    x = torch.zeros(300, 4, device=DEVICE, dtype=torch.float16)
    x[:, 0] = -1000.0
    loss = F.cross_entropy(x, torch.zeros(300, dtype=torch.int64, device=DEVICE), num_items=300)
    torch.testing.assert_close(loss.float(), torch.tensor(1001.0986, device=DEVICE), rtol=1e-3, atol=0)


def test_num_items_is_one_number(backend: str) -> None:
    x = logits(2, 3)
    target = classes(x)
    loss = F.cross_entropy(x, target, num_items=torch.tensor([4], device=DEVICE))
    torch.testing.assert_close(loss, theirs(x, target, reduction="sum") / 4)
    assert loss.shape == ()
    with pytest.raises(ValueError, match="num_items: expected a number or a tensor of one element"):
        F.cross_entropy(x, target, num_items=torch.tensor([4, 4], device=DEVICE))


def test_num_items_needs_a_mean() -> None:
    with pytest.raises(ValueError, match="num_items: the divisor of reduction 'mean'"):
        F.cross_entropy(logits(2, 3), torch.tensor([0, 1]), reduction="sum", num_items=2)


# ---- dtypes, autocast, auto -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_autocast(backend: str, dtype: torch.dtype, probabilities: bool) -> None:
    """float32 losses of 16-bit logits, gradients in the inputs' dtypes, backward inside and outside the context."""
    runs(backend, dtype)
    x = logits(6, 9, dtype=dtype)
    target = torch.rand(6, 9, device=DEVICE).requires_grad_() if probabilities else classes(x)
    weight = weights(9, torch.float64 if dtype == torch.float64 else torch.float32)
    wanted = [x, target] if probabilities else [x]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got, want = F.cross_entropy(x, target, weight), theirs(x, target, weight)
        inside = torch.autograd.grad(F.cross_entropy(x, target, weight), wanted)
    outside = torch.autograd.grad(got, wanted)
    for ours, expected in ((got, want), *zip(inside, torch.autograd.grad(want, wanted, retain_graph=True), strict=True)):
        torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.skipif(DEVICE == "cuda", reason="auto on the CPU")
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_autocast_in_auto(dtype: torch.dtype, reduction: str) -> None:
    """As torch, with float32 weights beside logits of a layer, and where float16 is summed in float32 without autocast."""
    for rows, C in ((6, 9), (op.FEW_ROWS, 9), (op.EXACT_ROWS + 1, 40)):
        x, weight = logits(rows, C, dtype=dtype), weights(C)
        for target in (classes(x), torch.rand(rows, C)):
            with torch.autocast("cpu", torch.bfloat16):
                got, want = (f(x, target, weight, reduction=reduction) for f in (F.cross_entropy, theirs))
            torch.testing.assert_close(got, want)
            dx, expected = (torch.autograd.grad(loss.sum(), x)[0] for loss in (got, want))
            torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3)], ids=str)
def test_batched_gradients_of_the_weights(backend: str, shape: tuple[int, ...]) -> None:
    x, target, weight = logits(*shape).detach(), torch.rand(shape, device=DEVICE), weights(4)

    def derivatives(f: Any) -> list[Any]:
        rows = torch.autograd.functional.jacobian(lambda w: f(x, target, w, reduction="none"), weight, vectorize=True)
        mean = torch.autograd.functional.hessian(lambda x, w: f(x, target, w), (x, weight), vectorize=True)
        return [rows, mean]

    torch.testing.assert_close(derivatives(F.cross_entropy), derivatives(theirs))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float16, torch.bfloat16)], ids=str)
def test_probabilities_of_another_dtype(backend: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    if DEVICE == "cuda" and backend == "triton" and torch.float64 in dtypes:
        pytest.skip("the kernels do not take float64 on a GPU")
    x, target = logits(4, 6, dtype=dtypes[0]), torch.rand(4, 6, device=DEVICE).to(dtypes[1]).requires_grad_()
    agree(x, target)


def test_legacy_reductions(backend: str) -> None:
    x = logits(3, 4)
    target = classes(x)
    for legacy in ({"size_average": False}, {"reduce": False}, {"size_average": True, "reduce": True}):
        with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
            torch.testing.assert_close(F.cross_entropy(x, target, **legacy), theirs(x, target, **legacy))


@pytest.mark.skipif(DEVICE == "cuda", reason="auto on the CPU")
def test_auto_calls_aten_where_that_is_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    x = logits(4, 40)
    LAUNCHES.clear()
    assert type(F.cross_entropy(x, classes(x)).grad_fn).__name__ == "NllLossBackward0" and not LAUNCHES
    x.data[1, 3] = NAN
    target = torch.tensor([0, -100, 2, 3])
    (dx,) = torch.autograd.grad(F.cross_entropy(x, target), x)
    assert dx.isfinite().all() and LAUNCHES["cross_entropy", "torch"] == 1  # aten's gradient has NaN in the ignored row
    monkeypatch.setattr(op, "LARGE", 0)
    LAUNCHES.clear()
    x = logits(4, 40)
    loss = F.cross_entropy(x, classes(x))
    assert type(loss.grad_fn).__name__ == "cross_entropyBackward" and LAUNCHES["cross_entropy", "torch"] == 1
    loss.backward()
    assert ("cross_entropy_backward", "torch") not in LAUNCHES  # forward computed the gradient


@pytest.mark.skipif(DEVICE == "cuda", reason="auto on the CPU")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_auto_of_few_classes(options: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "FEW_ROWS", 2)
    x, chosen = logits(9, 7, dtype=dtype), OPTIONS[options]
    for target in (classes(x, chosen.get("ignore_index", -100)), classes(x).byte()):
        agree(x, target, **chosen)
    if chosen.get("ignore_index", -1) < 0:
        agree(x, torch.rand(9, 7).to(dtype).requires_grad_(), **chosen)


# ---- fuzz -----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_fuzz(backend: str, data: Any) -> None:
    dtype = data.draw(st.sampled_from([d for d in DTYPES if not (DEVICE == "cuda" and d == torch.float64)]))
    positions = data.draw(st.sampled_from([(), (3,), (2, 3), (9,)]))
    shape = (data.draw(st.sampled_from([1, 2, 5, 7, 8, 9, 17])), data.draw(sizes(smallest=1)), *positions)
    probabilities = data.draw(st.booleans())
    x = data.draw(drawn_tensors(shape, dtype, special=not probabilities)).requires_grad_()
    options = {
        "reduction": data.draw(st.sampled_from(["none", "mean", "sum"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1, 1.0])),
    }
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    weight = layout(torch.rand(shape[1], generator=generator).add(0.5).to(dtype)) if data.draw(st.booleans()) else None
    if probabilities:
        target = layout(torch.rand(shape, generator=generator).to(dtype)).requires_grad_(data.draw(st.booleans()))
    else:
        target = torch.randint(shape[1], (shape[0], *positions), generator=generator)
        options["ignore_index"] = data.draw(st.sampled_from([-100, 0, shape[1] - 1, 300]))
        if data.draw(st.booleans()):
            target = torch.where(torch.rand(target.shape, generator=generator) < 0.4, options["ignore_index"], target)
        target = layout(target)
    target, weight = target.to(DEVICE), None if weight is None else weight.to(DEVICE)
    g = None
    if options["reduction"] == "none":
        g = data.draw(drawn_tensors((shape[0], *positions), dtype))
    agree(x, target, weight, g, **options)


# ---- the module -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies_share_nothing(copied: Any) -> None:
    module = CrossEntropyLoss(torch.rand(5), ignore_index=2, label_smoothing=0.1)
    x, target = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    loss, other = module(x, target), copied(module)
    assert torch.equal(other(x, target), loss)
    assert other.weight.data_ptr() != module.weight.data_ptr()


def test_module_is_torchs() -> None:
    module = CrossEntropyLoss(torch.rand(5))
    assert isinstance(module, torch.nn.CrossEntropyLoss) and list(module.state_dict()) == ["weight"]
    assert math.isclose(module(torch.zeros(2, 5), torch.tensor([1, 2])).item(), math.log(5), rel_tol=1e-6)


def test_module_accumulates_and_fuses(backend: str) -> None:
    x, weight = logits(6, 5), weights(5)
    target = torch.tensor([1, 2, 3, -100, -100, 4], device=DEVICE)
    module = CrossEntropyLoss(weight, fused=True)
    loss = module(x[:3], target[:3], num_items=4) + module(x[3:], target[3:], torch.tensor(4, device=DEVICE))
    torch.testing.assert_close(loss, theirs(x, target, weight, reduction="sum") / 4)
    assert module(x, target).grad_fn.owned is not None and CrossEntropyLoss(weight).fused is None


def test_reference_is_torchs() -> None:
    """The float64 reference of the contract tests, against torch."""
    x = torch.randn(4, 5, 3, dtype=torch.float64)
    for options in OPTIONS.values():
        if options.get("label_smoothing", 0) >= 0:
            target = classes(x, options.get("ignore_index", -100)).cpu()
            weight = torch.rand(5, dtype=torch.float64)
            torch.testing.assert_close(reference(x, target, weight, **options), theirs(x, target, weight, **options))
