# SPDX-License-Identifier: Apache-2.0
"""Request numbers and structs of /dev/liveupdate, from include/uapi/linux/liveupdate.h of Linux 7.3.

All numbers are `_IO(0xBA, nr)`, which is `0xBA00 | nr` on x86-64 and arm64, the only two architectures with kexec handover.
Every struct starts with a u32 `size`; there is no implicit padding, and integers are little-endian.
"""

from __future__ import annotations

import struct

CREATE_SESSION = 0xBA00
RETRIEVE_SESSION = 0xBA01
PRESERVE_FD = 0xBA40
RETRIEVE_FD = 0xBA41
FINISH = 0xBA42
GET_NAME = 0xBA43

OPERATIONS = {
    CREATE_SESSION: "CREATE_SESSION",
    RETRIEVE_SESSION: "RETRIEVE_SESSION",
    PRESERVE_FD: "PRESERVE_FD",
    RETRIEVE_FD: "RETRIEVE_FD",
    FINISH: "FINISH",
    GET_NAME: "GET_NAME",
}

NAME_LENGTH = 64
"""Bytes of a session name including its NUL: names are 1 to 63 bytes long."""

S_SESSION = struct.Struct("<Ii64s")
"""CREATE_SESSION and RETRIEVE_SESSION: size, fd (out), name (in)."""
S_FD = struct.Struct("<IiQ")
"""PRESERVE_FD and RETRIEVE_FD: size, fd (in, or out), token (in)."""
S_FINISH = struct.Struct("<II")
"""FINISH: size, reserved (must be 0)."""
S_NAME = struct.Struct("<II64s")
"""GET_NAME: size, reserved (must be 0), name (out)."""

FD_OFFSET = 4
"""Where the s32 `fd` stands in S_SESSION and S_FD."""

KEXEC_FILE_UNLOAD = 0x1
KEXEC_FILE_ON_CRASH = 0x2
KEXEC_FILE_NO_INITRAMFS = 0x4
KEXEC_FILE_DEBUG = 0x8
KEXEC_FILE_NO_CMA = 0x10
KEXEC_FILE_FORCE_DTB = 0x20
KEXEC_FILE_FLAGS = 0x3F

LUO_COMPATIBLE = "luo-v5"
KHO_COMPATIBLE = "kho-v4"
MEMFD_COMPATIBLE = "memfd-v2"


def pack_session(name: bytes) -> bytearray:
    """Build the argument of CREATE_SESSION or RETRIEVE_SESSION; a name over 64 bytes is cut, as the field is."""
    return bytearray(S_SESSION.pack(S_SESSION.size, -1, name))


def pack_fd(token: int, fd: int = -1) -> bytearray:
    """Build the argument of PRESERVE_FD or RETRIEVE_FD."""
    return bytearray(S_FD.pack(S_FD.size, fd, token))


def pack_finish(reserved: int = 0) -> bytearray:
    """Build the argument of FINISH."""
    return bytearray(S_FINISH.pack(S_FINISH.size, reserved))


def pack_name(reserved: int = 0) -> bytearray:
    """Build the argument of GET_NAME."""
    return bytearray(S_NAME.pack(S_NAME.size, reserved, b""))


def unpack_fd(buf: bytes | bytearray) -> int:
    """Read the `fd` that CREATE_SESSION, RETRIEVE_SESSION or RETRIEVE_FD wrote."""
    return int.from_bytes(buf[FD_OFFSET : FD_OFFSET + 4], "little", signed=True)


def unpack_name(buf: bytes | bytearray) -> bytes:
    """Read the name that GET_NAME wrote: everything up to the first NUL (what follows is the caller's own bytes)."""
    return bytes(buf[8 : 8 + NAME_LENGTH]).split(b"\0", 1)[0]
