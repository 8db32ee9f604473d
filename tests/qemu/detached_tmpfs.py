# SPDX-License-Identifier: Apache-2.0
"""A file on a file system of its own that is mounted nowhere and soon full (fsopen(2), fsmount(2))."""

from __future__ import annotations

import ctypes
import os

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return result


def limited_file(size: int) -> int:
    """Return the fd of an empty file that takes `size` bytes at most. PermissionError without CAP_SYS_ADMIN."""
    fs = _call(SYS_FSOPEN, b"tmpfs", 1)
    try:
        _call(SYS_FSCONFIG, fs, FSCONFIG_SET_STRING, b"size", str(size).encode(), 0)
        _call(SYS_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _call(SYS_FSMOUNT, fs, 1, 0)
    finally:
        os.close(fs)
    try:
        return os.open("vmstate", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
