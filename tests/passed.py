"""A pytest plugin: tests that have passed are left out when a run is started again.

    python -m pytest tests/test_contract.py -p tests.passed --passed FILE

FILE gets a line for each test as it passes, FILE with the suffix .failed the message of each that fails. For machines that are
lent for minutes: name FILE after the commit. With pytest-xdist, a process in which an error has made the GPU unusable ends
after that test, and another takes its place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


class Passed:
    def __init__(self, path: Path, worker: dict[str, Any] | None) -> None:
        self.path = path
        self.worker = worker  # of pytest-xdist: what the first process hands it. All must leave out the same tests
        before = path.read_text().splitlines() if path.exists() else []
        self.before: set[str] = set(before if worker is None else worker["passed"])
        path.parent.mkdir(parents=True, exist_ok=True)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["passed"] = sorted(self.before)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        out = [item for item in items if item.nodeid in self.before]
        if out:
            config.hook.pytest_deselected(items=out)
            items[:] = [item for item in items if item.nodeid not in self.before]

    @pytest.hookimpl(trylast=True)  # a worker has sent its report then
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.worker is not None:
            from dlaccel.bench.timing import gpu_is_lost  # not before conftest.py has said how kernels run

            if report.failed and gpu_is_lost():
                os._exit(1)
            return
        # A skip counts: it would be the same again.
        if (report.when == "call" and report.passed) or (report.when in ("setup", "call") and report.skipped):
            with self.path.open("a") as file:
                file.write(report.nodeid + "\n")
        elif report.failed:
            with self.path.with_suffix(".failed").open("a") as file:
                file.write(f"FAILED {report.nodeid}\n{report.longreprtext}\n\n")

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--passed", type=Path, metavar="FILE", required=True, help="tests that have passed, one a line")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Passed(config.getoption("--passed"), getattr(config, "workerinput", None)))
