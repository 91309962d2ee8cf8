"""The checked interpreter finds one seeded bug per rule, leaves correct kernels alone, and computes bfloat16 as torch does.

Run on every supported Triton: it is what notices that a private name moved.
"""

from __future__ import annotations

import pytest
import torch

from tests.kit import INTERPRET, sparse

pytest.importorskip("triton", reason="Triton is not installed")
if not INTERPRET:
    pytest.skip("kernels are compiled here, not interpreted", allow_module_level=True)

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.interp_checks import KernelFault, checked

N, BLOCK = 100, 32  # 4 programs, the last one ragged


# ---- correct kernels ------------------------------------------------------------------------------------------------


@triton.jit
def double(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@triton.jit
def sum_by_atomics(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


@triton.jit
def sum_rows_by_descriptor(x, y, n, B: tl.constexpr):
    rows = tl.make_tensor_descriptor(x, shape=[n, 16], strides=[16, 1], block_shape=[B, 16])
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.sum(rows.load([tl.program_id(0) * B, 0]), 1), mask=i < n)


@triton.jit
def merge_in_last_program(x, y, partial, counter, n, B: tl.constexpr, BARRIER: tl.constexpr, SEM: tl.constexpr):
    """Each program stores a partial sum; the one that arrives last adds them up and resets the counter."""
    p = tl.program_id(0)
    i = p * B + tl.arange(0, B)
    tl.store(partial + p, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem=SEM) == tl.num_programs(0) - 1:
        k = tl.arange(0, B)
        tl.store(y, tl.sum(tl.load(partial + k, mask=k < tl.num_programs(0), other=0.0), 0))
        tl.store(counter, 0)


# ---- one bug each ---------------------------------------------------------------------------------------------------


@triton.jit
def store_without_mask(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n) * 2)


@triton.jit
def load_without_mask(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) * 2, mask=i < n)


@triton.jit
def load_before_the_start(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n) + tl.load(x + i - 1, mask=i < n), mask=i < n)


@triton.jit
def atomic_without_mask(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.atomic_add(y + i, 1.0)


@triton.jit
def one_element_two_writers(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y, tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))


@triton.jit
def stores_what_another_loaded(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(y + (i + B) % n, mask=i < n) + 1, mask=i < n)


@triton.jit
def loads_what_another_stored(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(y + (i + n - B) % n, mask=i < n) + 1, mask=i < n)


@triton.jit
def loads_a_running_sum(x, y, n, B: tl.constexpr):
    tl.atomic_add(y, 1.0, sem="relaxed")
    tl.store(y + 1 + tl.program_id(0), tl.load(y))


@triton.jit
def lanes_disagree(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i // 2, tl.load(x + i, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def index_overflows(x, y, n, stride, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, (i * stride).to(tl.float32), mask=i < n)


@triton.jit
def sums_undefined_lanes(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n), 0))


BUGS = [
    (store_without_mask, (), "store out of bounds: 28 lane.*index 100..127 .* 'y'.*program \\(3, 0, 0\\).*test_interp"),
    (load_without_mask, (), "load out of bounds: 28 lane.*index 100..127 .* 'x'"),
    (load_before_the_start, (), "load out of bounds: 1 lane.*index -1..-1 .* 'x'"),
    (atomic_without_mask, (), "atomic out of bounds: 28 lane.*'y'"),
    (one_element_two_writers, (), "store after a store by program \\(0, 0, 0\\).*'y'\\[0\\]"),
    (stores_what_another_loaded, (), "store after a load"),
    (loads_what_another_stored, (), "load after a store"),
    (loads_a_running_sum, (), "load after an atomic|atomic after a load"),
    (lanes_disagree, (), "lanes of one store disagree"),
    (index_overflows, (2**28,), "overflow detected for operation mul"),
]


def launch(kernel, *args, **constants):
    kernel[(triton.cdiv(N, BLOCK),)](*args, B=BLOCK, **constants)


@pytest.fixture
def x():
    return torch.randn(N)


@pytest.fixture
def y():
    return torch.zeros(N)


@pytest.mark.parametrize("kernel, more, message", [pytest.param(*bug, id=bug[0].__name__) for bug in BUGS])
def test_seeded_bug(kernel, more, message, x, y):
    with pytest.raises(AssertionError, match=message):
        launch(kernel, x, y, N, *more)


def test_undefined_lanes_are_nan(x, y):
    launch(sums_undefined_lanes, x, y, N)
    assert y[:4].isnan().tolist() == [False, False, False, True]


@pytest.mark.parametrize("view", [lambda t: t[:, 0], lambda t: t[:, 1]], ids=["first column", "second column"])
def test_elements_that_a_view_skips_are_outside(view, y):
    with pytest.raises(KernelFault, match="load out of bounds"):
        launch(double, view(torch.randn(N, 2)), y, N)


