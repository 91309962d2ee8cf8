"""Host time of a call without a GPU: the launchers run on CPU tensors against a driver that starts nothing.

    python -m dlaccel.bench.host_time

Prints, per op, the microseconds a CPU spends on the forward launcher with the caches of kernels/launch.py, the same through
Triton's `kernel[grid](...)`, and eager's own call on 8 x 8 CPU tensors as a yardstick (what aten costs on a GPU's host needs
a GPU to measure). Encoding TMA descriptors and the driver's launch itself are not in it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch

from dlaccel.bench.case import Case, families, implementation
from dlaccel.bench.compile import NamesATarget, NoKernel, operator_calls

FRONT = 9  # what Triton hands a launcher before the kernel's arguments: grid, stream, function, metadata (2), hooks (2)


class StubDriver(NamesATarget):
    """A driver for Triton that loads and launches nothing."""

    def __init__(self, target: Any) -> None:
        super().__init__(target)
        self.utils = self
        self.started: list[tuple[Any, Any, tuple[Any, ...]]] = []  # while `noting`: what was compiled, enter hook, arguments
        self.noting = False

    def get_current_device(self) -> None:
        return None  # the index of CPU tensors

    def get_device_properties(self, device: Any) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30}

    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        return 0, 0, 0, 0, 1 << 20  # module, function, registers, spills, most threads

    def unload_module(self, module: Any) -> None:
        pass

    def launcher_cls(self, src: Any, metadata: Any) -> Callable[..., None]:
        def launch(*args: Any) -> None:
            if self.noting:
                self.started.append((src, args[FRONT - 2], args[FRONT:]))

        return launch


@functools.cache
def install(target: str = "sm_90") -> StubDriver:
    """Let this process's launches go to one StubDriver. For a process of its own: it is not undone."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from dlaccel.kernels import config, launch

    device = config.TARGETS[target]
    stub = StubDriver(GPUTarget(device.backend, device.arch, device.warp))
    driver.set_active(stub)
    launch.current_device = lambda: None  # type: ignore[assignment, return-value]
    return stub


def microseconds(call: Callable[[], object], calls: int = 300, repeats: int = 9) -> float:
    """The least of `repeats` means over `calls` calls, in this thread's CPU time."""
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time_ns()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time_ns() - start) / calls / 1000)
    return best


def measure(case: Case, eager: Callable[..., Any], dtype: torch.dtype, target: str) -> dict[str, Any]:
    """One row: what the host spends on `case`'s forward."""
    from dlaccel.kernels import config, launch

    tensors = case.make(torch.Generator().manual_seed(0), dtype)

    with config.assume(config.TARGETS[target]), torch.inference_mode():
        calls = operator_calls(lambda: case.call(implementation(case.op), *tensors))

        def ours() -> None:
            for launcher, args in calls:
                launcher(*args)

        def uncached() -> None:
            launch._compiled.clear()
            launch._descriptors.clear()
            ours()

        row = {"launcher_us": microseconds(ours), "kernel_grid_us": microseconds(uncached)}
        row["eager_cpu_us"] = microseconds(lambda: case.call(eager, *tensors))
    return {"op": case.op, "case": case.name, "dtype": str(dtype).removeprefix("torch."), "target": target, **row}


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    install()
    for module in families().values():
        overhead = [case for case in module.CASES if "overhead" in case.tags]
        for case in overhead[:1]:
            for dtype in (torch.bfloat16, torch.float32):
                with contextlib.suppress(NoKernel):
                    print(json.dumps(measure(case, module.eager, dtype, "sm_90")), flush=True)


if __name__ == "__main__":
    main()
