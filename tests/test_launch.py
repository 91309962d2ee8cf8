"""kernels/launch.py on its own: the caches of compiled kernels and descriptors, against Triton's own choice. No GPU is needed:
a stub driver takes the launches, in a process that does not interpret."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import weakref
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from dlaccel.bench import compile, host_time
from dlaccel.bench.case import families, implementation


@triton.jit
def scale_kernel(x, y, maybe, factor, n, stride, FLAG: tl.constexpr, BLOCK: tl.constexpr, of_a_caller=None):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i * stride, mask=i < n, other=0.0) * factor
    if maybe is not None:
        value += tl.load(maybe)
    tl.store(y + i, -value if FLAG else value, mask=i < n)


@triton.jit
def constant_in_front_kernel(x, n: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, n, mask=i < n)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """run(f, *args): f in a process that compiles."""
    folder = str(tmp_path_factory.mktemp("triton"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=compile.start_worker, initargs=(folder,)) as pool:
        yield lambda f, *args: pool.submit(f, *args).result()


def started(stub: host_time.StubDriver, *args: Any, prepared: int = 0, **options: Any) -> Any:
    """What a launch of scale_kernel started, with so many arguments prepared: Triton's description of the compiled source."""
    from dlaccel.kernels.launch import Prepared

    stub.noting, stub.started = True, []
    last = len(args) - prepared
    Prepared(scale_kernel, (1,), *args[last:], **options)(*args[:last])
    ((src, _, passed),) = stub.started
    assert list(passed[: len(args)]) == list(args)
    return src.signature, src.attrs, repr(src.constants)  # 1 and True are not one constant


