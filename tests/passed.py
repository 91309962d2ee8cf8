"""A pytest plugin: tests that have passed are left out when a run is started again.

    python -m pytest tests/test_contract.py -p tests.passed --passed FILE

FILE gets a line for each test as it passes. For machines that are lent for minutes: name FILE after the commit.
"""

from __future__ import annotations

from pathlib import Path

import pytest


class Passed:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = set(path.read_text().splitlines()) if path.exists() else set()
        path.parent.mkdir(parents=True, exist_ok=True)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        out = [item for item in items if item.nodeid in self.before]
        if out:
            config.hook.pytest_deselected(items=out)
            items[:] = [item for item in items if item.nodeid not in self.before]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A skip counts: it would be the same again.
        if (report.when == "call" and report.passed) or (report.when in ("setup", "call") and report.skipped):
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, metavar="FILE", required=True, help="tests that have passed, one a line")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Passed(config.getoption("--passed")))
