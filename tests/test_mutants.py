"""The lists of mutants follow the code, and the runner tells its verdicts apart. Running them is `make mutants`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.kit import ROOT
from tests.mutants import Mutant
from tests.mutants.__main__ import judge, lists_of, table

LISTS = lists_of([])
ALL = [pytest.param(m, id=f"{op}: {m.name}") for op, module in LISTS.items() for m in module.MUTANTS]


@pytest.mark.parametrize("mutant", ALL)
def test_mutant_follows_the_code(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.old) == 1, f"the text stands {source.count(mutant.old)} times in {mutant.file}"
    mutated = source.replace(mutant.old, mutant.new)
    assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source))


@pytest.mark.parametrize("op", LISTS)
def test_names_are_unique(op: str) -> None:
    names = [m.name for m in LISTS[op].MUTANTS]
    assert len(set(names)) == len(names) >= 8


@pytest.mark.parametrize(
    "old, new, verdict",
    [
        ("return a + b", "return a - b", "killed"),
        ("return a + b", "return b + a", "survived"),
        ("return a + b", "return a +", "broken"),
        ("return a + b", "import os; os.abort()", "killed"),
        ("return a + b", "while True: pass", "killed"),
        ("return a * b", "return a", "stale"),
        ("a", "b", "stale"),
    ],
)
def test_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, verdict: str) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # starts faster
    monkeypatch.setattr("tests.mutants.__main__.CPU_S", 4)
    source = "def add(a, b):\n    return a + b\n"
    (tmp_path / "code_.py").write_text(source)
    (tmp_path / "test_code.py").write_text("from code_ import add\ndef test_add(): assert add(1, 2) == 3\n")
    row = judge(Mutant("m", "code_.py", old, new), ("test_code.py",), tmp_path)
    assert row["verdict"] == verdict, row
    assert (tmp_path / "code_.py").read_text() == source
    assert verdict != "killed" or "test_code.py" in row["test"]


def test_table_escapes() -> None:
    assert "a \\| b &lt; c" in table("op", [("a | b < c", {"verdict": "killed", "test": "tests/t.py::x", "how": ""})])
