# SPDX-License-Identifier: Apache-2.0
"""QEMU itself, and whether KVM can be relied on here: found out by booting a guest with it, not by opening /dev/kvm.

A nested /dev/kvm may answer every ioctl and still die at the guest's first instructions, so the only honest probe is a boot.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .errors import LabUnavailable
from .images import KernelImage, cache_root

QEMU = "qemu-system-x86_64"
TCG = ("-accel", "tcg,thread=single")
"""All processors of a machine in one thread. With one each, QEMU 10.0.2 was seen to abort on a loaded host while passthrough devices
were reset and their memory moved (`iotlb_to_section: Assertion`). It is no slower: machines run side by side."""
PARALLEL_TCG = ("-accel", "tcg,thread=multi")
KVM = ("-accel", "kvm")
PROBE_S = 20.0
"""Seconds a KVM guest gets to show its first kernel messages; with working KVM it takes less than one."""


def qemu() -> str:
    """Return the path of QEMU. Raises `LabUnavailable`, saying how to install it."""
    found = shutil.which(QEMU)
    if found is None:
        raise LabUnavailable(
            f"{QEMU} is not installed",
            hint="run .ci/install-qemu as root, or `apt-get install qemu-system-x86`",
        )
    return found


def acceleration(
    image: KernelImage, *, parallel: bool = False, device: Path = Path("/dev/kvm"), cache: Path | None = None
) -> tuple[str, ...]:
    """Return QEMU's options for the acceleration to use: KVM where a guest really boots with it, else software emulation.

    `parallel` is for a machine that emulates guests of its own, which want more than one processor of this host; not for one with
    passthrough devices, see `TCG`. The answer is kept for this boot of the host and this QEMU.
    """
    emulation = PARALLEL_TCG if parallel else TCG
    if not os.access(device, os.R_OK | os.W_OK):
        return emulation
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    key = f"{boot_id} {qemu()} {os.stat(qemu()).st_mtime_ns}"
    file = (cache or cache_root()) / "kvm-probe.json"
    works = _remembered(file, key)
    if works is None:
        works = _boots_with_kvm(image)
        with contextlib.suppress(OSError):  # a read-only cache only costs the next run its own probe
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps([key, works]), encoding="utf-8")
    return KVM if works else emulation


def _remembered(file: Path, key: str) -> bool | None:
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if found == [key, True]:
        return True
    return False if found == [key, False] else None


def _boots_with_kvm(image: KernelImage) -> bool:
    """Boot a kernel without a root: the panic that it cannot mount one comes after everything that a broken KVM fails at."""
    with tempfile.TemporaryDirectory(prefix="luod-kvm-") as directory:
        console = Path(directory) / "console"
        command = [
            qemu(), *KVM, "-cpu", "max", "-m", "512M", "-display", "none", "-nodefaults", "-no-reboot",
            "-serial", f"file:{console}", "-kernel", str(image.path), "-append", "console=ttyS0 panic=-1",
        ]  # fmt: skip
        try:
            subprocess.run(
                command, timeout=PROBE_S, stdin=subprocess.DEVNULL, capture_output=True, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return console.exists() and b"Unable to mount root fs" in console.read_bytes()
