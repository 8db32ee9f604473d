# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of a connection: credentials, a pidfd, and the role that follows from the uid.

A pid number is never trusted for anything but a message: whether the process lives is asked of its pidfd, which SO_PEERPIDFD gives
for the very process that connected (unix(7), Linux 6.5; before it pidfd_open(2) right after connecting).
"""

from __future__ import annotations

import os
import select
import socket
import struct

import anyio

from ..states.events import Owner

SO_PEERPIDFD = 77
_UCRED = struct.Struct("3i")


class Peer:
    """The process that connected. Owns its pidfd."""

    def __init__(self, pid: int, uid: int, gid: int, pidfd: int) -> None:
        self.pid = pid
        self.uid = uid
        self.gid = gid
        self.pidfd = pidfd

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Read the credentials of a connected Unix socket."""
        pid, uid, gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
        try:
            pidfd = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
            os.set_inheritable(pidfd, False)
        except OSError:
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                pidfd = -1
        return cls(pid, uid, gid, pidfd)

    def alive(self) -> bool:
        """Say whether the process still runs; one that cannot be watched counts as running."""
        if self.pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def same_process(self, other: Peer) -> bool:
        """Say whether both are one process: same pid, and the other has not died meanwhile."""
        return self.pid == other.pid and other.alive()

    def owner(self) -> Owner:
        """Return what the journal keeps of it."""
        try:
            with open(f"/proc/{self.pid}/cgroup", encoding="utf-8", errors="replace") as file:
                cgroup = file.readline().rpartition(":")[2].strip()
        except OSError:
            cgroup = ""
        return Owner(self.uid, self.gid, self.pid, cgroup[:256])

    def close(self) -> None:
        """Let go of the pidfd."""
        if self.pidfd >= 0:
            anyio.notify_closing(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1


def pid_alive(pid: int) -> bool:
    """Say whether a process of this pid runs; for owners that a restarted luod only knows by number."""
    try:
        os.close(os.pidfd_open(pid))
    except OSError:
        return False
    return True
