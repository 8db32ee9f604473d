# SPDX-License-Identifier: Apache-2.0
"""What on a QEMU command line stands in the way of a kexec, why, and what to do about it.

A guest lives through a kexec when all that it is lies in its RAM, in its device state and in files that are there afterwards. What a
process of the host holds for it (vhost-user, virtiofs, descriptors that were handed over), what lies in memory of the host's own
(tmpfs), and what another option of QEMU would do to the new process is named here, each with its reason.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .commandline import Field, Option, lookup, parse_fields

VOLATILE = frozenset({"tmpfs", "ramfs", "hugetlbfs", "rootfs"})
"""File systems whose files are gone after a kexec."""

FIRST_KEYS = {
    "accel": "accel", "machine": "type", "M": "type", "cpu": "model", "m": "size", "object": "qom-type", "device": "driver",
    "chardev": "backend", "netdev": "type", "blockdev": "driver", "smp": "cpus", "fsdev": "fsdriver", "virtfs": "fsdriver",
    "numa": "type", "nic": "type", "net": "type", "drive": "file", "run-with": "async-teardown", "name": "guest",
}  # fmt: skip
"""What the first word of an option's value stands for where it has no key."""

_DISKS = frozenset({"", "hda", "hdb", "hdc", "hdd", "cdrom", "fda", "fdb", "mtdblock", "sd", "pflash"})


class Obstacle(NamedTuple):
    """An option that cannot go with a kexec: the option, why, and what to do."""

    option: str
    why: str
    advice: str

    def __str__(self) -> str:
        return f"{self.option}: {self.why}; {self.advice}"


_OPTIONS: dict[str, tuple[str, str]] = {
    "snapshot": (
        "what the guest writes goes to a temporary file that ends with this QEMU",
        "leave it out, or put a qcow2 overlay on a disk",
    ),
    "daemonize": (
        "luo-qemu must see QEMU end, and QEMU would leave it at once",
        "leave it out and let systemd run luo-qemu in the background",
    ),
    "incoming": (
        "luo-qemu itself decides when a guest comes in",
        "leave it out; to receive a migration, start QEMU without luo-qemu",
    ),
    "mem-path": (
        "RAM in a file of a given path cannot be carried over, only memfds can",
        "leave it out: luo-qemu puts RAM into a memfd",
    ),
    "readconfig": (
        "options in a file are not seen here",
        "put them on the command line",
    ),
    "preconfig": ("RAM must be known when QEMU starts", "leave it out"),
    "loadvm": (
        "the restored guest would be replaced by the snapshot",
        "load it once without luo-qemu, or from the monitor",
    ),
    "add-fd": (
        "a descriptor handed to this process is gone after the kexec",
        "name the file by its path",
    ),
    "xen-attach": ("a Xen domain is not QEMU's to carry", "run the guest with KVM or TCG"),
    "help": ("QEMU would only print and end", "ask QEMU without luo-qemu"),
    "version": ("QEMU would only print and end", "ask QEMU without luo-qemu"),
}
_OPTIONS["h"] = _OPTIONS["help"]

_DEVICES: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("vfio-", "vfio_"),
        "the device is the host's own, and this kernel cannot hand it over",
        "use a virtio device, or unplug it before each update",
    ),
    (
        ("vhost-user",),
        "the other half of the device is a process of the host that ends with the kernel",
        "use the virtio device of QEMU itself",
    ),
    (
        ("pc-dimm", "nvdimm", "virtio-mem", "virtio-pmem", "cxl-"),
        "memory that is a device of its own is not carried over",
        "give the guest all of its memory by -m",
    ),
    (
        ("ivshmem",),
        "memory shared with others on the host is not carried over",
        "use a socket or a virtio device",
    ),
    (
        ("usb-host", "u2f-passthru", "vhost-scsi", "vhost-vdpa", "scsi-generic", "scsi-block"),
        "the state of the device is with the host's kernel",
        "use a device that QEMU emulates",
    ),
)

_OBJECTS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("sev-guest", "sev-snp-guest", "tdx-guest", "s390-pv-guest", "pef-guest", "memory-backend-epc"),
        "its memory is encrypted by a key that is gone after the kexec",
        "only guests whose memory the host can read can be carried over",
    ),
    (
        ("x-remote-object", "x-vfio-user-server"),
        "the other half is a process of the host that ends with the kernel",
        "use a device of QEMU itself",
    ),
)