def variants() -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of scale_kernel that differ from the first in one thing each."""
    buffer, half = torch.zeros(64), torch.zeros(64, dtype=torch.float16)
    x, y = buffer[:16], torch.zeros(16)
    base: dict[str, Any] = {"x": x, "y": y, "maybe": None, "factor": 2.0, "n": 16, "stride": 3}
    options = {"FLAG": True, "BLOCK": 16, "num_warps": 1}
    changes: list[dict[str, Any]] = [
        {}, {"x": buffer[1:17]}, {"x": buffer[4:20]}, {"x": half[:16]}, {"y": torch.zeros(17)[1:]}, {"n": 1}, {"n": 13},
        {"n": 32}, {"n": 2**31}, {"n": 2**31 + 1}, {"n": 2**63}, {"n": -16}, {"n": 0}, {"stride": 1}, {"stride": 16},
        {"stride": True}, {"factor": 3}, {"factor": 1}, {"factor": 1.0}, {"maybe": y}, {"maybe": buffer[1:]},
    ]  # fmt: skip
    calls = [(tuple((base | change).values()), options) for change in changes]
    for change in ({"FLAG": False}, {"FLAG": 1}, {"BLOCK": 32}, {"num_warps": 2}):
        calls.append((tuple(base.values()), options | change))
    return calls


def _every_variant_gets_tritons_choice() -> int:
    """In every order of two: what is started for b after a is what Triton itself starts for b."""
    from dlaccel.kernels import launch

    stub = host_time.install()
    calls = variants()

    def own(args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        launch._compiled.clear()
        return started(stub, *args, **options)

    expected = [own(*call) for call in calls]
    for a, b in itertools.permutations(range(len(calls)), 2):
        launch._compiled.clear()
        for i, prepared in itertools.product((a, b, a, b), (0, 3)):
            args, options = calls[i]
            got = started(stub, *args, prepared=prepared, **options)
            assert got == expected[i], f"variant {i} after {a}, {b}, {prepared} prepared: {args} {options}"
    kinds = {str(e) for e in expected}
    return len(kinds)


def test_every_launch_starts_what_triton_would_start(compiled: Any) -> None:
    assert compiled(_every_variant_gets_tritons_choice) >= 15  # so many of the variants are different code


def _second_launch_is_direct() -> tuple[int, int]:
    from dlaccel.kernels import launch

    host_time.install()
    (args, options), (unaligned, _) = variants()[:2]
    launch._compiled.clear()
    calls = 0
    own = type(scale_kernel).run

    def counting(self: Any, *a: Any, **k: Any) -> Any:
        nonlocal calls
        calls += 1
        return own(self, *a, **k)

    type(scale_kernel).run = counting
    try:
        for _ in range(5):
            launch.launch(scale_kernel, (1,), *args, **options)
        after_five = calls
        launch.launch(scale_kernel, (1,), *unaligned, **options)
    finally:
        type(scale_kernel).run = own
    return after_five, calls


def test_only_the_first_launch_of_a_kind_goes_through_triton(compiled: Any) -> None:
    if triton.__version__ < "3.10":
        assert compiled(_second_launch_is_direct) == (1, 2)


@triton.jit
def defaulted_kernel(x, BLOCK: tl.constexpr, n=4):
    i = tl.arange(0, BLOCK)
    tl.store(x + i, 1.0, mask=i < n)


def _an_argument_left_out() -> list[int]:
    from dlaccel.kernels import launch

    stub = host_time.install()
    x = torch.zeros(64)
    stub.noting, stub.started = True, []
    for _ in range(2):
        launch.launch(defaulted_kernel, (1,), x, BLOCK=16)
    return [len(passed) for _, _, passed in stub.started]


def test_an_argument_with_a_default_may_be_left_out(compiled: Any) -> None:
    assert compiled(_an_argument_left_out) == [3, 3]


def _constants_among_the_arguments() -> list[Any]:
    from dlaccel.kernels import launch

    stub = host_time.install()
    x = torch.zeros(64)
    stub.noting, stub.started = True, []
    for n in (3, 5, 3):
        launch.launch(constant_in_front_kernel, (1,), x, n, BLOCK=16)
    return [src.constants[(1,)] for src, _, _ in stub.started]


def test_a_constant_passed_by_position_is_never_mistaken(compiled: Any) -> None:
    assert compiled(_constants_among_the_arguments) == [3, 5, 3]


def _hooks() -> list[Any]:
    from dlaccel.kernels import launch

    stub, hooks = host_time.install(), triton.knobs.runtime.launch_enter_hook
    args, options = variants()[0]
    stub.noting, stub.started = True, []
    launch._compiled.clear()
    launch.launch(scale_kernel, (1,), *args, **options)
    launch.launch(scale_kernel, (1,), *args, **options)
    hooks.add(print)
    launch.launch(scale_kernel, (1,), *args, **options)
    hooks.remove(print)
    return [hook is hooks for _, hook, _ in stub.started]


def test_a_profilers_hooks_are_called(compiled: Any) -> None:
    assert compiled(_hooks) == [True, False, True]  # Triton's own way, direct, with the hook


def _descriptors() -> None:
    from dlaccel.kernels import launch

    t = torch.zeros(32, 64)
    first = launch.descriptor(t, [16, 16])
    assert launch.descriptor(t, [16, 16]) is first
    assert launch.descriptor(t, [16, 32]) is not first
    assert launch.descriptor(t[:16], [16, 16]).shape == [16, 64]
    assert launch.descriptor(t.view(64, 32), [16, 16]).strides == [32, 1]
    assert launch.descriptor(t.view(torch.int32), [16, 16]).base.dtype == torch.int32
    with pytest.raises(AssertionError):  # Triton's own check: rows of 16 bytes
        launch.descriptor(torch.zeros(32, 63), [16, 16])
    dies = weakref.ref(t)
    del t
    gc.collect()
    assert dies() is None
    for i in range(launch._MOST_DESCRIPTORS + 10):
        launch.descriptor(torch.zeros(4).as_strided((i + 1, 4), (0, 1)), [16, 4])
    assert len(launch._descriptors) <= launch._MOST_DESCRIPTORS


def test_descriptors_are_cached_and_keep_nothing_alive(compiled: Any) -> None:
    compiled(_descriptors)


# --- what launchers keep ---


def calls_of(case: Any, dtype: torch.dtype, tensors: tuple[torch.Tensor, ...]) -> list[Any]:
    """The launchers that a forward and backward comes down to, with their arguments."""

    def forward_backward() -> None:
        y = case.call(implementation(case.op), *tensors)
        if y.requires_grad:
            torch.autograd.grad(y, [t for t in tensors if t.requires_grad], torch.ones_like(y), allow_unused=True)

    try:
        return compile.operator_calls(forward_backward)
    except compile.NoKernel:
        return []


def described(launched: Any) -> Any:
    args = [(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor) else (type(a), a) for a in launched.args]
    return launched.name, launched.grid, args, launched.options


@pytest.mark.parametrize("op", sorted(families()))
def test_what_a_launcher_keeps_is_what_it_would_prepare(op: str) -> None:
    """All samples in turn: nothing that a launch depends on is missing from the key of what is kept."""
    from dlaccel.kernels import config, launch

    with launch.recording() as recorded, config.assume(config.TARGETS["sm_90"]):
        calls = []
        for case, dtype in itertools.product(families()[op].SAMPLES, (torch.float32, torch.float16)):
            calls += calls_of(case, dtype, compile.meta_inputs(case, dtype))

        def launches(launcher: Any, args: Any) -> list[Any]:
            recorded.clear()
            with torch.no_grad():
                launcher(*args)
            return [described(one) for one in recorded]

        prepared = []
        for call in calls:
            config._forget_plans()
            prepared.append(launches(*call))
        config._forget_plans()
        for _ in range(2):
            assert [launches(*call) for call in calls] == prepared
    assert len(calls) >= 6 and any(prepared)


def _alive_after_a_call(op: str) -> tuple[int, int]:
    """How many tensors were given to launchers, and how many outlive that."""
    from dlaccel.kernels import config

    stub = host_time.install()
    stub.noting, stub.started = False, []
    case = families()[op].SAMPLES[0]
    with config.assume(config.TARGETS["sm_90"]), torch.no_grad():
        tensors = case.make(torch.Generator().manual_seed(0), torch.bfloat16)
        calls = calls_of(case, torch.bfloat16, tensors)
        given = [weakref.ref(t) for _, args in calls for t in args if isinstance(t, torch.Tensor)]
        del tensors, calls
        gc.collect()
        return len(given), sum(t() is not None for t in given)


@pytest.mark.parametrize("op", sorted(families()))
def test_launchers_keep_no_tensor_alive(op: str, compiled: Any) -> None:
    given, alive = compiled(_alive_after_a_call, op)
    assert given > 0 and alive == 0


@pytest.mark.parametrize("grid, fits", [((2**31 - 1,), True), ((2**31,), False), ((1, 65536), False), ((65536, 32768), False)])
def test_a_grid_that_would_start_nothing_is_refused(grid: tuple[int, ...], fits: bool) -> None:
    """Triton's launcher multiplies the axes in 32 bits, and starts nothing where the product is not positive."""
    from dlaccel.kernels.launch import Prepared

    if fits:
        Prepared(scale_kernel, grid)
    else:
        with pytest.raises(RuntimeError, match="scale_kernel: a grid of"):
            Prepared(scale_kernel, grid)
