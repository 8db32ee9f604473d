# SPDX-License-Identifier: Apache-2.0
"""A guest that is a Linux: its root on a qcow2 image over a raw one, a network card in QEMU's user network, two processors.

Its init, `linux_guest.c`, counts on its disk and to its host. The host's end of the network is read together with the serial port.
"""

from __future__ import annotations

import contextlib
import re
import select
import shutil
import socket
import struct
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wrapper_rig import PATIENCE_S, QEMU, Tenant

from luod.lab.disk import make_state_disk
from luod.lab.images import KernelImage
from luod.lab.machine import UNHURRIED

SOURCE = Path(__file__).parent / "linux_guest.c"
DISK_MIB = 64
RAM_MIB = 160
BOOT_S = 90.0

_BOOT = re.compile(r"guest: boot (\S+) log (-?\d+)")
_TICK = re.compile(r"guest: tick (\d+) mono (\d+) echo (\d+)")
_END = re.compile(r"guest: end log (-?\d+)")


@dataclass
class LinuxLog:
    """What a Linux guest has said. `left` is how many numbers each boot found on its disk, `end` what was there at the end (-1: not each of
    them, in order).

    When `strict`, nobody but the guest's init may say anything before the end.
    """

    left: list[int] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    last: int = 0
    echoed: int = 0
    end: int | None = None
    strict: bool = True
    asleep: bool = False
    findings: list[str] = field(default_factory=list)
    _rest: bytes = b""

    @property
    def boots(self) -> int:
        return len(self.left)

    def feed(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line.decode("ascii", "backslashreplace").rstrip("\r"))

    def _line(self, line: str) -> None:
        if boot := _BOOT.search(line):
            self.ids.add(boot[1])
            self.left.append(int(boot[2]))
            if self.last not in (0, self.left[-1]) or self.end not in (None, self.last):
                self.findings.append(f"after tick {self.last}: {line}")
            self.last = self.left[-1]
            self.end = None
        elif tick := _TICK.search(line):
            number, self.echoed = int(tick[1]), int(tick[3])
            if number != self.last + 1:
                self.findings.append(f"tick {number} after tick {self.last}")
            self.last = number
            self.asleep = False
        elif line == "guest: sleeps":
            self.asleep = True
        elif end := _END.search(line):
            self.end = int(end[1])
        elif (
            self.strict and line.strip() and self.end is None
        ):  # the kernel's own last words come after the guest's
            self.findings.append(f"after tick {self.last}: {line!r}")


def linux_command(
    kernel: KernelImage,
    disk: Path,
    serial: Path,
    port: int,
    *more: str,
    qemu: str = QEMU,
    accel: str = "tcg",
    network: str = "user",
) -> list[str]:
    """Return a usual command line for such a guest; `port` is where its host listens, at the address of QEMU's user network."""
    words = f"console=ttyS0 root=/dev/vda rw init=/init quiet loglevel=1 panic=-1 {UNHURRIED}"
    return [
        qemu, "-accel", accel, "-machine", "q35", "-cpu", "max", "-m", f"{RAM_MIB}M",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-chardev", f"file,id=s0,path={serial},append=on", "-serial", "chardev:s0",
        "-drive", f"file={disk},format=qcow2,if=none,id=d0", "-device", "virtio-blk-pci,drive=d0",
        "-netdev", f"{network},id=n0", "-device", "virtio-net-pci,netdev=n0", "-device", "virtio-rng-pci",
        "-kernel", str(kernel.path), "-append", f"{words} net.ifnames=0 port={port}", *more,
    ]  # fmt: skip


