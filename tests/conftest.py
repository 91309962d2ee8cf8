"""How the tests run, with or without a GPU: `python -m pytest tests -q`.

Without a GPU, kernels run in Triton's interpreter, checked (interp_checks.py). With one, they are compiled and run on it.
DLACCEL_EMULATE=sm_90 compiles them for that GPU and runs their PTX on the CPU (ptx/).

    --require-gpu     a test that needs a GPU fails without one, instead of being skipped
    --slow            also the tests marked slow (as does a -m expression that names slow)
    --hypothesis-profile=deep     20 times the examples, other ones each time

    @pytest.mark.gpu                              needs a GPU
    @pytest.mark.slow                             left out of a normal run
    @pytest.mark.unchecked(*rules, reason=...)    without these rules of the checked interpreter; no rule: without all of it
    backend                                       fixture: the test runs once on each backend that can run here, and forces it
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
import types
import unittest
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is decorated: before any import of one
# An old cache may answer with the gradients of an older version of an op.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="dlaccel-tests-")
atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)
torch.set_num_threads(1)
# cuDNN's default is TF32, which no tolerance here allows for. The older switch: torch.export reads it, and with the newer ones
# set to "ieee" that is an error.
torch.backends.cudnn.allow_tf32 = False

if importlib.util.find_spec("expecttest") is None:  # torch's own test helpers import it and, as used here, do not need it
    shim = types.ModuleType("expecttest")
    shim.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    shim.assert_expected_inline = None  # type: ignore[attr-defined]
    sys.modules["expecttest"] = shim

torch.backends.disable_global_flags = lambda: None  # which the same helpers call when imported; tests may set torch.backends.*

from tests.kit import DEVICE, EMULATED, INTERPRET  # noqa: E402

try:
    import hypothesis
except ImportError:  # strategies.py skips what needs it
    pass
else:
    checks = hypothesis.HealthCheck
    common = hypothesis.settings(
        deadline=None,  # an interpreted kernel takes any time
        database=None,
        print_blob=True,
        suppress_health_check=[checks.too_slow, checks.function_scoped_fixture],
    )
    # Compiled, each example may be a kernel to compile.
    hypothesis.settings.register_profile(
        "ci", common, derandomize=True, max_examples=100 if INTERPRET else 20 if EMULATED else 5
    )
    hypothesis.settings.register_profile("deep", common, max_examples=2000)
    hypothesis.settings.load_profile("ci")

NO_GPU = "no CUDA or ROCm device: torch.cuda.is_available() is False"


def why_no_triton() -> str | None:
    """Why Triton kernels cannot run here."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not INTERPRET and not EMULATED:
        return None if torch.cuda.is_available() else "no GPU, and TRITON_INTERPRET is not 1"
    import numpy
    import triton

    if triton.__version__.startswith("3.6.") and numpy.lib.NumpyVersion(numpy.__version__) >= "2.4.0":
        return "the interpreter of Triton 3.6 needs NumPy < 2.4"
    return None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="a test that needs a GPU fails without one")
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_report_header(config: pytest.Config) -> str:
    how = why_no_triton() or ("interpreted" if INTERPRET else f"compiled for {EMULATED}, emulated" if EMULATED else "compiled")
    return f"dlaccel: torch {torch.__version__}, tensors on {DEVICE}; Triton kernels: {how}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Last: a capture that fails may leave the allocator and the generator of its process behind.
    items.sort(key=lambda item: item.name.startswith("test_cuda_graph"))
    if config.getoption("--slow") or "slow" in config.getoption("-m"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        (pytest.fail if item.config.getoption("--require-gpu") else pytest.skip)(NO_GPU)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def checked_interpreter(request: pytest.FixtureRequest) -> Iterator[None]:
    if EMULATED and not why_no_triton():
        from tests.ptx import emulated

        with emulated(EMULATED):
            yield
        return
    if not INTERPRET or why_no_triton():
        yield
        return
    from tests.interp_checks import checked

    mark = request.node.get_closest_marker("unchecked")
    if mark is None:
        with checked():
            yield
        return
    assert mark.kwargs.get("reason"), "the mark unchecked needs reason=..."
    if mark.args:
        with checked(**dict.fromkeys(mark.args, False)):
            yield
    else:
        yield


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of the backend that public functions are forced to use."""
    if request.param == "triton" and (reason := why_no_triton()):
        pytest.skip(reason)
    import dlaccel

    with dlaccel.use_backend(request.param):
        yield request.param
