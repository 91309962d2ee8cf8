"""What it costs to be an operator: host time of a call too small to compute anything, beside the aten operator.

The goal is at most 3 x aten without gradient, 2 x forward and backward. `auto` hands such small calls to aten, so the backend
is named here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dlaccel
from dlaccel.bench.case import families, implementation
from tests.benchmarks.conftest import host_clock

FAMILIES = families()


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    with dlaccel.use_backend("torch"):
        yield


@pytest.mark.parametrize("provider", ["eager", "dlaccel"])
@pytest.mark.parametrize("mode", ["fwd", "train"])
@pytest.mark.parametrize("op", list(FAMILIES))
def test_overhead(benchmark: Any, op: str, mode: str, provider: str) -> None:
    case = FAMILIES[op].SAMPLES[0]
    function = FAMILIES[op].eager if provider == "eager" else implementation(op)
    tensors = case.inputs(torch.float32)
    wanted = [tensors[i] for i in case.differentiable(tensors)]
    benchmark.group = f"{op} {mode}, call overhead"
    benchmark._timer = host_clock()

    def forward() -> None:
        case.call(function, *tensors)

    def train() -> None:
        torch.autograd.grad(case.call(function, *tensors).sum(), wanted, allow_unused=True)

    with torch.set_grad_enabled(mode == "train"):
        benchmark.pedantic(train if mode == "train" else forward, rounds=15, iterations=1500, warmup_rounds=1)
