"""The tests' own tools: each must fail where it should."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dlaccel.bench.accuracy import close_enough, relative_error
from tests import kit
from tests.kit import COTANGENTS, DEVICE, LAYOUTS, check, constants, poisoned, unchanged
from tests.strategies import DTYPES, given, sizes, st, tensors

NAN, INF = float("nan"), float("inf")


def test_constants_of_a_launcher_hold_for_a_while_only():
    """Also for a call that was planned before."""
    kernels, launch = (pytest.importorskip(f"dlaccel.kernels.{name}") for name in ("cross_entropy", "launch"))
    x, target = torch.randn(9, 7, device="meta"), torch.zeros(9, dtype=torch.long, device="meta")

    def whole():
        with launch.recording() as recorded:
            kernels.cross_entropy(x, target, None, -100, 0, 0.0, False, 0)
        return recorded[0].options["WHOLE"]

    assert whole()
    with constants(kernels, WHOLE=4):
        assert not whole()
    assert whole()


# ---- the acceptance rule --------------------------------------------------------------------------------------------


@pytest.fixture
def exact() -> torch.Tensor:
    return torch.randn(64, 48, dtype=torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_accepted(exact, dtype):
    assert close_enough(exact.to(dtype), exact.to(dtype), exact, dtype) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("eager", [True, False])
def test_one_wrong_element(exact, dtype, eager):
    got = exact.to(dtype, copy=True)
    got[3, 4] += (4096 if dtype == torch.float64 else 64) * torch.finfo(dtype).eps
    assert "at (3, 4)" in close_enough(got, exact.to(dtype) if eager else None, exact)


def test_error_everywhere_is_found_by_the_norm(exact):
    eager = exact.float()
    eager[0, 0] += 1e-2  # eager is bad in one place: the maximum alone would allow as much in all
    assert "error norm" in close_enough(exact.float() + 1e-3, eager, exact)


def test_metadata(exact):
    t = exact.float()
    assert "shape (48,)" in close_enough(t[0], t, exact)
    assert "dtype torch.float64" in close_enough(exact, t, exact)
    assert "is None" in close_enough(None, t, exact)
    assert "is a tensor" in close_enough(t, None, None)
    assert close_enough(None, None, None) is None


@pytest.mark.parametrize("value, other", [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (INF, -INF), (NAN, INF)])
def test_special_values_must_be_the_same(value, other):
    got, eager = torch.tensor([1.0, value]), torch.tensor([1.0, other])
    assert close_enough(got, eager, eager.double()) is not None
    assert close_enough(eager, eager, eager.double()) is None


def test_reference_that_is_not_finite_cannot_judge():
    t = torch.ones(2)
    assert "cannot be judged" in close_enough(t, t, torch.tensor([1.0, NAN]).double())


def test_overflow_to_inf_as_eager_has_it():
    exact = torch.tensor([1.0, 1e6], dtype=torch.float64)
    assert close_enough(exact.half(), exact.half(), exact) is None
    assert close_enough(exact.half(), None, exact) is None


def test_integers_must_be_equal():
    t = torch.arange(3)
    assert close_enough(t, t, t) is None and "at (0,) 1, expected 0" in close_enough(t + 1, t, t)


def test_terms_allow_for_cancellation():
    exact, eager = torch.zeros(2, dtype=torch.float64), torch.zeros(2)
    got = torch.full((2,), 1e-6)
    assert close_enough(got, eager, exact) is not None
    assert close_enough(got, eager, exact, terms=10.0) is None


def test_empty_and_scalar():
    empty, scalar = torch.ones(0, 3), torch.ones(())
    assert close_enough(empty, empty, empty.double()) is None
    assert close_enough(scalar, scalar, scalar.double()) is None
    assert close_enough(scalar + 1, scalar, scalar.double()) is not None


def test_relative_error():
    exact = torch.tensor([4.0, 2.0, INF], dtype=torch.float64)
    assert relative_error(torch.tensor([4.0, 3.0, NAN]), exact) == 0.25
    assert relative_error(torch.ones(0), torch.ones(0).double()) == 0


# ---- check, unchanged, poison ---------------------------------------------------------------------------------------


def relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x)


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return F.relu(x)

    @staticmethod
    def backward(ctx, g):
        return g


def test_check_accepts_torch():
    check(relu, relu, [torch.randn(5, 7, device=DEVICE, requires_grad=True)])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda x: F.relu(x) * 1.001, "result error"),
        (WrongGradient.apply, "gradient 0 error"),
        (lambda x: F.relu(x.detach()).requires_grad_(), "gradient 0 is None"),
        (lambda x: F.relu(x).double(), "result has dtype"),
    ],
)
def test_check_refuses(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check(wrong, relu, [torch.randn(5, 7, device=DEVICE, requires_grad=True)])


def test_check_sees_an_overwritten_input():
    with pytest.raises(AssertionError, match="input 0 was changed"):
        check(lambda x: F.relu_(x), relu, [torch.randn(5, device=DEVICE)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_check_compares_state(dtype):
    def call(momentum):
        return lambda x, mean, var: F.batch_norm(x, mean, var, training=True, momentum=momentum)

    def given():
        x = torch.randn(5, 3, device=DEVICE, dtype=dtype, requires_grad=True)
        return [x, torch.zeros(3, device=DEVICE, dtype=dtype), torch.ones(3, device=DEVICE, dtype=dtype)]

    check(call(0.1), call(0.1), given(), state=(1, 2))
    with pytest.raises(AssertionError, match="updated input 1 error"):
        check(call(0.11), call(0.1), given(), state=(1, 2))
    with pytest.raises(AssertionError, match="input 1 was changed"):
        check(call(0.1), call(0.1), given())


def test_unchanged_takes_nan():
    t = torch.tensor([NAN, 1.0])
    with unchanged(t):
        pass
    with pytest.raises(AssertionError, match="input 0"), unchanged(t):
        t[0] = 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_poison(dtype):
    with poisoned():
        made = [torch.empty(3, dtype=dtype), torch.empty_strided((2, 2), (1, 2), dtype=dtype), torch.ones(2).new_empty(2)]
    assert all(t.isnan().all() for t in made)
    assert not torch.are_deterministic_algorithms_enabled()


# ---- layouts --------------------------------------------------------------------------------------------------------

SHAPES = [(), (5,), (5, 7), (2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 4, 5), (0, 3), (3, 0), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_shape_and_values(layout, shape):
    t = torch.randn(shape, requires_grad=True)
    laid = LAYOUTS[layout](t)
    assert laid.shape == t.shape and laid.requires_grad and laid.is_leaf
    if "expanded" not in layout:
        assert torch.equal(laid, t)


def test_layouts_are_what_they_say():
    t = torch.randn(2, 3, 4, 5)
    assert LAYOUTS["channels_last"](t).is_contiguous(memory_format=torch.channels_last)
    assert LAYOUTS["channels_last slice"](t).stride() == (120, 1, 30, 6)
    assert LAYOUTS["transposed"](t).stride() == (60, 20, 1, 4)
    assert LAYOUTS["row slice"](t).stride() == (120, 20, 5, 1) and LAYOUTS["row slice"](t).storage_offset() == 60
    assert LAYOUTS["column slice"](t).stride() == (180, 60, 15, 3) and LAYOUTS["column slice"](t).storage_offset() == 1
    assert LAYOUTS["storage offset"](t).storage_offset() == 3
    assert LAYOUTS["expanded row"](t).stride(0) == 0
    assert LAYOUTS["expanded scalar"](t).stride() == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", COTANGENTS)
def test_cotangents(name, shape):
    y = torch.randn(shape).bfloat16()
    g = COTANGENTS[name](y)
    assert g.shape == y.shape and g.dtype == y.dtype
    assert name != "stride 0" or set(g.stride()) <= {0}


# ---- Hypothesis, pytest ---------------------------------------------------------------------------------------------


@given(st.data())
def test_strategies(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    shape = (data.draw(sizes(smallest=1)), data.draw(sizes(8)))
    t = data.draw(tensors(shape, dtype, special=True))
    assert t.shape == shape and t.dtype == dtype and 1 <= shape[0] <= 65 and shape[1] <= 17


def run_pytest(tmp_path, source: str, *options: str) -> str:
    """What pytest says about a file of its own, under this conftest."""
    (tmp_path / "test_inner.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "tests.conftest", "-p", "no:cacheprovider", *options, str(tmp_path)]
    root = str(kit.ROOT)
    return subprocess.run(command, capture_output=True, text=True, cwd=root, check=False).stdout


def test_marks(tmp_path):
    source = "import pytest\n@pytest.mark.slow\ndef test_a(): pass\n@pytest.mark.gpu\ndef test_b(): pass\n"
    out = run_pytest(tmp_path, source)
    assert "1 deselected" in out and (DEVICE == "cuda" or "no CUDA or ROCm device" in out)
    out = run_pytest(tmp_path, source, "--slow", "--require-gpu")
    assert "deselected" not in out and (DEVICE == "cuda" or "1 error" in out)


def test_without_hypothesis(tmp_path):
    source = (
        "import sys\nfor m in [m for m in sys.modules if m.startswith('hypothesis')]: sys.modules[m] = None\n"
        "sys.modules['hypothesis'] = None\nsys.modules.pop('tests.strategies', None)\n"
        "from tests.strategies import given, settings, sizes, st, tensors\n"
        "@st.composite\ndef case(draw): return draw(sizes())\n"
        "@settings(max_examples=3)\n@given(case(), n=tensors((2,), None))\ndef test_a(c, n): pass\n"
        "def test_b(): pass\n"
    )
    out = run_pytest(tmp_path, source, "-p", "no:hypothesispytest")
    assert "1 passed, 1 skipped" in out and "Hypothesis is not installed" in out, out
