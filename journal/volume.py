# SPDX-License-Identifier: Apache-2.0
"""Refuses to keep a journal where it would not survive.

The magic numbers are those of statfs(2) and include/uapi/linux/magic.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from .errors import JournalMissing, JournalVolatile

_FORGETS = "is lost at a reboot"
_LAYER = "is a layer whose upper part may be thrown away with its container"
_REMOTE = "is remote: its locks and its fsync depend on another machine"
_USER = "is served by a process, which the reboot ends"

UNSUITABLE: dict[int, tuple[str, str]] = {
    0x01021994: ("tmpfs", _FORGETS),
    0x858458F6: ("ramfs", _FORGETS),
    0x958458F6: ("hugetlbfs", _FORGETS),
    0x794C7630: ("overlay", _LAYER),
    0x61756673: ("aufs", _LAYER),
    0x6969: ("nfs", _REMOTE),
    0xFF534D42: ("cifs", _REMOTE),
    0xFE534D42: ("smb2", _REMOTE),
    0x517B: ("smb", _REMOTE),
    0x00C36400: ("ceph", _REMOTE),
    0x5346414F: ("afs", _REMOTE),
    0x73757245: ("coda", _REMOTE),
    0x01021997: ("9p", _REMOTE),
    0x65735546: ("fuse", _USER),
}
"""File systems that cannot hold a journal: magic -> name, why."""


class _StatFs(ctypes.Structure):
    # f_type is the first word; the rest of struct statfs is at most 240 bytes on any architecture.
    _fields_ = (("f_type", ctypes.c_long), ("rest", ctypes.c_char * 248))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.statfs.argtypes = [ctypes.c_char_p, ctypes.POINTER(_StatFs)]


def magic(path: Path) -> int:
    """Return the magic number of the file system that holds `path`; raises OSError."""
    answer = _StatFs()
    if _libc.statfs(os.fsencode(path), ctypes.byref(answer)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return int(answer.f_type) & 0xFFFFFFFF


def check(directory: Path, *, volatile: bool = False) -> None:
    """Make sure that a journal in `directory` would survive a reboot.

    Raises `JournalMissing` when there is no such directory and `JournalVolatile` for an unsuitable file system, unless `volatile`.
    """
    try:
        found = magic(directory)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "?")
        raise JournalMissing(
            f"cannot keep a journal in {directory}: {error.strerror} ({name})",
            hint="make the directory first, owned by the user that runs luod",
        ) from None
    if not volatile and found in UNSUITABLE:
        name, why = UNSUITABLE[found]
        raise JournalVolatile(
            f"{directory} is on {name}, which {why}",
            hint="put the journal on a local disk, or allow a volatile journal for a trial",
        )
