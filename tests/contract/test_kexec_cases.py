# SPDX-License-Identifier: Apache-2.0
"""The contract across kexecs, on the emulator. On a real kernel the init of the guest runs `kexec_driver.py` instead."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cases_kexec
import pytest

from luod.adapters.emulator.images import stub_image
from luod.adapters.emulator.process import Emulator

pytestmark = pytest.mark.skipif(
    os.environ.get("LUOD_CONTRACT", "emulated") == "device",
    reason="a kexec would end this test run: kexec_driver.py runs these cases on a real kernel",
)

DRIVER = Path(__file__).parent / "kexec_driver.py"
CMDLINE = "console=ttyS0 kho=on liveupdate=on"


def run_stages(emulator: Emulator, image: Path, stages: int, only: str = "") -> tuple[list[str], bool]:
    """Run the stages with a kexec after each but the last. Returns the lines of all, and whether every jump was made."""
    lines: list[str] = []
    with emulator.control(timeout=50) as control:
        for stage in range(1, stages + 1):
            boot = control.boot_id()
            argv = [sys.executable, str(DRIVER), "--stage", str(stage), "--backend", "emulated"]
            argv += ["--dir", str(emulator.directory), "--only", only]
            if stage < stages:
                argv += ["--kexec", str(image), "--cmdline", CMDLINE]
            child = subprocess.run(
                argv, stdout=subprocess.PIPE, text=True, check=False, stdin=subprocess.DEVNULL
            )
            lines += [f"{stage} {line}" for line in child.stdout.splitlines()]
            if stage < stages:
                if child.returncode != -9:  # the jump kills the process that asked for it
                    return lines, False
                assert control.wait_boot(boot) != boot
    return lines, True


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    directory = tmp_path_factory.mktemp("kexec")
    with Emulator.start(directory) as emulator:
        lines, jumped = run_stages(emulator, stub_image(directory / "image"), cases_kexec.STAGES)
        assert jumped, lines
        yield lines


ALL = [name for name in cases_kexec.cases() if name not in cases_kexec.BY_NAME_ONLY]


@pytest.mark.parametrize("case", ALL)
def test_kexec_case(results: list[str], case: str) -> None:
    for stage in cases_kexec.cases()[case]:
        verdict = [line for line in results if line.split()[0] == str(stage) and line.split()[2] == case]
        assert len(verdict) == 1, verdict
        assert verdict[0].split()[1] == "ok", verdict[0]


def test_x29_the_next_kernel_panics(tmp_path: Path) -> None:
    with Emulator.start(tmp_path) as emulator, emulator.control(timeout=50) as control:
        boot = control.boot_id()
        argv = [sys.executable, str(DRIVER), "--stage", "1", "--backend", "emulated", "--dir", str(tmp_path)]
        argv += ["--only", "panic", "--kexec", str(stub_image(tmp_path / "image")), "--cmdline", CMDLINE]
        assert subprocess.run(argv, check=False, stdout=subprocess.DEVNULL).returncode == -9
        with pytest.raises(OSError, match="entry count of 0"):
            control.wait_boot(boot)
        assert "entry count of 0" in control.state()["panic"]
        control.cold_reboot()
        assert control.state()["panic"] == ""
