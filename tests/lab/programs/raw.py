# SPDX-License-Identifier: Apache-2.0
"""Raw calls on /dev/liveupdate for programs that state what the kernel does, with nothing of luod's behaviour in between."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import traceback
from collections.abc import Callable, Iterator

from luod.adapters.liveupdate import abi
from luod.lab.report import emit

PAGE = 4096


def device() -> int:
    return os.open("/dev/liveupdate", os.O_RDWR | os.O_CLOEXEC)


def _device_call(request: int, name: str) -> int:
    fd = device()
    try:
        buf = abi.pack_session(name.encode())
        fcntl.ioctl(fd, request, buf, True)
        return abi.unpack_fd(buf)
    finally:
        os.close(fd)


def create(name: str) -> int:
    return _device_call(abi.CREATE_SESSION, name)


def retrieve(name: str) -> int:
    return _device_call(abi.RETRIEVE_SESSION, name)


def preserve(session: int, token: int, fd: int) -> None:
    fcntl.ioctl(session, abi.PRESERVE_FD, abi.pack_fd(token, fd), True)


def retrieve_fd(session: int, token: int) -> int:
    buf = abi.pack_fd(token)
    fcntl.ioctl(session, abi.RETRIEVE_FD, buf, True)
    return abi.unpack_fd(buf)


def finish(session: int) -> None:
    fcntl.ioctl(session, abi.FINISH, abi.pack_finish(), True)


def memfd(content: bytes, size: int = 0, flags: int = 0) -> int:
    """Make a memfd with this content; by default it may be executed and sealed, as luod makes them."""
    fd = os.memfd_create("lab", os.MFD_CLOEXEC | (flags or os.MFD_ALLOW_SEALING | 0x10))
    os.ftruncate(fd, max(size, len(content)))
    os.pwrite(fd, content, 0)
    return fd


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    """Expect a call to fail with this errno."""
    told = 0
    try:
        yield
    except OSError as error:
        told = error.errno or 0
    assert told == code, f"expected {errno_name(code)}, got {errno_name(told) if told else 'success'}"


def errno_name(code: int) -> str:
    return errno.errorcode.get(code, str(code))


Case = Callable[[], None]


def run_cases(cases: list[Case]) -> bool:
    """Run each case and report it as a result line of its own; True when all held."""
    good = True
    for case in cases:
        try:
            case()
        except Exception:
            good = False
            emit("case", name=case.__name__, ok=False, message=traceback.format_exc())
        else:
            emit("case", name=case.__name__, ok=True)
    return good
