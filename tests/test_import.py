"""`import dlaccel` is lean, and works where Triton is absent or broken."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *, cwd: Path = ROOT, path: str = "", flags: tuple[str, ...] = ("-W", "error")) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (path, os.environ.get("PYTHONPATH", "")) if p)
    done = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_in_nothing_slow() -> None:
    run(
        """
        import sys, torch
        before = set(sys.modules)
        import dlaccel
        slow = ("triton", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.utils.flop_counter",
                "matplotlib", "dlaccel.kernels.launch")
        found = [m for m in set(sys.modules) - before if m.startswith(slow)]
        assert not found, found
        assert not torch.cuda.is_initialized()
        """
    )


def test_documented_names_need_no_import_of_their_own() -> None:
    run(
        """
        import sys, dlaccel
        assert "dlaccel.convert" not in sys.modules
        assert dlaccel.convert.from_timm({"conv_dw.weight": 1}) == {"depthwise.weight": 1}
        assert callable(dlaccel.tune) and {"convert", "tune"} <= set(dlaccel.__all__)
        """
    )


def test_import_tags_the_compile_cache_once() -> None:
    run("import dlaccel, torch.compiler.config as c; assert c.cache_key_tag.count('dlaccel-') == 1")


@pytest.mark.parametrize(
    "broken", ["raise ModuleNotFoundError('No module named triton')", "raise OSError('libtriton.so: undefined symbol')"]
)
def test_works_when_triton_is_absent_or_broken(broken: str, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(broken)
    run(
        """
        import torch, dlaccel
        x, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
        with dlaccel.use_backend("torch"):
            dlaccel.functional.linear_relu(x, w).sum().backward()
        assert "triton cannot be imported" in dlaccel.backend.triton_problem()
        dlaccel.use_backend("triton")
        try:
            dlaccel.functional.linear_relu(x, w)
        except RuntimeError as e:
            assert "backend 'triton' was chosen but" in str(e)
        else:
            raise AssertionError("no error")
        from dlaccel.info import report
        assert "cannot be imported" in report()
        """,
        path=str(tmp_path),
    )


def test_fork_after_use() -> None:
    run(
        """
        import multiprocessing as mp, torch, dlaccel
        def work(queue):
            x = torch.ones(2, 3, requires_grad=True)
            dlaccel.functional.linear_relu(x, torch.ones(4, 3)).sum().backward()
            queue.put(float(x.grad.sum()))
        if __name__ == "__main__":
            context = mp.get_context("fork")
            queue = context.SimpleQueue()
            work(queue)
            child = context.Process(target=work, args=(queue,))
            child.start()
            child.join()
            assert child.exitcode == 0 and queue.get() == queue.get() == 24
        """,
        flags=(),
    )


@pytest.mark.parametrize("order", ["import dlaccel; from torch.utils.flop_counter import FlopCounterMode", "counter first"])
def test_flop_counter_knows_the_ops(order: str) -> None:
    both = "from torch.utils.flop_counter import FlopCounterMode; import dlaccel" if order == "counter first" else order
    run(
        f"""
        {both}
        import torch, dlaccel.functional as F
        with FlopCounterMode(display=False) as counter:
            torch.ops.dlaccel.linear_relu(torch.ones(2, 3), torch.ones(5, 3), None)
        assert counter.get_total_flops() == 2 * 2 * 3 * 5, counter.get_total_flops()
        """
    )
