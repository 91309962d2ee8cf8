"""What only a GPU shows, for every op's samples: host syncs, CUDA graphs, streams, devices, races. Not yet run on a GPU.

Values and gradients on a GPU are the other files' business: there they run with DEVICE = "cuda". Here are those of sizes and
kernels that only a GPU takes ("smoke": what to run first).
Out-of-bounds accesses inside an allocation need `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck
--target-processes all python -m pytest tests/test_gpu.py -k direct -x` after a run without it, which compiles the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dlaccel
from dlaccel.bench import gate
from dlaccel.bench.case import Case, families, implementation
from dlaccel.bench.compile import find_case
from dlaccel.bench.provider import switched
from tests.gpu_tools import busy_stream, captured, guarded, intact, no_host_sync
from tests.kit import COTANGENTS, check, with_gradients

if torch.cuda.is_available():
    from dlaccel.kernels import separable_conv
    from dlaccel.kernels.launch import COUNTS

pytestmark = pytest.mark.gpu

SAMPLES: list[Case] = [sample for family in families().values() for sample in family.SAMPLES]
over_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@pytest.fixture(autouse=True)
def triton_backend() -> Any:
    with dlaccel.use_backend("triton"):
        yield


def inputs(sample: Case, seed: int = 0, device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return list(sample.inputs(dtype, device, seed))


def cotangent(sample: Case, tensors: list[Tensor]) -> Tensor:
    """A gradient of the result, drawn once: it comes from the CPU, and its copy synchronises."""
    with torch.no_grad():
        return COTANGENTS["dense"](sample.call(implementation(sample.op), *clones(tensors)))


def run(sample: Case, tensors: list[Tensor], g: Tensor) -> list[Tensor | None]:
    """Result and gradients."""
    return with_gradients(lambda *t: sample.call(implementation(sample.op), *t), tensors, g)


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def assert_equal(got: list[Any], want: list[Any]) -> None:
    """To the bit: the kernels are deterministic."""
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


# ---- values ---------------------------------------------------------------------------------------------------------

# Two sizes of a GPU for each op, few enough that several processes find room; together they start every kernel that public
# functions start, but those that need more (the tests after this one).
SMOKE = {
    "linear_relu": ("8192x1024x8192", "65536x512x512"),
    "batch_norm": ("256x256x14x14 relu", "256x128x28x28 relu channels_last"),
    "cross_entropy": ("65536x1000", "128x128256", "probabilities, images, none"),
    "depthwise_conv2d": ("128x240x28 K5", "128x240x28 K5 channels_last"),
    "depthwise_separable_block": ("128x512x14->512", "128x256x28->256 eval channels_last"),
    "separable_conv2d": ("8x240x28->40 K5", "multiplier 2"),
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("op", "name"), [(op, name) for op, names in SMOKE.items() for name in names])
def test_smoke(op: str, name: str, dtype: str) -> None:
    """What a GPU runs first: forward alone, and with its gradients, against float64."""
    case, family = find_case(op, name), families()[op]
    values = gate.values_of(case, getattr(torch, dtype), "cuda", 0, eager=family.eager, reference=family.reference)
    for mode in ("fwd", "train"):
        step = gate.Step(case, implementation(op), mode, tuple(map(gate.copy, values.tensors)), gate.copy(values.dy))
        assert gate.check(step, values) is None, mode


@pytest.mark.parametrize("sizes", [(1024, 512, 1024), (4096, 2048, 512)], ids=str)
def test_smoke_of_descriptors(sizes: tuple[int, int, int]) -> None:
    """linear_relu's TMA kernel; from as many tiles as an H100 has multiprocessors on, it stores each in two halves."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    m, n, k = sizes
    x, weight, bias = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in ((m, k), (n, k), (n,)))
    COUNTS.clear()
    check(implementation("linear_relu"), families()["linear_relu"].eager, [t.requires_grad_() for t in (x, weight, bias)])
    assert COUNTS["linear_relu_tma_kernel"] == 1 and COUNTS["linear_relu_kernel"] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_smoke_of_one_kernel_for_both_convolutions(dtype: torch.dtype) -> None:
    """In float32 with TF32, without which it is not chosen."""
    x, dw, pw = torch.randn(8, 64, 56, 56), torch.randn(64, 1, 3, 3), torch.randn(128, 64, 1, 1)
    tensors = [t.to("cuda", dtype, memory_format=torch.channels_last) for t in (x, dw, pw)]
    blocks = separable_conv._blocks(dtype, 128)
    family = families()["separable_conv2d"]

    def ours(*t: Tensor) -> Tensor:
        return implementation("separable_conv2d")(*t, padding=1)

    def eager(*t: Tensor) -> Tensor:
        return family.eager(*t, padding=1)

    COUNTS.clear()
    with separable_conv.forward_config.using(blocks), switched(torch.backends.cudnn.conv, fp32_precision="tf32"):
        check(ours, eager, tensors)
    assert COUNTS["separable_forward_kernel"] == 1


