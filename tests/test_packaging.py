"""The wheel, the editable install and the checkout hold the same modules under the same names."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import torch, dlaccel, dlaccel.kernels.config, dlaccel.bench.case, dlaccel.bench.cases.linear_relu, pathlib
x = torch.ones(2, 3, requires_grad=True)
dlaccel.functional.linear_relu(x, torch.ones(4, 3)).sum().backward()
print(pathlib.Path(dlaccel.kernels.config.__file__).resolve())
print(pathlib.Path(dlaccel.bench.case.__file__).resolve())
"""


def pip(*args: str) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", "77", reason="building needs setuptools >= 77")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: an in-tree build leaves build/, whose files would return in the next wheel
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("not a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip("wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source))
    return next(folder.glob("*.whl"))


def use(cwd: Path, *paths: Path) -> list[Path]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run([sys.executable, "-P", "-c", USE], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()]


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("kernels", "dlaccel/kernels"), ("bench", "dlaccel/bench"), ("dlaccel", "dlaccel")):
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.relative_to(ROOT / folder).as_posix()
            if file.parent.name not in ("kernels", "bench") or folder != "dlaccel":  # the pointers stay in the checkout
                assert "__pycache__" in relative or f"{package}/{relative}" in names, relative
    assert "dlaccel/py.typed" in names
    assert not [n for n in names if n.startswith(("kernels/", "bench/", "tests/"))]


def test_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip("install", "-q", "--no-deps", "--target", str(site), str(wheel))
    kernels, bench = use(tmp_path, site)
    assert kernels.is_relative_to(site / "dlaccel" / "kernels") and bench.is_relative_to(site / "dlaccel" / "bench")


def test_the_checkout_works_uninstalled(tmp_path: Path) -> None:
    kernels, bench = use(tmp_path, ROOT)
    assert kernels == ROOT / "kernels" / "config.py" and bench == ROOT / "bench" / "case.py"


def test_constraints_name_what_runs_here() -> None:
    pins = dict(
        line.split(";")[0].strip().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    )
    assert pins["torch"] == "2.13.0" and pins["triton"] == "3.7.1"  # torch 2.13.0 asks for exactly this Triton
