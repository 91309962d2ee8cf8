"""The cases of bench/cases under pytest-benchmark. `python -m pytest tests/benchmarks`, or `make benchmark`.

    --benchmark-autosave, pytest-benchmark compare     keep runs as JSON and set them side by side
    --all-cases                                        every case, not only the quick ones

On the CPU one thread is timed by its own CPU time, so that another process does not show as slowness.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="every case, not only the quick ones")


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def host_clock() -> Callable[[], float]:
    return time.perf_counter if DEVICE == "cuda" else time.thread_time