def test_a_view_of_the_same_storage_may_own_them(y):
    both = torch.randn(2, N)
    launch(double, both[0], both[1], N)
    assert torch.equal(both[1], both[0] * 2)


def test_race_through_two_views_of_one_storage(x):
    with pytest.raises(KernelFault, match="store after a load"):
        launch(double, x[1:], x[:-1], N - 1)


def test_argument_in_a_tuple(x, y):
    @triton.jit
    def pair(t, n, B: tl.constexpr):
        i = tl.program_id(0) * B + tl.arange(0, B)
        tl.store(t[1] + i, tl.load(t[0] + i, mask=i < n), mask=i < n)

    launch(pair, (x, y), N)
    assert torch.equal(x, y)


@pytest.mark.parametrize("kernel, expected", [(double, lambda t: t * 2), (sum_by_atomics, lambda t: t.sum())])
def test_correct_kernel(kernel, expected, x, y):
    launch(kernel, x, y, N)
    torch.testing.assert_close(y if kernel is double else y[0], expected(x))


def test_correct_descriptor(y):
    table = torch.randn(N, 16)
    launch(sum_rows_by_descriptor, table, y, N)
    torch.testing.assert_close(y, table.sum(1))


@triton.jit
def double_by_descriptor(x, y, B: tl.constexpr):
    row = tl.program_id(0) * B
    y.store([row, 0], x.load([row, 0]) * 2)


def test_correct_host_descriptor():
    x, y = torch.randn(N, 16), torch.zeros(N, 16)
    launch(double_by_descriptor, *(TensorDescriptor.from_tensor(t, [BLOCK, 16]) for t in (x, y)))
    assert torch.equal(y, x * 2)
    wrong = TensorDescriptor(y[: N // 2], [N, 16], [16, 1], [BLOCK, 16])  # twice as many rows as there are
    with pytest.raises(KernelFault, match=r"store out of bounds.*'y'"):
        launch(double_by_descriptor, TensorDescriptor.from_tensor(x, [BLOCK, 16]), wrong)


def test_merge_ordered_by_barrier_and_atomic(x, y):
    counter = torch.zeros(1, dtype=torch.int32)
    launch(merge_in_last_program, x, y, torch.empty(4), counter, N, BARRIER=True, SEM="acq_rel")
    torch.testing.assert_close(y[0], x.sum())
    assert counter.item() == 0


@pytest.mark.parametrize("barrier, sem", [(False, "acq_rel"), (True, "relaxed"), (True, "acquire"), (True, "release")])
def test_merge_without_order_is_a_race(barrier, sem, x, y):
    counter = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelFault, match=r"load after a store by program \(0, 0, 0\).*'partial'"):
        launch(merge_in_last_program, x, y, torch.empty(4), counter, N, BARRIER=barrier, SEM=sem)


@pytest.mark.unchecked("races", reason="tests the mark")
def test_unchecked_rule(x, y):
    launch(one_element_two_writers, x, y, N)
    with pytest.raises(KernelFault, match="out of bounds"):
        launch(store_without_mask, x, y, N)


@pytest.mark.unchecked(reason="tests the mark")
def test_unchecked(x, y):
    launch(one_element_two_writers, x, y, N)
    launch(sums_undefined_lanes, x, y, N)
    assert not y.isnan().any()


# ---- offsets beyond 2^31 --------------------------------------------------------------------------------------------


@triton.jit
def double_rows(x, y, n, stride_x, B: tl.constexpr, INDEX: tl.constexpr):
    row = tl.program_id(0).to(INDEX)
    i = tl.arange(0, B)
    tl.store(y + row * n + i, tl.load(x + row * stride_x + i, mask=i < n) * 2, mask=i < n)


@pytest.mark.unchecked("memory", reason="4 GiB of address space cannot be copied")
def test_sparse_tensor_shows_int32_offsets():
    x, y = sparse((3, 8), (2**30 + 8, 1), torch.float16), torch.empty(3, 8, dtype=torch.float16)
    x.copy_(torch.arange(24).view(3, 8))
    double_rows[(3,)](x, y, 8, x.stride(0), B=8, INDEX=tl.int64)
    assert torch.equal(y, x * 2)
    with pytest.raises(AssertionError, match="overflow detected"):
        double_rows[(3,)](x, y, 8, x.stride(0), B=8, INDEX=tl.int32)


# ---- bfloat16 -------------------------------------------------------------------------------------------------------


@triton.jit
def arithmetic(x, y, out, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = tl.load(x + i), tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + B + i, a - b)
    tl.store(out + 2 * B + i, a * b)
    tl.store(out + 3 * B + i, (a / b).to(tl.bfloat16))
    tl.store(out + 4 * B + i, -a)
    tl.store(out + 5 * B + i, tl.where(a > b, a, b))
    tl.store(out + 6 * B + i, tl.maximum(a, b))
    tl.store(out + 7 * B + i, a + 0.5)
    tl.store(out + 8 * B + i, tl.full((B,), 1.2345, tl.bfloat16))
    tl.store(out + 9 * B + i, tl.clamp(a, -0.5, 0.5).to(tl.bfloat16))
    tl.store(out + 10 * B + i, tl.abs(a))
    tl.store(out + 11 * B + i, tl.fma(a, b, a))


def test_bfloat16_arithmetic():
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty(12, 64, dtype=torch.bfloat16)
    arithmetic[(1,)](x, y, out, B=64)
    a, b = x.float(), y.float()
    expected = [a + b, a - b, a * b, a / b, -a, a.maximum(b), a.maximum(b), a + 0.5]
    expected += [torch.full_like(a, 1.2345), a.clamp(-0.5, 0.5), a.abs(), a * b + a]
    assert torch.equal(out, torch.stack(expected).bfloat16())


@triton.jit
def cast(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i).to(y.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32], ids=str)
def test_cast_to_bfloat16_rounds_to_nearest_even(source):
    x = (torch.randn(4096) * 1000).to(source)
    y = torch.empty(4096, dtype=torch.bfloat16)
    cast[(1,)](x, y, B=4096)
    assert torch.equal(y, x.bfloat16())