_BACKENDS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (
        "netdev",
        ("vhost-user", "vhost-vdpa"),
        "the other half is outside QEMU and ends with the kernel",
        "use tap or user networking",
    ),
    (
        "nic",
        ("vhost-user", "vhost-vdpa"),
        "the other half is outside QEMU and ends with the kernel",
        "use tap or user networking",
    ),
    (
        "tpmdev",
        ("passthrough",),
        "the state of the TPM is with the host",
        "use -tpmdev emulator",
    ),
)

FileSystem = Callable[[str], str]
"""Return the type of the file system that a path lies on, empty where that is not known."""


def obstacles(options: list[Option], file_system: FileSystem | None = None) -> list[Obstacle]:
    """Return everything on a command line that cannot go with a kexec, RAM aside."""
    look = file_system or kind_of_place
    return [found for option in options for found in _of_option(option, look)]


def _of_option(option: Option, look: FileSystem) -> Iterator[Obstacle]:
    if option.name in _OPTIONS:
        yield Obstacle(str(option), *_OPTIONS[option.name])
        return
    if option.name in _DISKS:
        yield from _of_disk(option, option.value or "", look)
        return
    if option.value is None or option.name not in FIRST_KEYS:
        return
    fields = parse_fields(option.value, FIRST_KEYS[option.name])
    kind = lookup(fields, FIRST_KEYS[option.name]) or ""
    tables = {"device": _DEVICES, "object": _OBJECTS}
    for names, why, advice in tables.get(option.name, ()):
        if kind.startswith(names):
            yield Obstacle(str(option), why, advice)
    for name, kinds, why, advice in _BACKENDS:
        if option.name == name and kind in kinds:
            yield Obstacle(str(option), why, advice)
    yield from _of_fields(option, fields, look)


def _of_fields(option: Option, fields: list[Field], look: FileSystem) -> Iterator[Obstacle]:
    if any(
        field.key in ("fd", "fds", "vhostfd", "vhostfds") or (field.value or "").startswith("/dev/fdset/")
        for field in fields
    ) or (lookup(fields, "addr.type") == "fd"):
        yield Obstacle(
            str(option),
            "a descriptor handed to this process is gone after the kexec",
            "let QEMU open the file, socket or tap itself",
        )
    if option.name in ("machine", "M"):
        for key in ("confidential-guest-support", "memory-encryption"):
            if lookup(fields, key):
                yield Obstacle(
                    str(option), "the guest's memory is encrypted by a key that is gone after the kexec",
                    "only guests whose memory the host can read can be carried over",
                )  # fmt: skip
    if option.name in ("drive", "blockdev"):
        if any(field.key == "snapshot" and field.on for field in fields):
            yield Obstacle(str(option), *_OPTIONS["snapshot"])
        for field in fields:
            if field.key in ("file", "filename", "file.filename") and field.value:
                yield from _of_disk(option, field.value, look)


def _of_disk(option: Option, name: str, look: FileSystem) -> Iterator[Obstacle]:
    path = name.removeprefix("file:")
    if ":" in path.partition("/")[0]:
        return  # a protocol: nbd:, rbd:, iscsi://, fat:
    kind = look(path)
    if kind in VOLATILE:
        yield Obstacle(
            str(option), f"{path} lies in memory ({kind}) and is gone after the kexec", "put it on a disk"
        )


def kind_of_place(path: str) -> str:
    """Return the type of the file system of a path, or the name of the block device that it is; empty where it is not known.

    (proc_pid_mountinfo(5); a file system without a device of its own in that file, as btrfs, is not known.)
    """
    try:
        facts = os.stat(path)
    except OSError:
        return ""
    if stat.S_ISBLK(facts.st_mode):
        number = f"{os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)}"
        name = os.path.basename(os.path.realpath(f"/sys/dev/block/{number}"))
        return "ramfs" if name.startswith(("ram", "zram")) else name
    number = f"{os.major(facts.st_dev)}:{os.minor(facts.st_dev)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        place, _, rest = line.partition(" - ")
        if place.split()[2] == number:
            return rest.split()[0]
    return ""
