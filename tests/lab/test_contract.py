# SPDX-License-Identifier: Apache-2.0
"""The contract suite on /dev/liveupdate: the very tests that the emulator passes, in one boot of a real kernel.

The names of the tests are collected here, the tests run there, and each reports for itself: a test that never reports has failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from luod.lab.outcome import LabRun
from luod.lab.script import REPOSITORY, Boot, python

MODULE = "tests/contract/test_boot_cases.py"
ENVIRONMENT = {"LUOD_CONTRACT": "device"}
pytestmark = [pytest.mark.lab, pytest.mark.timeout(420)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "nodeid" in metafunc.fixturenames:
        # Collecting costs a second, which a run that leaves the lab out should not pay.
        chosen = metafunc.config.getoption("markexpr") != "not lab"
        metafunc.parametrize("nodeid", collected() if chosen else [MODULE], ids=lambda nodeid: nodeid.split("::", 1)[-1])


def collected() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", MODULE]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, check=False
    )
    nodeids = [line for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not nodeids:
        raise pytest.UsageError(f"the contract suite cannot be collected:\n{done.stdout}{done.stderr}")
    return nodeids


@pytest.fixture(scope="module")
def contract(newest, run_lab) -> LabRun:
    arguments = ("-q", "-p", "no:cacheprovider", "-p", "luod.lab.pytest_report", "--timeout=240", MODULE)
    step = python("contract", "pytest", *arguments, directory=str(REPOSITORY), timeout_s=300, go_on=True)
    assert (Path(REPOSITORY) / MODULE).exists()
    return run_lab("contract-boot", newest, [Boot([step])], timeout_s=360, environment=ENVIRONMENT)


def test_case(contract, nodeid) -> None:
    told = [event for event in contract.of("case") if event["name"] == nodeid]
    if not told:
        contract.check()
        pytest.fail(f"the test never reported; see {contract.directory}")
    for event in told:
        if not event["ok"]:
            pytest.fail(event["message"])
        if event["outcome"] == "skipped":
            pytest.skip(event["message"])
        if event["outcome"] == "xfailed":
            pytest.xfail(event["message"])
