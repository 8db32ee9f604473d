# SPDX-License-Identifier: Apache-2.0
"""What a saved guest consists of, and how its two parts are told to be whole and to belong together.

QEMU's format has no checksum. Of 40 single flipped bits in the device state QEMU 10.0.2 and 11.1.3 take 35, and both take the memory
of another guest of the same shape without a word. So both parts get a digest when they are saved, which is compared before QEMU is
shown them again.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from collections.abc import Mapping
from typing import Any

import msgspec

from .. import memfd
from .errors import ForeignRam, RamMismatch, StateCorrupt

PAGE = 4096
SAMPLES = 256
_CHUNK = 1 << 20


class RamBlocks(msgspec.Struct, frozen=True):
    """The memory blocks that a stream says the guest has: all of them, whether their pages are in the stream or not. In bytes."""

    total: int
    sizes: dict[str, int]


def make_vmstate() -> int:
    """Make an empty memfd for device state and return its fd. Each save needs a new one.

    It grows while QEMU writes, so it must not be preserved before.
    """
    return memfd.create("luod.vmstate", 0)


def digest(fd: int) -> str:
    """Return the sha256 of a whole file in hex, without moving its offset."""
    found = hashlib.sha256()
    offset = 0
    while data := os.pread(fd, _CHUNK, offset):
        found.update(data)
        offset += len(data)
    return found.hexdigest()


def sample(fd: int, trailer: int = 0) -> str:
    """Return the sha256 over 256 pages spread evenly over a memfd, the first and the last among them; over all of a small one.

    The last `trailer` bytes are left out. It takes a few milliseconds whatever the size. Holes stay holes.
    """
    pages = (os.fstat(fd).st_size - trailer) // PAGE
    chosen = range(pages) if pages <= SAMPLES else (i * (pages - 1) // (SAMPLES - 1) for i in range(SAMPLES))
    found = hashlib.sha256(str(pages).encode())
    for page in chosen:
        found.update(os.pread(fd, PAGE, page * PAGE))
    return found.hexdigest()


def fingerprints(ram: Mapping[str, int], trailer: int = 0) -> dict[str, dict[str, Any]]:
    """Return size and sample of each memory: what `require_own_ram` compares. The guest must be stopped."""
    return {
        name: {"size": os.fstat(fd).st_size - trailer, "sample": sample(fd, trailer)}
        for name, fd in ram.items()
    }


def require_own_ram(
    name: str, ram: Mapping[str, int], saved: Mapping[str, Mapping[str, Any]], trailer: int = 0
) -> None:
    """Raise `RamMismatch` or `ForeignRam` unless the memfds are those that were saved, unchanged."""
    if ram.keys() != saved.keys():
        raise RamMismatch(
            f"{name} has the memory {sorted(ram)}, and was saved with {sorted(saved)}",
            hint="give each memory backend the object id it had",
        )
    for block, fd in ram.items():
        size = os.fstat(fd).st_size - trailer
        if size != saved[block]["size"]:
            raise RamMismatch(
                f"{name}: memory {block} has {size} bytes, and was saved with {saved[block]['size']}",
                hint="a preserved memfd keeps its size, so this is another one",
            )
        if sample(fd, trailer) != saved[block]["sample"]:
            raise ForeignRam(
                f"{name}: memory {block} is not what it was when the guest was saved",
                hint="it is another guest's, or the guest has run since; do not start it: keep the memfds and look at `luoctl why`",
            )


def require_whole_vmstate(name: str, fd: int, size: int, sha256: str) -> None:
    """Raise `StateCorrupt` unless a file is the device state that was saved, to the last byte."""
    found = os.fstat(fd).st_size
    if found != size:
        raise StateCorrupt(
            f"{name}: the device state has {found} bytes, and was saved with {size}", hint=_KEEP
        )
    if digest(fd) != sha256:
        raise StateCorrupt(f"{name}: the device state is not what was saved: sha256 differs", hint=_KEEP)


_KEEP = "it cannot be used; the memory is intact: keep it, and start the guest anew from its disks"

# migration/savevm.c: a section begins with its type, number, name, instance and version; migration/ram.c, ram_save_setup: the total
# with a flag in its low bits, then for each block its name and size and, with x-ignore-shared, its address.
_RAM_SECTION = re.compile(rb"\x01.{4}\x03ram\0{4}\0\0\0\x04", re.DOTALL)
_MEM_SIZE_FLAG = 0x04
_HEAD = 4096


def ram_blocks(fd: int) -> RamBlocks | None:
    """Read from a stream saved with x-ignore-shared which memory blocks the guest has; None where it cannot be told."""
    head = os.pread(fd, _HEAD, 0)
    found = _RAM_SECTION.search(head)
    if found is None:
        return None
    sizes: dict[str, int] = {}
    at = found.end()
    try:
        (marked,) = struct.unpack_from(">Q", head, at)
        at += 8
        total = marked & ~(PAGE - 1)
        if marked & (PAGE - 1) != _MEM_SIZE_FLAG:
            return None
        while sum(sizes.values()) < total:
            end = at + 1 + head[at]
            name = head[at + 1 : end].decode()
            sizes[name], _ = struct.unpack_from(">QQ", head, end)
            at = end + 16
    except (struct.error, IndexError, UnicodeDecodeError):
        return None
    return RamBlocks(total, sizes) if sum(sizes.values()) == total else None
