# SPDX-License-Identifier: Apache-2.0
"""The record of a saved guest: what the next kernel must know to start it again, in a memfd preserved beside its RAM.

The memfd has a fixed size and is preserved while the guest still runs; it is written when the guest is frozen. The journal knows the same,
but it is on a disk and may be another host's; the record comes with the memory that it describes.
"""

from __future__ import annotations

import hashlib
import os
import struct

import msgspec

from .. import memfd
from .arguments import Adapted, Hardware, Ram
from .errors import ConfigMismatch, StateCorrupt
from .portrait import Portrait
from .probe import versioned

RECORD_BYTES = 65536
"""The size of the memfd."""
SCHEMA = 1
_HEAD = struct.Struct("<8sI32s")
_MAGIC = b"LUODGST1"


class RecordDamaged(StateCorrupt):
    """The record is not what was written."""


class SavedRam(msgspec.Struct, frozen=True):
    """One piece of RAM: its token in the session, its id, its size in bytes without the trailer, and the digest of sampled pages.

    `extra` is what its user wanted of the backend besides, such as NUMA nodes.
    """

    token: str
    id: str
    size: int
    sample: str
    extra: tuple[str, ...] = ()


class SavedState(msgspec.Struct, frozen=True):
    """The device state: its token in the session, its length in bytes and its sha256."""

    token: str
    length: int
    sha256: str


class Record(msgspec.Struct, frozen=True):
    """Everything about a saved guest.

    `uuid` names the guest for as long as its RAM lives, `generation` counts its freezes. `binary` and `qemu` (a version) are what it was
    saved with; `words` its command line with `@LUOD:ID@` where RAM goes. `cpu_features` are what a CPU model of the host's own (`host`,
    `max`) meant, empty for others. `portrait` is the machine as QEMU described it. `runstate` is what it did before the freeze.
    """

    name: str
    uuid: str
    generation: int
    binary: str
    qemu: str
    words: tuple[str, ...]
    hardware: Hardware
    cpu_features: tuple[str, ...]
    portrait: Portrait
    ram: tuple[SavedRam, ...]
    vmstate: SavedState
    runstate: str
    schema: int = SCHEMA

    def command(self) -> Adapted:
        """Return the command line that it was saved with."""
        ram = tuple(Ram(one.id, one.size, one.extra) for one in self.ram)
        return Adapted(self.binary, self.words, ram, self.hardware, paused=False)


def make_memfd() -> int:
    """Make the memfd for a record, still without one, and return its fd. Raises `MemfdError`."""
    fd = memfd.create("luod.record", RECORD_BYTES)
    try:
        os.pwrite(fd, _HEAD.pack(_MAGIC, 0, bytes(32)), 0)
        memfd.seal_for_preservation(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_memfd(fd: int) -> bool:
    """Say whether an fd is a memfd for a record, with or without one."""
    return os.fstat(fd).st_size == RECORD_BYTES and os.pread(fd, len(_MAGIC), 0) == _MAGIC


def write(fd: int, record: Record) -> bytes:
    """Write a record into its memfd; return its digest (sha256), which goes into the trailers of the RAM.

    Raises `ConfigMismatch` for a machine type without a version, which must not get into a record, and for a command line too long for it.
    """
    if not versioned(record.hardware.machine):
        raise ConfigMismatch(
            f"{record.name}: machine type {record.hardware.machine!r} has no version",
            hint="the next QEMU might build another machine; start the guest with a versioned type",
        )
    text = msgspec.json.encode(record)
    if len(text) > RECORD_BYTES - _HEAD.size:
        raise ConfigMismatch(
            f"{record.name}: its command line is too long for a record: {len(text)} bytes of {RECORD_BYTES}",
            hint="shorten it",
        )
    digest = hashlib.sha256(text).digest()
    page = _HEAD.pack(_MAGIC, len(text), digest) + text
    os.pwrite(fd, page.ljust(RECORD_BYTES, b"\0"), 0)
    return digest


def read(fd: int) -> tuple[Record, bytes]:
    """Read a record from its memfd; return it and its digest.

    Raises `RecordDamaged`, and `ConfigMismatch` for the record of a later luod.
    """
    data = os.pread(fd, RECORD_BYTES, 0)
    if len(data) < RECORD_BYTES or not data.startswith(_MAGIC):
        raise RecordDamaged(f"a memfd of {len(data)} bytes is no record of a guest", hint=_KEEP)
    _, length, digest = _HEAD.unpack_from(data)
    text = data[_HEAD.size : _HEAD.size + length]
    if hashlib.sha256(text).digest() != digest:
        raise RecordDamaged("the record of the guest is damaged: its sha256 differs", hint=_KEEP)
    schema = msgspec.json.decode(text, type=dict[str, object]).get("schema")
    if schema != SCHEMA:
        raise ConfigMismatch(
            f"the record of the guest has schema {schema}, this luod knows {SCHEMA}",
            hint="restore it with the luod that saved it, or a later one",
        )
    try:
        return msgspec.json.decode(text, type=Record), digest
    except msgspec.ValidationError as error:
        raise RecordDamaged(f"the record of the guest cannot be understood: {error}", hint=_KEEP) from None


_KEEP = "without it the guest cannot be started again; its RAM is kept: see the docs on failed sessions"
