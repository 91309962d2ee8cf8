"""Every case x dtype x mode: dlaccel beside eager. Checked before it is timed, on fresh inputs in every round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dlaccel.bench import gate
from dlaccel.bench.case import Case, families, implementation
from tests.benchmarks.conftest import DEVICE, host_clock

FAMILIES = families()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    every = metafunc.config.getoption("--all-cases")
    cases = [
        (case, dtype, mode)
        for family in FAMILIES.values()
        for case in family.CASES
        if DEVICE in case.devices and (every or "quick" in case.tags)
        for dtype in case.dtypes
        for mode in case.modes
    ]
    metafunc.parametrize("case, dtype, mode", cases, ids=[f"{case} {dtype} {mode}" for case, dtype, mode in cases])
    metafunc.parametrize("provider", ["eager", "dlaccel"])


def test_case(benchmark: Any, case: Case, dtype: str, mode: str, provider: str) -> None:
    family = FAMILIES[case.op]
    function = family.eager if provider == "eager" else implementation(case.op)
    values = gate.values_of(case, getattr(torch, dtype), DEVICE, 0, eager=family.eager, reference=family.reference)
    step = gate.Step(case, function, mode, tuple(map(gate.copy, values.tensors)), gate.copy(values.dy))
    assert gate.check(step, values) is None

    def setup() -> None:
        step.load(values)
        step.prepare()

    benchmark.group = f"{case} {dtype} {mode}"
    benchmark.extra_info |= {"shape": dict(case.shape), "layout": case.layout, "provider": provider, "device": DEVICE}
    benchmark._timer = host_clock()
    with torch.set_grad_enabled(mode != "fwd"):
        benchmark.pedantic(timed(step), setup=setup, rounds=20, warmup_rounds=3)
    assert gate.compare(step.outputs(), values) is None, "what was timed is what was checked"


def timed(step: gate.Step) -> Callable[[], None]:
    if DEVICE == "cpu":
        return step.run

    def run() -> None:
        step.run()
        torch.cuda.synchronize()

    return run
