# SPDX-License-Identifier: Apache-2.0
"""Lab machines with passthrough devices; without QEMU or a kernel image the tests that need one are skipped, saying what is missing."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from luod.lab.accel import qemu
from luod.lab.errors import LabUnavailable
from luod.lab.images import KernelImage, choose_pair
from luod.lab.machine import Machine
from luod.lab.outcome import LabRun
from luod.lab.passthrough import BOARD, QEMU_OPTIONS
from luod.lab.script import Boot

LAB_OUT = Path(__file__).resolve().parents[2] / "lab-out"
PROGRAMS = Path(__file__).parent / "programs"

RunDevices = Callable[[str, KernelImage, list[Boot], float], LabRun]


@pytest.fixture(scope="session")
def pair() -> tuple[KernelImage, KernelImage]:
    """The kernel to start from and the one to update to."""
    try:
        qemu()
        return choose_pair()
    except LabUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def run_devices() -> RunDevices:
    """Run boots on a machine with an IOMMU and devices: `run_devices(name, kernel, boots, timeout_s)`."""
    base = Path(os.environ.get("LUOD_LAB_OUT", LAB_OUT))

    def run(name: str, kernel: KernelImage, boots: list[Boot], timeout_s: float) -> LabRun:
        return Machine(kernel, base / name, board=BOARD, devices=QEMU_OPTIONS).run(boots, timeout_s=timeout_s)

    return run


@pytest.fixture(scope="session")
def program() -> Callable[..., list[str]]:
    """Name a program of this directory as a guest runs it."""
    return lambda name, *arguments: [sys.executable, str(PROGRAMS / name), *arguments]
