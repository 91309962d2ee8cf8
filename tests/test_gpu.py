"""What only a GPU shows, for every op's samples: host syncs, CUDA graphs, streams, devices, races. Not yet run on a GPU.

Values and gradients on a GPU are the other files' business: there they run with DEVICE = "cuda".
Out-of-bounds accesses inside an allocation need `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck
--target-processes all python -m pytest tests/test_gpu.py -k direct -x` after a run without it, which compiles the kernels.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dlaccel
from dlaccel.bench.case import Case, families, implementation
from tests.gpu_tools import busy_stream, captured, guarded, intact, no_host_sync
from tests.kit import with_gradients

pytestmark = pytest.mark.gpu

SAMPLES: list[Case] = [sample for family in families().values() for sample in family.SAMPLES]
over_samples = pytest.mark.parametrize("sample", SAMPLES, ids=str)


@pytest.fixture(autouse=True)
def triton_backend() -> Any:
    with dlaccel.use_backend("triton"):
        yield


def inputs(sample: Case, seed: int = 0, device: str = "cuda") -> list[Tensor]:
    return list(sample.inputs(torch.float32, device, seed))


def run(sample: Case, tensors: list[Tensor]) -> list[Tensor | None]:
    """Result and gradients."""
    return with_gradients(lambda *t: sample.call(implementation(sample.op), *t), tensors)


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]


def assert_equal(got: list[Any], want: list[Any]) -> None:
    """To the bit: the kernels are deterministic."""
    for p, q in zip(got, want, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)


@over_samples
def test_direct(sample: Case) -> None:
    """Nothing is written outside the inputs' and the state's allocations."""
    tensors = [guarded(t).requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs(sample)]
    run(sample, tensors)
    assert all(intact(t) for t in tensors if t.is_floating_point())


@over_samples
def test_no_host_sync(sample: Case) -> None:
    tensors = inputs(sample)
    run(sample, tensors)
    with no_host_sync():
        run(sample, tensors)


@over_samples
def test_cuda_graph(sample: Case) -> None:
    """Replays with new inputs give what direct calls give; state advances once per replay."""
    static = inputs(sample)
    graph, results = captured(lambda: run(sample, static))
    for seed in (1, 2, 3):
        fresh = inputs(sample, seed)
        with torch.no_grad():
            for old, new in zip(static, fresh, strict=True):
                old.copy_(new)
        graph.replay()
        assert_equal(results, run(sample, fresh))
        assert_equal([static[i] for i in sample.state], [fresh[i] for i in sample.state])


@over_samples
def test_another_stream(sample: Case) -> None:
    tensors = inputs(sample)
    want = run(sample, clones(tensors))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        got = run(sample, tensors)
    torch.cuda.current_stream().wait_stream(side)
    assert_equal(got, want)


@over_samples
def test_two_streams_at_once(sample: Case) -> None:
    tensors = inputs(sample)
    want = run(sample, clones(tensors))
    streams, results = [torch.cuda.Stream() for _ in range(2)], []
    torch.cuda.synchronize()
    for stream in streams * 4:
        with torch.cuda.stream(stream):
            results.append(run(sample, clones(tensors)))
    torch.cuda.synchronize()
    for got in results:
        assert_equal(got, want)


@over_samples
def test_another_device(sample: Case) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    want = run(sample, inputs(sample, device="cuda:0"))
    there = [t.detach().to("cuda:1").requires_grad_(t.requires_grad) for t in inputs(sample, device="cuda:0")]
    with torch.cuda.device(0):
        got = run(sample, there)
    assert all(t is None or t.device.index == 1 for t in got)
    assert_equal([None if t is None else t.cpu() for t in got], [None if t is None else t.cpu() for t in want])


@over_samples
def test_the_same_every_time(sample: Case) -> None:
    """A race between programs shows as a result that differs under another load."""
    tensors = inputs(sample)
    want = run(sample, clones(tensors))
    with busy_stream():
        for _ in range(100):
            assert_equal(run(sample, clones(tensors)), want)


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
