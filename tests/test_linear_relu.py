"""linear_relu: what the contract tests do not cover."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import dlaccel
import dlaccel.functional as F
from dlaccel.bench.cases.linear_relu import eager
from dlaccel.fallback import linear_relu as fallback
from dlaccel.nn import LinearReLU
from dlaccel.ops._register import LAUNCHES
from tests import conformance
from tests.conformance import DTYPES
from tests.kit import COTANGENTS, DEVICE, INTERPRET, LAYOUTS, check, poisoned, sparse, unchanged, with_gradients
from tests.strategies import given, sizes, st
from tests.strategies import tensors as drawn_tensors

needs_interpreter = pytest.mark.skipif(not INTERPRET, reason="chooses a kernel by an assumed target: interpreter only")


def tensors(m: int, k: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> list[Tensor]:
    shapes = [(m, k), (n, k), *([(n,)] if bias else [])]
    return [torch.randn(s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]


# ---- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(31, 33, 32), (32, 32, 33), (33, 64, 31), (1, 1, 1), (65, 7, 40), (64, 100, 64)], ids=str)
def test_sizes_around_the_blocks(backend: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    with poisoned():
        check(F.linear_relu, eager, tensors(*sizes, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_layouts_of_one_argument(backend: str, argument: int, layout: str) -> None:
    given = tensors(17, 21, 18)
    given[argument] = LAYOUTS[layout](given[argument])
    check(F.linear_relu, eager, given)


@pytest.mark.parametrize("cotangent", COTANGENTS)
def test_cotangents(backend: str, cotangent: str) -> None:
    given = [torch.randn(s, device=DEVICE, requires_grad=True) for s in ((2, 3, 7, 9), (18, 9), (18,))]
    g = COTANGENTS[cotangent](eager(*given).detach())
    with poisoned():
        check(F.linear_relu, eager, given, g)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, 1.0, -1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_special_values_are_bit_equal_to_aten(backend: str, dtype: torch.dtype) -> None:
    """Products with 1 are exact, so the results must agree to the bit, -0.0 and the position of NaN included."""
    x = torch.tensor(SPECIAL, device=DEVICE).to(dtype).repeat(3)[:, None].requires_grad_()
    weight = torch.ones(1, 1, device=DEVICE, dtype=dtype, requires_grad=True)
    g = torch.linspace(-2, 2, len(x), device=DEVICE).to(dtype)[:, None]
    got, want = with_gradients(F.linear_relu, [x, weight], g), with_gradients(eager, [x, weight], g)
    assert torch.equal(got[0].isnan(), want[0].isnan())
    assert torch.equal(got[0].nan_to_num(7), want[0].nan_to_num(7))
    assert torch.equal(got[1].isnan(), want[1].isnan())
    assert torch.equal(got[1].nan_to_num(7), want[1].nan_to_num(7))


def test_a_nan_bias_reaches_its_whole_column(backend: str) -> None:
    x, weight, bias = (t.detach() for t in tensors(9, 5, 6))
    bias[2] = float("nan")
    y = F.linear_relu(x, weight, bias)
    assert y[:, 2].isnan().all() and not y[:, [0, 1, 3, 4, 5]].isnan().any()


def test_sum_of_many_terms_is_accumulated_wide(backend: str) -> None:
    """4096 products of 16-bit ones: a 16-bit accumulator stops at 2048."""
    x = torch.ones(1, 4096, device=DEVICE, dtype=torch.float16)
    assert F.linear_relu(x, x).item() == 4096


@pytest.mark.skipif(DEVICE == "cuda", reason="maps address space of the CPU")
@pytest.mark.unchecked("memory", reason="the check holds a copy of the storage, which spans gigabytes")
def test_offsets_beyond_32_bits() -> None:
    stride = 2**30 + 8
    x = sparse((4, 8), (stride, 1))
    x.copy_(torch.randn(4, 8))
    weight = torch.randn(3, 8)
    with dlaccel.use_backend("triton"):
        torch.testing.assert_close(F.linear_relu(x, weight), eager(x.contiguous(), weight))


# ---- torch's tables and fuzz ----------------------------------------------------------------------------------------


def runs(backend: str, dtype: torch.dtype) -> None:
    if DEVICE == "cuda" and backend == "triton" and dtype == torch.float64:
        pytest.skip("the kernels do not take float64 on a GPU")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conformance(backend: str, dtype: torch.dtype) -> None:
    runs(backend, dtype)
    conformance.check_function("nn.functional.linear", F.linear_relu, dtype, at_least=50, eager=eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module_conformance(backend: str, dtype: torch.dtype) -> None:
    runs(backend, dtype)
    conformance.check_module("nn.Linear", LinearReLU, dtype, at_least=12, eager=lambda m, input: torch.relu(m(input)))


@given(st.data())
def test_fuzz(backend: str, data: Any) -> None:
    m, k, n = (data.draw(sizes()) for _ in range(3))
    dtype = data.draw(st.sampled_from([d for d in DTYPES if not (DEVICE == "cuda" and d == torch.float64)]))
    shapes = [(m, k), (n, k), *([(n,)] if data.draw(st.booleans()) else [])]
    given_tensors = [data.draw(drawn_tensors(shape, dtype)).requires_grad_(data.draw(st.booleans())) for shape in shapes]
    g = data.draw(drawn_tensors((m, n), dtype))
    absolute = [t.detach().abs().double() for t in given_tensors]
    products = float((absolute[0] @ absolute[1].t()).nan_to_num(0, 0, 0).amax()) if m and n and k else 0.0
    reach = float(g.abs().double().nan_to_num(0, 0, 0).max()) if m and n else 0.0
    wanted = [i for i, t in enumerate(given_tensors) if t.requires_grad]
    largest = [float(a.nan_to_num(0, 0, 0).max()) if a.numel() else 0.0 for a in absolute]
    sums = [n * reach * largest[1], m * reach * largest[0], m * reach]
    with poisoned():
        check(F.linear_relu, eager, given_tensors, g, terms=[products, *(sums[i] for i in wanted)])


# ---- which kernel ---------------------------------------------------------------------------------------------------


def hopper() -> Any:
    """A target whose tensor-core path the interpreter can run."""
    from dlaccel.kernels import config

    class InterpretedHopper(config.Target):
        def at_least(self, capability: int) -> bool:
            return capability <= 90

    return config.assume(InterpretedHopper("interpreter", 90, 4, 1 << 30, 32, 0, "interpreter"))


@needs_interpreter
@pytest.mark.parametrize("sizes", [(64, 64, 64), (40, 72, 88), (8, 8, 8), (96, 40, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_descriptor_kernel(sizes: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    from dlaccel.kernels.launch import COUNTS

    COUNTS.clear()
    with hopper(), dlaccel.use_backend("triton"), poisoned():
        check(F.linear_relu, eager, tensors(*sizes, dtype, bias))
    assert COUNTS["linear_relu_tma_kernel"] == 1 and COUNTS["linear_relu_kernel"] == 0


@needs_interpreter
def test_descriptor_kernel_keeps_nan_and_negative_zero() -> None:
    x = torch.tensor(SPECIAL, dtype=torch.float16)[:, None] * torch.eye(8, dtype=torch.float16)[:1]
    weight = torch.eye(8, dtype=torch.float16)
    with hopper(), dlaccel.use_backend("triton"):
        y = F.linear_relu(x, weight)
    want = eager(x, weight)
    assert torch.equal(y.isnan(), want.isnan()) and torch.equal(y.nan_to_num(7), want.nan_to_num(7))


@needs_interpreter
@pytest.mark.parametrize("change", ["K % 8", "N % 8", "float32", "x transposed", "x misaligned", "weight sliced", "x expanded"])
def test_descriptors_only_where_they_fit(change: str) -> None:
    from dlaccel.kernels import linear_relu as kernels

    def uses_descriptors() -> bool:
        return kernels._forward(x, weight, None)[0].kernel is kernels.linear_relu_tma_kernel

    k, n = 12 if change == "K % 8" else 16, 12 if change == "N % 8" else 16
    x, weight = torch.randn(16, k).half(), torch.randn(n, k).half()
    with hopper():
        assert uses_descriptors() == (change not in ("K % 8", "N % 8"))
        if change == "float32":
            x, weight = x.float(), weight.float()
        elif change == "x transposed":
            x = x.t().contiguous().t()
        elif change == "x misaligned":
            x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(16, k)
        elif change == "weight sliced":
            weight = torch.randn(n, 2 * k).half()[:, ::2]
        elif change == "x expanded":
            x = x[:1].expand(16, k)
        assert not uses_descriptors()


@pytest.mark.parametrize(
    "setting, precision", [("none", "ieee"), ("ieee", "ieee"), ("tf32", "tf32")], ids=["default", "ieee", "tf32"]
)
def test_float32_follows_torch_on_tf32(setting: str, precision: str) -> None:
    from dlaccel.kernels import config, launch
    from dlaccel.kernels import linear_relu as kernels

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = setting
    try:
        with launch.recording() as launches, config.assume(config.TARGETS["sm_90"]):
            kernels.linear_relu(torch.empty(64, 64, device="meta"), torch.empty(64, 64, device="meta"), None)
        assert [n.options["PRECISION"] for n in launches] == [precision]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- the torch backend ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_products_of_the_fallback(onednn: bool, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if onednn and fallback._onednn is None:
        pytest.skip("this torch has no oneDNN linear")
    monkeypatch.setattr(fallback, "least_products", lambda: 1 if onednn else 2**63)
    given = [LAYOUTS[layout](t) for t in tensors(19, 33, 20)]
    with dlaccel.use_backend("torch"), poisoned():
        check(F.linear_relu, eager, given)


def test_the_fallback_keeps_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "least_products", lambda: 1 if fallback._onednn is not None else 2**63)
    x = torch.tensor([[float("nan"), 1.0], [2.0, 3.0]])
    with dlaccel.use_backend("torch"):
        assert torch.equal(F.linear_relu(x, torch.eye(2)).isnan(), x.isnan() | torch.tensor([[False, True], [False, False]]))


@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.float32, "meta")], ids=["float64", "meta"])
def test_torchs_defaults_do_not_change_the_processor(dtype: torch.dtype, device: str) -> None:
    want, before = fallback.onednn_family(), torch.get_default_dtype()
    fallback.onednn_family.cache_clear()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            assert fallback.onednn_family() == want
    finally:
        torch.set_default_dtype(before)
        fallback.onednn_family.cache_clear()


def test_auto_calls_aten_where_that_is_as_fast() -> None:
    LAUNCHES.clear()
    y = F.linear_relu(*tensors(4, 5, 6))
    if DEVICE == "cpu":
        assert not LAUNCHES and type(y.grad_fn).__name__ == "ReluBackward0"
    for chosen in ("torch", "triton"):
        with dlaccel.use_backend(chosen):
            y = F.linear_relu(*tensors(4, 5, 6))
        assert type(y.grad_fn).__name__ == "linear_reluBackward" and LAUNCHES["linear_relu", chosen] == 1


def test_autocast_casts_before_auto_chooses() -> None:
    """Mixed precision gives lower-precision activations and float32 weights, at any size."""
    for rows in (3, 333):
        x, layer = torch.randn(rows, 784, dtype=torch.bfloat16), LinearReLU(784, 300)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear_relu(x, layer.weight.bfloat16(), layer.bias.bfloat16()))


def test_calls_of_aten_raise_the_same_errors() -> None:
    with pytest.raises(RuntimeError, match="linear_relu: weight: expected"):
        F.linear_relu(torch.ones(2, 3), torch.ones(4, 3).double())
    with pytest.raises(RuntimeError, match="linear_relu: x: expected a floating-point"):
        F.linear_relu(torch.ones(2, 3).int(), torch.ones(4, 3).int())


@pytest.mark.parametrize(
    "given",
    [
        (torch.ones(2, 3), torch.ones(3)),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(())),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(1)),
        (torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4)),
        (torch.ones(2, 3).int(), torch.ones(4, 3).int()),
    ],
    ids=["1-d weight", "() bias", "(1,) bias", "(M, N) bias", "integers"],
)
def test_deviations(backend: str, given: tuple[Tensor, ...]) -> None:
    """What torch takes and docs/ops/linear_relu.md says is refused."""
    eager(*given)
    with pytest.raises(RuntimeError, match=r"linear_relu: (weight|bias|x): expected"):
        F.linear_relu(*given)


# ---- the module -----------------------------------------------------------------------------------------------------


def test_module_shares_its_state_dict_with_linear(backend: str) -> None:
    theirs, ours = torch.nn.Linear(7, 5).to(DEVICE), LinearReLU(7, 5, device=DEVICE)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = torch.randn(3, 7, device=DEVICE)
    torch.testing.assert_close(ours(x), theirs(x).relu())
    assert isinstance(ours, torch.nn.Linear)
    torch.testing.assert_close(LinearReLU(7, 5, bias=False, device=DEVICE)(x).shape, (3, 5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_module_copies_share_nothing(copied: Any) -> None:
    module = LinearReLU(7, 5)
    x = torch.randn(3, 7)
    y = module(x)
    other = copied(module)
    assert torch.equal(other(x), y)
    assert other.weight is not module.weight and other.weight.data_ptr() != module.weight.data_ptr()


def test_module_under_functional_call_and_vmap() -> None:
    modules = [LinearReLU(7, 5) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = torch.randn(4, 7)

    def call(p: Any, b: Any) -> Tensor:
        result: Tensor = torch.func.functional_call(modules[0], (p, b), (x,))
        return result

    torch.testing.assert_close(torch.func.vmap(call)(parameters, buffers), torch.stack([m(x) for m in modules]))


def test_training_step_equals_torch(backend: str) -> None:
    torch.manual_seed(1)
    theirs = torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).to(DEVICE)
    ours = torch.nn.Sequential(LinearReLU(20, 16, device=DEVICE), torch.nn.Identity(), torch.nn.Linear(16, 3, device=DEVICE))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(32, 20, device=DEVICE)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(theirs.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_inputs_are_left_alone(backend: str) -> None:
    given = tensors(20, 30, 40)
    with unchanged(*given):
        F.linear_relu(*given).sum().backward()
