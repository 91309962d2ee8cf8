"""The choice of backend, what `explain` and the log say of it, and `python -m dlaccel.info`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dlaccel
import dlaccel.functional as F
from dlaccel import backend
from dlaccel.fallback import linear_relu as fallback
from dlaccel.ops._register import LAUNCHES, REGISTRY
from tests.kit import DEVICE, unchanged

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DLACCEL", "TRITON_INTERPRET"))}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True)


def inputs(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(600, 512, device=device), torch.ones(512, 512, device=device)


def test_use_backend_takes_effect_and_restores() -> None:
    assert backend.forced == "auto"
    with dlaccel.use_backend("torch"):
        assert backend.forced == "torch"
        with dlaccel.use_backend("auto"):
            assert backend.forced == "auto"
        assert backend.forced == "torch"
    assert backend.forced == "auto"
    dlaccel.use_backend("torch")
    assert backend.forced == "torch"
    dlaccel.use_backend("auto")


def test_an_exception_restores_the_backend() -> None:
    with pytest.raises(KeyError), dlaccel.use_backend("torch"):
        raise KeyError
    assert backend.forced == "auto"


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of auto, triton, torch, got 'cuda'"):
        dlaccel.use_backend("cuda")
    failed = python("import dlaccel", DLACCEL_BACKEND="cudnn")
    assert failed.returncode != 0 and "expected one of auto, triton, torch, got 'cudnn'" in failed.stderr


def test_the_environment_chooses() -> None:
    done = python("import dlaccel; print(dlaccel.backend.forced)", DLACCEL_BACKEND="torch")
    assert done.stdout.strip() == "torch"


def test_triton_without_gpu_and_interpreter_says_why() -> None:
    call = "dlaccel.functional.linear_relu(torch.ones(2, 3), torch.ones(4, 3))"
    failed = python(f"import torch, dlaccel; dlaccel.use_backend('triton'); {call}")
    assert failed.returncode != 0
    assert "backend 'triton' was chosen but the kernels do not run on cpu" in failed.stderr


@pytest.mark.parametrize("chosen", ["torch", "triton"])
def test_the_chosen_backend_is_the_one_that_runs(chosen: str) -> None:
    LAUNCHES.clear()
    with dlaccel.use_backend(chosen):
        F.linear_relu(torch.ones(4, 3, device=DEVICE), torch.ones(2, 3, device=DEVICE))
    assert dict(LAUNCHES) == {("linear_relu", chosen): 1}


def test_auto_takes_torch_on_the_cpu_and_logs_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "least_products", lambda: 1)
    backend._logged.clear()
    LAUNCHES.clear()
    with caplog.at_level(logging.INFO, "dlaccel"):
        for _ in range(3):
            F.linear_relu(*inputs())
    assert dict(LAUNCHES) == {("linear_relu", "torch"): 3}
    assert [r.getMessage() for r in caplog.records] == ["linear_relu: torch, because the tensors are on the CPU"]


def test_explain() -> None:
    found = dlaccel.explain(F.linear_relu, *inputs())
    assert (found.op, found.backend) == ("linear_relu", "torch")
    assert "matrix product" in found.kernel and "the tensors are on the CPU" in str(found)
    with dlaccel.use_backend("triton"):
        found = dlaccel.explain("linear_relu", *inputs(DEVICE))
    assert found.backend == "triton" and "linear_relu_kernel, BLOCK_M=" in found.kernel
    assert "static choice" in found.kernel


def test_explain_computes_nothing_and_checks_the_arguments() -> None:
    LAUNCHES.clear()
    dlaccel.explain("linear_relu", *inputs())
    assert not LAUNCHES
    with pytest.raises(ValueError, match=r"op: expected one of .*linear_relu.*, got 'relu'"):
        dlaccel.explain("relu", torch.ones(2))
    with pytest.raises(RuntimeError, match="weight: expected"):
        dlaccel.explain("linear_relu", torch.ones(2, 3), torch.ones(4, 3).double())


def test_explain_decides_without_values_and_leaves_state_alone() -> None:
    x, target = torch.randn(4, 3).half().requires_grad_(), torch.tensor([0, -100, 2, 1])  # float16 losses are looked at
    assert dlaccel.explain("cross_entropy", x, target).kernel == "aten"
    state = [torch.zeros(3), torch.ones(3), torch.tensor(0)]
    with unchanged(*state):
        found = dlaccel.explain("batch_norm", x.float(), *state[:2], training=True, num_batches_tracked=state[2])
    assert found.kernel == "aten"


def test_calls_of_aten_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    backend._logged.clear()
    with caplog.at_level(logging.INFO, "dlaccel"):
        F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert not caplog.records


def test_info_lists_versions_devices_and_ops() -> None:
    done = python("import runpy; runpy.run_module('dlaccel.info', run_name='__main__')")
    assert done.returncode == 0, done.stderr
    assert f"torch {torch.__version__}" in done.stdout
    for op in REGISTRY:
        assert f"  {op}: " in done.stdout
