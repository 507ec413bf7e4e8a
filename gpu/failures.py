"""A pytest plugin: what fails is written at once, so that a time limit takes none of it away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and (folder := os.environ.get("GPU_FAILURES")) and "PYTEST_XDIST_WORKER" not in os.environ:
        with (Path(folder) / "failures.txt").open("a") as file:
            file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext[-6000:]}\n\n")
