"""The rules of the house that a test can hold (docs/architecture.md)."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dlaccel.bench.case import families
from dlaccel.ops._register import REGISTRY

ROOT = Path(__file__).parents[1]
FLOORS = sorted({op.module.rpartition(".")[2] for op in REGISTRY.values()})


def imports(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def files(folder: str) -> list[Path]:
    return sorted(f for f in (ROOT / folder).rglob("*.py") if "__pycache__" not in f.parts)


def test_top_level_folders_are_not_packages() -> None:
    for folder in ("kernels", "bench"):  # a package of that name would shadow others of that name
        assert not (ROOT / folder / "__init__.py").exists()


def test_a_foreign_kernels_package_stays_importable_from_the_checkout(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("foreign = True")
    code = "import kernels, dlaccel.kernels; assert kernels.foreign; import dlaccel.kernels.config"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_one_module_under_one_name() -> None:
    assert not {"kernels", "bench"} & {m.partition(".")[0] for m in sys.modules if not m.startswith("dlaccel")}


@pytest.mark.parametrize("name", FLOORS)
def test_every_floor_has_the_op(name: str) -> None:
    for folder in ("kernels", "dlaccel/fallback", "dlaccel/ops"):
        assert (ROOT / folder / f"{name}.py").exists()
    assert (ROOT / "tests" / f"test_{name}.py").exists()


@pytest.mark.parametrize("op", sorted(REGISTRY))
def test_both_backends_have_the_same_signature(op: str) -> None:
    declaration = REGISTRY[op]
    if not declaration.has_kernel:
        pytest.skip(f"{op} has no Triton kernel by declaration")
    torch_side, triton_side = (getattr(declaration.floor(b), op) for b in ("torch", "triton"))
    assert inspect.signature(torch_side) == inspect.signature(triton_side)
    schema_names = [a.name for a in getattr(torch.ops.dlaccel, op).default._schema.arguments]
    assert list(inspect.signature(torch_side).parameters) == schema_names


def test_cases_export_what_the_contract_names() -> None:
    for op, family in families().items():
        for name in ("eager", "reference", "SAMPLES", "CASES", "REFUSED"):
            assert hasattr(family, name), f"bench/cases/{op}.py lacks {name}"
        names = [c.name for c in [*family.SAMPLES, *family.CASES]]
        assert len({*names}) == len(names), f"two cases of {op} have one name"


def test_no_room_imports_upwards() -> None:
    for file in files("kernels"):
        below = ("dlaccel.kernels", "dlaccel._version", "dlaccel.memory_format")  # the last two import torch at most
        bad = {m for m in imports(file) if m.startswith("dlaccel") and not m.startswith(below)}
        assert not bad, f"{file.name} imports {bad}"
    for file in files("dlaccel/fallback"):
        bad = {m for m in imports(file) if m.startswith(("triton", "dlaccel.ops", "dlaccel.kernels", "dlaccel.functional"))}
        assert not bad, f"{file.name} imports {bad}"
    for file in files("dlaccel/ops"):
        bad = {m for m in imports(file) if m.startswith(("triton", "dlaccel.functional", "dlaccel.nn", "dlaccel.bench"))}
        assert not bad, f"{file.name} imports {bad}"
    for file in (ROOT / "dlaccel").glob("*.py"):
        above = ("dlaccel.functional", "dlaccel.nn", "dlaccel.explanation") if file.name == "backend.py" else ()
        bad = {m for m in imports(file) if m.startswith(("triton", "dlaccel.kernels", "dlaccel.bench", *above))}
        allowed = {"backend.py": {"triton"}, "__init__.py": {"dlaccel.bench.tune"}}.get(file.name, set())  # both lazily
        assert not bad - allowed, f"{file.name} imports {bad}"


def test_kernels_use_no_float_atomics_no_autotuner_and_no_host_sync() -> None:
    for file in files("kernels"):
        text = file.read_text()
        for word in ("@triton.autotune", ".item()", ".cpu()", "make_block_ptr"):
            assert word not in text, f"{file.name} uses {word}"
        for atomic in re.findall(r"atomic_.*", text):  # counters, which their launcher makes of int32
            assert re.match(r"atomic_add\((tickets|arrived), [01], sem=", atomic), f"{file.name} uses {atomic}"


def test_public_names_are_listed_and_documented() -> None:
    import dlaccel.functional
    import dlaccel.nn

    for module in (dlaccel.functional, dlaccel.nn):
        for name in module.__all__:
            assert len(getattr(module, name).__doc__ or "") > 60, f"{module.__name__}.{name} lacks documentation"
