# SPDX-License-Identifier: Apache-2.0
"""The service template: systemd understands it, and it does what luo-qemu rests on."""

from __future__ import annotations

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from luod.qemu.restoring import DATA_ERROR

UNIT = Path(__file__).parents[2] / "packaging" / "luo-qemu@.service"


def test_a_dead_luo_qemu_does_not_take_its_guest_along() -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text())
    service = unit["Service"]
    assert service["KillMode"] == "process"
    assert service["RuntimeDirectoryPreserve"] == "yes"
    assert str(DATA_ERROR) in service["RestartPreventExitStatus"].split()
    assert service["RuntimeDirectory"] == "luo-qemu/%i"
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_understands_it(tmp_path: Path) -> None:
    program = tmp_path / "luo-qemu"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("ExecStart=luo-qemu", f"ExecStart={program}"))
    instance = tmp_path / "luo-qemu@vm1.service"
    instance.symlink_to(tmp_path / UNIT.name)
    found = subprocess.run(
        ["systemd-analyze", "verify", str(instance)], capture_output=True, text=True, check=False
    )
    # Units of the host that are not installed here are no matter of this one.
    complaints = [line for line in found.stderr.splitlines() if "luo-qemu@" in line]
    assert complaints == []
