# SPDX-License-Identifier: Apache-2.0
"""The lab's fixtures: kernels, QEMU, and the directory that each run leaves behind.

Without QEMU or a kernel image every test marked `lab` is skipped, with what is missing as the reason.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luod.lab.accel import qemu
from luod.lab.errors import LabUnavailable
from luod.lab.images import KernelImage, available, choose_pair
from luod.lab.machine import Machine
from luod.lab.outcome import LabRun
from luod.lab.script import Boot

LAB_OUT = Path(__file__).resolve().parents[2] / "lab-out"

RunLab = Callable[..., LabRun]


@pytest.fixture(scope="session")
def pair() -> tuple[KernelImage, KernelImage]:
    """The kernel to start from and the one to update to; the test is skipped when the lab cannot run here."""
    try:
        qemu()
        return choose_pair()
    except LabUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def newest(pair: tuple[KernelImage, KernelImage]) -> KernelImage:
    return available()[-1] if available() else pair[1]


@pytest.fixture(scope="session")
def run_lab() -> RunLab:
    """Run a script of boots on a machine whose directory stays: `run_lab("name", kernel, [Boot(...), ...], timeout_s=90)`."""
    base = Path(os.environ.get("LUOD_LAB_OUT", LAB_OUT))

    def run(
        name: str, kernel: KernelImage, boots: list[Boot], *, timeout_s: float, files: Any = None, **size: Any
    ) -> LabRun:
        directory = base / re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        return Machine(kernel, directory, **size).run(boots, timeout_s=timeout_s, files=files)

    return run


def write_image(path: Path, release: str, *, magic: bytes = b"HdrS", pointer: int = 0x3000) -> Path:
    """Write what a bzImage begins with: the header's magic and the pointer to the version string."""
    head = bytearray(0x4000)
    head[0x202:0x206] = magic
    struct.pack_into("<H", head, 0x20E, pointer)
    text = f"{release} (luod@lab) #1 SMP PREEMPT_DYNAMIC".encode() + b"\0"
    head[0x3200 : 0x3200 + len(text)] = text
    path.write_bytes(bytes(head))
    return path


@pytest.fixture(scope="session")
def image() -> Callable[..., Path]:
    """Make a file that looks like a kernel image: `image(path, release)`."""
    return write_image