def test_cast_to_bfloat16_of_special_values():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), -0.0, 1e-40, 3.4e38, 1.0, -1.0])
    y = torch.empty(8, dtype=torch.bfloat16)
    cast[(1,)](x, y, B=8)
    torch.testing.assert_close(y, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def matrix_product(x, y, B: tl.constexpr):
    i, j = tl.arange(0, B)[:, None], tl.arange(0, B)[None, :]
    a = tl.load(x + i * B + j)
    tl.store(y + i * B + j, tl.dot(a, a))


def test_bfloat16_dot():
    x, y = torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    matrix_product[(1,)](x, y, B=16)
    torch.testing.assert_close(y, x.float() @ x.float())


@triton.jit
def reductions(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    a = tl.load(x + i)
    tl.store(out, tl.sum(a, 0).to(tl.float32))
    tl.store(out + 1, tl.max(a, 0).to(tl.float32))
    tl.store(out + 2, tl.min(a, 0).to(tl.float32))
    tl.store(out + 3, tl.argmax(a, 0).to(tl.float32))
    rows = tl.reshape(a, (B // 8, 8))
    tl.store(out + 8 + tl.arange(0, 8), tl.sum(rows, 0).to(tl.float32))
    tl.store(out + 16 + tl.arange(0, 8)[None, :], tl.sum(rows, 0, keep_dims=True).to(tl.float32))
    tl.store(out + 32 + i, tl.cumsum(a, 0).to(tl.float32))
    tl.store(out + 32 + B + i, tl.sort(a).to(tl.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_reductions(dtype):
    x, out = torch.randn(32).to(dtype), torch.zeros(96)
    reductions[(1,)](x, out, B=32)
    exact, tolerance = x.double(), {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps}
    rows = exact.view(4, 8).sum(0)
    torch.testing.assert_close(out[0].double(), exact.sum(), **tolerance)
    assert out[1:4].tolist() == [x.max(), x.min(), x.argmax()]
    torch.testing.assert_close(out[8:24].double(), torch.cat([rows, rows]), **tolerance)
    torch.testing.assert_close(out[32:64].double(), exact.cumsum(0), **tolerance)
    assert torch.equal(out[64:], x.float().sort().values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sum_rounds_at_every_step(dtype):
    """Which the result shows: the odd units are lost on the way."""
    big = 2 / torch.finfo(dtype).eps  # from here on only even numbers exist
    x, out = torch.tensor([big, 0, 0, 0, 1, 0, 1, 0], dtype=dtype), torch.zeros(1)

    @triton.jit
    def total(x, out, B: tl.constexpr):
        tl.store(out, tl.sum(tl.load(x + tl.arange(0, B)), 0).to(tl.float32))

    total[(1,)](x, out, B=8)
    assert out.item() == big  # a sum in float32 gives big + 2


def test_everything_is_restored():
    before = {name: vars(tl)[name] for name in ("load", "store")}
    builder = triton.runtime.interpreter.InterpreterBuilder
    outside = {n: getattr(builder, n) for n in ("binary_op", "create_masked_load")}
    with checked():
        assert builder.create_masked_load is not outside["create_masked_load"]
    assert outside == {n: getattr(builder, n) for n in outside} and before == {n: vars(tl)[n] for n in before}
