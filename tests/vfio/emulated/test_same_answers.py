# SPDX-License-Identifier: Apache-2.0
"""The emulated iommufd and devices against real ones: the same calls, one after the other, must get the same answers.

What a user-space kernel answers otherwise is listed with its reason; an entry that is not needed any more fails as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from passthrough_host import started

from luod.lab.outcome import LabRun
from luod.lab.passthrough import ARGUMENTS
from luod.lab.script import Boot, run

sys.path.insert(0, str(Path(__file__).parents[1] / "programs"))

from same_answers import answers

DEVIATIONS: dict[str, str] = {}


@pytest.fixture(scope="module")
def real(pair, run_devices, program) -> dict[str, str]:
    boot = Boot([run("answers", program("same_answers.py"), timeout_s=150)], arguments=ARGUMENTS)
    outcome: LabRun = run_devices("same-answers", pair[1], [boot], 120)
    outcome.check()
    return dict(outcome.of("answers")[0]["answers"])


def emulated(directory: Path) -> dict[str, str]:
    with started(directory, handlers=(), devices=("vfio0",)) as host:
        return dict(answers(host.files, "/dev/vfio/devices/vfio0"))


def test_every_call_is_answered_once_and_for_all(tmp_path: Path) -> None:
    """The list itself is sound: no name twice, and two runs agree."""
    with started(tmp_path, handlers=(), devices=("vfio0",)) as host:
        first, second = (answers(host.files, "/dev/vfio/devices/vfio0") for _ in range(2))
    assert len({name for name, _ in first}) == len(first)
    assert first == second


@pytest.mark.lab
@pytest.mark.timeout(240)
def test_a_real_kernel_answers_the_same(tmp_path: Path, real: dict[str, str]) -> None:
    here = emulated(tmp_path)
    assert list(here) == list(real)
    other = {name: f"real {real[name]}, emulated {here[name]}" for name in real if real[name] != here[name]}
    unlisted = {name: text for name, text in other.items() if name not in DEVIATIONS}
    assert not unlisted
    assert other.keys() == DEVIATIONS.keys()
