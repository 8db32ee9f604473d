# SPDX-License-Identifier: Apache-2.0
"""Calls on the device files of the emulated machine, as messages, and which descriptor stands for which open file.

To open one, a process sends its path to D/devices and gets one end of a socketpair back, or an errno. A call on that end is a message
like that of an ioctl on a session (see `wire`), whose body is a `CallRequest`. The files that the argument names are attached in the
order of their offsets; the answer's body is a `CallReply`.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable
from typing import Literal

import msgspec

from .handlers import File, Refused
from .memfd_files import Descriptor
from .open_file import DeviceCall, OpenFile, Reference

DEVICES_SOCKET = "devices"


class CallRequest(msgspec.Struct, frozen=True, array_like=True):
    """A call: `argument` is the struct of an ioctl or the data of a write; `fds` are offsets of words that name attached files."""

    op: Literal["ioctl", "pread", "pwrite"]
    request: int = 0
    argument: bytes = b""
    fds: list[int] = []
    pointers: dict[int, bytes] = {}
    offset: int = 0
    length: int = 0


class CallReply(msgspec.Struct, frozen=True, array_like=True):
    """What the call returned, and what it wrote to its argument and behind its pointers."""

    result: int = 0
    argument: bytes = b""
    pointers: dict[int, bytes] = {}


_decode = msgspec.msgpack.Decoder(CallRequest).decode
encode = msgspec.msgpack.Encoder().encode


def request_of(body: bytes, attached: int) -> CallRequest | None:
    """Read a call; None for what is none."""
    try:
        call = _decode(body)
    except msgspec.MsgspecError:
        return None
    return call if len(call.fds) == attached else None


def run(opened: OpenFile, request: CallRequest, files: dict[int, File]) -> tuple[int, CallReply]:
    """Make the call and return its errno and what it wrote. Files that nobody keeps are closed."""
    call = DeviceCall(
        request.request,
        bytearray(request.argument),
        files,
        {offset: bytearray(memory) for offset, memory in request.pointers.items()},
    )
    code, result = 0, 0
    try:
        if request.op == "pread":
            return 0, CallReply(argument=opened.pread(request.length, request.offset))
        if request.op == "pwrite":
            return 0, CallReply(opened.pwrite(request.argument, request.offset))
        result = opened.ioctl(call)
    except Refused as refusal:
        code = refusal.code
    finally:
        for file in call.files.values():
            file.close()
        call.files.clear()
    pointers = {offset: bytes(memory) for offset, memory in call.pointers.items()}
    return code, CallReply(result, bytes(call.argument), pointers)


class OpenFiles:
    """Which descriptor is a reference on which open device file: known by the inode of its user's end."""

    def __init__(self, add_channel: Callable[[socket.socket, OpenFile], None]) -> None:
        self._add_channel = add_channel
        self._by_inode: dict[int, OpenFile] = {}

    def publish(self, opened: OpenFile) -> Reference:
        """Make an open file reachable; the reference is the first, and the file ends with the last."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._by_inode[os.fstat(theirs.fileno()).st_ino] = opened
        self._add_channel(ours, opened)
        return Reference(opened, theirs.detach())

    def forget(self, opened: OpenFile) -> None:
        """The last reference is gone."""
        self._by_inode = {inode: other for inode, other in self._by_inode.items() if other is not opened}

    def file(self, fd: int) -> File | None:
        """Return what a descriptor that came with a call is; None for one opened with O_PATH, which counts as not open."""
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
            os.close(fd)
            return None
        facts = os.fstat(fd)
        opened = self._by_inode.get(facts.st_ino) if stat.S_ISSOCK(facts.st_mode) else None
        return Descriptor(fd) if opened is None else Reference(opened, fd)
