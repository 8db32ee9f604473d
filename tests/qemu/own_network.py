# SPDX-License-Identifier: Apache-2.0
"""A network namespace of the test's own with a tap device in it, for guests whose network card is on a bridge of their host."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB  # include/uapi/linux/if_tun.h
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
SIOCSIFFLAGS, SIOCSIFADDR, SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # include/uapi/linux/sockios.h
IFF_UP, IFF_RUNNING = 0x1, 0x40


@contextmanager
def own_network(tap: str, address: str, netmask: str = "255.255.255.0") -> Iterator[None]:
    """Let this thread, and what it starts, have a network with nothing but a tap device. Raises OSError without the privilege."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare(CLONE_NEWNET)")
        try:
            _tap(tap)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                for request, text in ((SIOCSIFADDR, address), (SIOCSIFNETMASK, netmask)):
                    inet = struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(text))
                    fcntl.ioctl(sock, request, struct.pack("16s16s8x", tap.encode(), inet))
                fcntl.ioctl(sock, SIOCSIFFLAGS, struct.pack("16sh22x", tap.encode(), IFF_UP | IFF_RUNNING))
            yield
        finally:
            assert libc.setns(before, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(before)


def _tap(name: str) -> None:
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        fcntl.ioctl(tun, TUNSETPERSIST, 1)
    finally:
        os.close(tun)
