"""A pytest plugin: run one part of the tests in this process, and write a line for each."""

import os
from pathlib import Path

import pytest

from bench.ops import lines

PART, LINES = "FIRST_CONTACT_PART", "FIRST_CONTACT_LINES"
"""Environment variables: the part as `index/parts`, and the file of lines."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, parts = map(int, os.environ[PART].split("/"))
    own = items[index::parts]
    config.hook.pytest_deselected(items=[item for item in items if item not in own])
    items[:] = own


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    line = {"key": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
    if report.failed:
        line["why"] = report.longreprtext[-500:]
    lines.append(Path(os.environ[LINES]), line)
