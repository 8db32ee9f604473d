# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for lab guests: each test's outcome leaves the machine as a result line of its own, the moment it is known.

python -m pytest -p luod.lab.pytest_report ...
"""

from __future__ import annotations

import pytest

from .report import emit


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Report the call of a test, or its set-up or tear-down when that decides."""
    if report.when != "call" and report.passed:
        return
    reason = ""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
    elif hasattr(report, "wasxfail"):
        reason = str(report.wasxfail)
    outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
    emit(
        "case",
        name=report.nodeid,
        when=report.when,
        outcome=outcome,
        ok=not report.failed,
        seconds=round(report.duration, 3),
        message=report.longreprtext if report.failed else reason,
    )


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Report a module that cannot be collected: its tests would be missing without a word."""
    if report.failed:
        emit(
            "case",
            name=report.nodeid,
            when="collect",
            outcome="failed",
            ok=False,
            seconds=0.0,
            message=report.longreprtext,
        )
