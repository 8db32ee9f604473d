# SPDX-License-Identifier: Apache-2.0
"""The contract suite on /dev/liveupdate: the very tests that the emulator passes, in one boot of a real kernel.

The names of the tests are collected here, the tests run there, and each reports for itself: a test that never reports has failed.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from luod.lab.outcome import LabRun
from luod.lab.script import REPOSITORY, Boot, Step, kexec, python, run

MODULE = "tests/contract/test_boot_cases.py"
ENVIRONMENT = {"LUOD_CONTRACT": "device"}
pytestmark = [pytest.mark.lab, pytest.mark.timeout(420)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # Collecting costs a second, which a run that leaves the lab out should not pay.
    chosen = metafunc.config.getoption("markexpr") != "not lab"
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(listed_once()) if chosen else ["all"])
    if "nodeid" in metafunc.fixturenames:
        metafunc.parametrize(
            "nodeid", collected() if chosen else [MODULE], ids=lambda nodeid: nodeid.split("::", 1)[-1]
        )


def collected() -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", MODULE]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
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


# -- across kexecs -------------------------------------------------------------------------------------------------------------

DRIVER = REPOSITORY / "tests/contract/kexec_driver.py"


def driver(*arguments: str) -> list[str]:
    return [sys.executable, str(DRIVER), "--backend", "device", *arguments]


@functools.cache
def listed_once() -> dict[str, list[int]]:
    """Ask the driver for its cases and the stages of each."""
    done = subprocess.run(driver("--list"), capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return {
        name: [int(stage) for stage in stages] for name, *stages in map(str.split, done.stdout.splitlines())
    }


def stage(number: int, *arguments: str) -> Step:
    return run(f"stage-{number}", driver("--stage", str(number), *arguments), timeout_s=200, go_on=True)


@pytest.fixture(scope="module", params=["same", "next"])
def stages(request, pair, newest, run_lab) -> LabRun:
    """Run every case across kexecs at once: on the newest kernel alone, and from the oldest to the newest."""
    first, second = (newest, newest) if request.param == "same" else pair
    if request.param == "next" and first.version == second.version:
        pytest.skip("there is only one kernel image, so no update between two versions")
    count = max(max(numbers) for numbers in listed_once().values())
    boots = [Boot([stage(number, "--hold"), kexec(second)]) for number in range(1, count)]
    boots.append(Boot([stage(count)]))
    return run_lab(f"contract-kexec-{first.version}-{second.version}", first, boots, timeout_s=330)


def test_kexec_case(stages, case) -> None:
    for number in listed_once()[case]:
        path = stages.state / "lab" / f"{number - 1}-stage-{number}.out"
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        verdicts = [
            line for line in lines if line.split()[1:2] == [case] and line.split()[0] in ("ok", "FAIL")
        ]
        if not verdicts:
            stages.check()
            pytest.fail(f"stage {number} of the case never reported; see {stages.directory}")
        assert verdicts[0].startswith("ok "), verdicts[0]


def test_a_block_without_entries_panics_the_next_kernel(newest, run_lab) -> None:
    boots = [Boot([stage(1, "--only", "panic", "--hold"), kexec(newest)], expect="panic"), Boot([])]
    lab = run_lab("contract-panic", newest, boots, timeout_s=240).check()
    assert "invalid entry count: 0" in lab.console