class LinuxGuest(Tenant):
    """A tenant that runs `kernel`, with its disk in the world's directory."""

    def __init__(
        self,
        world: Any,
        name: str,
        *,
        kernel: KernelImage,
        binary: str = QEMU,
        network: str = "user",
        host: str = "127.0.0.1",
    ) -> None:
        super().__init__(world, name, mib=RAM_MIB, binary=binary)
        self.log: LinuxLog = LinuxLog()  # type: ignore[assignment]
        self.disk = make_disk(world.state.parent / name)
        self.host = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self.host.bind((host, 0))
        self.order = b""
        self.command = linux_command(
            kernel, self.disk, self.fifo, self.host.getsockname()[1], "-smp", "2", qemu=binary, accel="tcg,thread=multi",
            network=network,
        )  # fmt: skip

    def speak_until(self, tick: int) -> int:
        self._listen(lambda: self.log.last >= tick)
        return self.log.last

    def whole(self, boots: int = 1) -> None:
        """Fail unless the guest goes on, has lost no number, and its network works in both directions."""
        last = self.log.last
        self._listen(lambda: self.log.last >= last + 20 and self.log.echoed > last)
        assert self.log.findings == [], self.log
        assert len(self.log.ids) == self.log.boots == boots, self.log

    def sleep(self) -> None:
        """Let the guest suspend to RAM, and wait until it has said that it does."""
        self.order = b"sleep"
        self._listen(lambda: self.log.asleep)

    def boot_again(self) -> None:
        """Let the guest start its machine again, and wait until it is back."""
        boots = self.log.boots
        self.order = b"again"
        self._listen(lambda: self.log.end is not None)
        self.order = b""
        self._listen(lambda: self.log.boots > boots)

    def power_off(self) -> int:
        """Let the guest power off, after it has found all its numbers on its disk; return luo-qemu's exit code."""
        self.order = b"end"
        self._listen(lambda: self.log.end is not None)
        code = self.wait()
        self.drain()
        assert self.log.findings == [], self.log
        assert self.log.end == self.log.last, self.log
        return code

    def _listen(self, heard: Any) -> None:
        until = time.monotonic() + BOOT_S
        while not heard():
            left = until - time.monotonic()
            assert left > 0, f"the guest says no more: {self.log}\n{self.words()}"
            ready = select.select([self.serial, self.host], [], [], left)[0]
            if self.serial in ready:
                self.drain()
            if self.host in ready:
                number, guest = self.host.recvfrom(64)
                with contextlib.suppress(OSError):  # the QEMU whose port that was is gone
                    self.host.sendto(self.order or number, guest)
                    self.order = b"" if self.order == b"sleep" else self.order

    def __exit__(self, *error: Any) -> None:
        self.host.close()
        super().__exit__(*error)


def make_disk(place: Path, seen_as: Path | None = None) -> Path:
    """Make the guest's disk in a new directory: ext4 with its init on a raw image, and an empty qcow2 over it.

    `seen_as` is that directory where the guest's QEMU will be.
    """
    root = place / "root"
    for folder in ("dev", "proc", "sys"):
        (root / folder).mkdir(parents=True)
    compiler = shutil.which("cc") or "cc"
    subprocess.run(
        [compiler, "-static", "-O1", "-Wall", "-Wextra", "-Werror", "-o", str(root / "init"), str(SOURCE)],
        check=True, timeout=PATIENCE_S,
    )  # fmt: skip
    base, disk = place / "base.img", place / "disk.qcow2"
    make_state_disk(base, root, DISK_MIB)
    disk.write_bytes(overlay((seen_as or place) / base.name, DISK_MIB << 20))
    return disk


def overlay(base: Path, size: int) -> bytes:
    """Return an empty qcow2 image over a raw one (QEMU, docs/interop/qcow2.rst): header, refcount table and block, one L1 table."""
    cluster = 1 << 16
    name = str(base).encode()
    extensions = struct.pack(">II8s", 0xE2792ACA, 3, b"raw") + bytes(8)
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 104 + len(extensions), len(name), 16, size, 0,
        1, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0, 4, 104,
    )  # fmt: skip
    clusters = (
        header + extensions + name, struct.pack(">Q", 2 * cluster), struct.pack(">4H", 1, 1, 1, 1), b"",
    )  # fmt: skip
    return b"".join(one.ljust(cluster, b"\0") for one in clusters)
