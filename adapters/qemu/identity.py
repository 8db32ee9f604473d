# SPDX-License-Identifier: Apache-2.0
"""Whose memory a memfd is: a page behind the guest's RAM that QEMU never touches.

    memfd of RAM   [ the guest's RAM ............................ | trailer ]
                                                                    uuid, id, generation, digest of the record

A memfd that comes through a kexec has no name, and QEMU takes the memory of any other guest of the same size. So each memfd is one page
longer than the RAM in it. QEMU maps only what `size=` says, and truncates nothing. The page is written when the memfd is made and again at
every freeze: a preserved memfd keeps its size, but can be written until the last instruction.
"""

from __future__ import annotations

import hashlib
import os
import struct
import uuid

import msgspec

from .. import memfd
from .errors import ForeignRam, RamMismatch

TRAILER = 4096
"""How many bytes a memfd is longer than the RAM in it."""
_PAGE = struct.Struct("<8s16sQ64s32s")
_MAGIC = b"LUODRAM1"
NO_RECORD = bytes(32)
"""The digest of the record in a trailer that was not written by a freeze."""


class Trailer(msgspec.Struct, frozen=True):
    """What the page says: whose memory it is, which piece of it, and with which record it was frozen.

    `generation` is 0 before the first freeze, `record` the sha256 of the record that was written with it.
    """

    uuid: str
    ram: str
    generation: int = 0
    record: bytes = NO_RECORD


def make_ram(trailer: Trailer, size: int) -> int:
    """Make a memfd for `size` bytes of RAM with its trailer and return its fd. Its size is sealed. Raises `MemfdError`."""
    fd = memfd.create(f"luod.{trailer.ram}", size + TRAILER)
    try:
        write_trailer(fd, trailer)
        memfd.seal_for_preservation(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def write_trailer(fd: int, trailer: Trailer) -> None:
    """Write the last page of a memfd."""
    name = trailer.ram.encode()
    page = _PAGE.pack(_MAGIC, uuid.UUID(trailer.uuid).bytes, trailer.generation, name, trailer.record)
    os.pwrite(fd, page + hashlib.sha256(page).digest(), os.fstat(fd).st_size - TRAILER)


def read_trailer(fd: int) -> Trailer:
    """Read the last page of a memfd.

    Raises `RamMismatch` when the memfd has none, `ForeignRam` when it is damaged: what is beside it cannot be trusted then.
    """
    size = os.fstat(fd).st_size
    data = os.pread(fd, _PAGE.size + 32, size - TRAILER) if size >= TRAILER else b""
    page, digest = data[: _PAGE.size], data[_PAGE.size :]
    if not page.startswith(_MAGIC):
        raise RamMismatch(
            f"a memfd of {size} bytes has no mark of luo-qemu at its end",
            hint="it is not a guest's RAM, or not all of it",
        )
    if hashlib.sha256(page).digest() != digest:
        raise ForeignRam(
            f"the mark at the end of a memfd of {size} bytes is damaged",
            hint="do not start the guest: its RAM cannot be told from another's",
        )
    _, guest, generation, name, record = _PAGE.unpack(page)
    return Trailer(str(uuid.UUID(bytes=guest)), name.rstrip(b"\0").decode(), generation, record)