@over_samples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_direct(sample: Case, dtype: torch.dtype) -> None:
    """Nothing is written outside the inputs' and the state's allocations."""
    drawn = inputs(sample, dtype=dtype)
    tensors = [guarded(t).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in drawn]
    run(sample, tensors, cotangent(sample, drawn))
    assert all(intact(t) for t in tensors if t.is_floating_point())


# ---- the host, streams, devices -------------------------------------------------------------------------------------


@over_samples
def test_no_host_sync(sample: Case) -> None:
    tensors = inputs(sample)
    g = cotangent(sample, tensors)
    run(sample, tensors, g)
    with no_host_sync():
        run(sample, tensors, g)


@over_samples
def test_another_stream(sample: Case) -> None:
    tensors = inputs(sample)
    g = cotangent(sample, tensors)
    want = run(sample, clones(tensors), g)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run(sample, tensors, g)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(got, want)


@over_samples
def test_two_streams_at_once(sample: Case) -> None:
    tensors = inputs(sample)
    g = cotangent(sample, tensors)
    want = run(sample, clones(tensors), g)
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            results.append(run(sample, clones(tensors), g))
    torch.cuda.synchronize()
    for got in results:
        assert_equal(got, want)


@over_samples
def test_another_device(sample: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    tensors = inputs(sample, device="cuda:0")
    g = cotangent(sample, tensors)
    there = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in tensors]
    want = run(sample, tensors, g)
    with torch.cuda.device(0):
        got = run(sample, there, g.to("cuda:1"))
    assert all(t is None or t.device.index == 1 for t in got)
    assert_equal([None if t is None else t.cpu() for t in got], [None if t is None else t.cpu() for t in want])


@over_samples
def test_the_same_every_time(sample: Case) -> None:
    """A race between programs shows as a result that differs under another load."""
    tensors = inputs(sample)
    g = cotangent(sample, tensors)
    want = run(sample, clones(tensors), g)
    with busy_stream():
        for _ in range(100):
            assert_equal(run(sample, clones(tensors), g), want)


@over_samples
def test_cuda_graph(sample: Case) -> None:
    """Replays with new inputs give what direct calls give; state advances once per replay. conftest.py runs these last."""
    static = inputs(sample)
    g = cotangent(sample, static)
    graph, results = captured(lambda: run(sample, static, g))
    for seed in (1, 2, 3):
        fresh = inputs(sample, seed)
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        assert_equal(results, run(sample, fresh, g))
        assert_equal([static[i] for i in sample.state], [fresh[i] for i in sample.state])


def test_sizes_do_not_each_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty batch sizes share a few compiled kernels: Triton specialises on divisibility by 16 and on 1."""
    import triton

    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["repr"]))
    linear_relu = implementation("linear_relu")
    weight = torch.randn(96, 64, device="cuda", requires_grad=True)
    for m in range(101, 121):
        linear_relu(torch.randn(m, 64, device="cuda"), weight).sum().backward()
    assert len(compiled) <= 8, compiled
