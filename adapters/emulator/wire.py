# SPDX-License-Identifier: Apache-2.0
"""Messages between a process of the emulated world and its kernel.

A request is one SOCK_SEQPACKET message on the device or session socket: a header, the raw struct, and by SCM_RIGHTS the end of a
socketpair for the answer and, for PRESERVE_FD, the file. Each request brings its own answer socket, so two holders of one session
never see each other's answers. The answer is the errno, the struct to write back, and the new fd if there is one.
"""

from __future__ import annotations

import array
import os
import socket
import struct
from pathlib import Path

REQUEST = struct.Struct("<4sIII")
"""Magic, ioctl request, how many files are attached, length of the struct."""
REPLY = struct.Struct("<iI")
"""Errno (0: done), 1 if an fd is attached."""
MAGIC = b"luo1"
MAX_MESSAGE = 1 << 17

DEVICE_SOCKET = "liveupdate"
CONTROL_SOCKET = "control"

CREDENTIALS = struct.Struct("iII")
_INT = array.array("i").itemsize
MAX_RIGHTS = 128
"""How many descriptors a message may bring."""
_ANCILLARY = socket.CMSG_SPACE(CREDENTIALS.size) + socket.CMSG_SPACE(MAX_RIGHTS * _INT)


def connect(directory: Path, name: str, kind: socket.SocketKind) -> socket.socket:
    """Connect to a socket of an emulator directory, however long its path is (sun_path holds 107 bytes)."""
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sock.connect(f"/proc/self/fd/{handle}/{name}")
        finally:
            os.close(handle)
    except BaseException:
        sock.close()
        raise
    return sock


def listen(directory: Path, name: str, kind: socket.SocketKind) -> socket.socket:
    """Bind a listening, non-blocking socket of mode 0600 in an emulator directory, in place of any old one."""
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        (directory / name).unlink(missing_ok=True)
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(f"/proc/self/fd/{handle}/{name}")
        sock.listen(512)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(handle)
    return sock


def send_with_fds(sock: socket.socket, data: bytes, fds: list[int], flags: int = 0) -> None:
    """Send one message with fds."""
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], rights, flags | socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, flags: int = 0) -> tuple[bytes, list[int], int]:
    """Receive one message: data, fds (close-on-exec), and the pid of the sender where SO_PASSCRED is set (else 0)."""
    data, ancillary, _, _ = sock.recvmsg(MAX_MESSAGE, _ANCILLARY, flags | socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    pid = 0
    for level, kind, payload in ancillary:
        if level != socket.SOL_SOCKET:
            continue
        if kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT])
        elif kind == socket.SCM_CREDENTIALS:
            pid = CREDENTIALS.unpack_from(payload)[0]
    return data, list(fds), pid


def peer_pid(sock: socket.socket) -> int:
    """Return the pid of the process that connected."""
    return int(
        CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))[0]
    )


def peer_uid(sock: socket.socket) -> int:
    """Return the uid of the process that connected."""
    return int(
        CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))[1]
    )
