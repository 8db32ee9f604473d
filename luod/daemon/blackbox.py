# SPDX-License-Identifier: Apache-2.0
"""The black box: the newest part of the journal in a memfd that the kernel carries over the kexec.

The disk is the authority. The black box is its second copy for the case that the disk comes back without its last writes, or not at
all: in the new kernel its records are checked against the chain on disk; a longer chain that continues it is taken over, one that
contradicts it stops luod.
"""

from __future__ import annotations

import mmap
import os
from typing import Literal

from ..adapters.liveupdate.errors import (
    AlreadyRetrieved,
    DeviceAbsent,
    DeviceBroken,
    DeviceDisabled,
    KernelError,
    SessionUnknown,
    TokenUnknown,
)
from ..engine.ports import Custody, Kernel
from ..engine.reconcile import Held as HeldAnswer
from ..journal.errors import RingError
from ..journal.record import Record
from ..journal.ring import Ring
from ..journal.writer import Journal
from ..states.names import BLACK_BOX_SESSION, BLACK_BOX_TOKEN
from .effects import RING, Held

BoxNews = Literal["merged", "equal", "absent", "consumed", "unreadable"]


class BlackBox:
    """Mirrors a journal into the ring of this boot."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._map: mmap.mmap | None = None
        self._ring: Ring | None = None

    def open(self, held: Held) -> None:
        """Start mirroring into the ring that luod holds; harmless when it does so already."""
        if self._ring is not None:
            return
        self._map = map_of(held.get(RING))
        tail = list(self._journal.read())[-RING_TAIL:]
        before = tail[0].id - 1 if tail else self._journal.head()[0]
        chain = self._journal.chain_at(before)
        assert chain is not None, "the journal has every record before its head"
        self._ring = Ring.format(self._map, self._journal.journal_id, (before, chain))
        self._ring.append(tail)
        self._journal.set_mirror(self._ring.append)

    def close(self) -> None:
        """Stop mirroring."""
        self._journal.set_mirror(None)
        if self._ring is not None:
            self._ring.release()
            self._ring = None
        if self._map is not None:
            self._map.close()
            self._map = None


RING_TAIL = 2000
"""How many of the newest records are written into a fresh ring; what does not fit falls off its old end."""


def map_of(fd: int) -> mmap.mmap:
    """Map a whole memfd, shared."""
    return mmap.mmap(fd, os.fstat(fd).st_size, mmap.MAP_SHARED)


def look(kernel: Kernel, custody: Custody, held: Held) -> tuple[HeldAnswer, BoxNews, list[Record], str]:
    """Look for the black box of the last boot, once per boot, before anything is written.

    Returns whether a live update into this boot is certain (`yes`), certainly not so (`no`) or unknown; what became of the box; its
    records; and the reason in words. Retrieving it is safe to repeat: the second holder keeps it at once.
    """
    try:
        fd = custody.retrieve(BLACK_BOX_SESSION)
    except SessionUnknown:
        return "no", "absent", [], "the kernel holds no session of luod: this boot is not a live update"
    except (DeviceAbsent, DeviceDisabled) as error:
        return "no", "absent", [], f"this kernel cannot hand anything over: {error.message}"
    except DeviceBroken as error:
        return "no", "unreadable", [], f"this kernel could not take over what was preserved: {error.message}"
    except AlreadyRetrieved:
        return "unknown", "consumed", [], "the black box was retrieved by somebody else in this boot"
    except KernelError as error:
        return "unknown", "unreadable", [], error.message
    held.put(BLACK_BOX_SESSION, fd)
    try:
        ring = kernel.retrieve_fd(fd, BLACK_BOX_TOKEN)
    except TokenUnknown:
        return "yes", "consumed", [], "the black box was finished before it could be read"
    except KernelError as error:
        return "yes", "unreadable", [], error.message
    try:
        with map_of(ring) as mapped:
            box = Ring.attach(mapped)
            try:
                records = box.read()
            finally:
                box.release()
    except (RingError, ValueError, OSError) as error:
        return "yes", "unreadable", [], f"the black box cannot be read: {error}"
    finally:
        os.close(ring)
    return "yes", "equal", records, ""
