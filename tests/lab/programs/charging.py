# SPDX-License-Identifier: Apache-2.0
"""Whose cgroup is charged for memory that came over: `make`, then `take` in the next kernel.

`take` runs as the agent, in a cgroup of its own. It retrieves two sessions; one it hands to a client process in another cgroup, which
retrieves the memory by itself; the memory of the other it retrieves for the client. Both cgroups are read before and after.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

from raw import create, finish, memfd, preserve, retrieve, retrieve_fd

from luod.lab.report import emit, ready

CGROUPS = Path("/sys/fs/cgroup")
MIB = 1 << 20
SIZE = 48 * MIB


def charged(group: str) -> int:
    return int((CGROUPS / group / "memory.current").read_text())


def client(link: socket.socket) -> None:
    """Be the client: take the session fd and retrieve the memory in the client's cgroup."""
    (CGROUPS / "client/cgroup.procs").write_text("0")
    _, fds, _, _ = socket.recv_fds(link, 16, 1)
    fd = retrieve_fd(fds[0], 1)
    finish(fds[0])
    assert os.pread(fd, 1, SIZE - 1) == b"c"
    link.send(b"done")
    link.recv(1)


def main() -> int:
    if sys.argv[1] == "make":
        for name in ("by-client", "by-agent"):
            preserve(create(name), 1, memfd(b"c" * SIZE))
        ready()
        signal.pause()
    (CGROUPS / "client").mkdir()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        ours.close()
        client(theirs)
        return 0
    theirs.close()
    session = retrieve("by-client")
    before = {group: charged(group) for group in ("agent", "client")}
    socket.send_fds(ours, [b"session"], [session])
    assert ours.recv(16) == b"done"
    emit("charged", who="client", **{group: charged(group) - before[group] for group in before})
    other = retrieve("by-agent")
    before = {group: charged(group) for group in before}
    fd = retrieve_fd(other, 1)
    emit("charged", who="agent", **{group: charged(group) - before[group] for group in before})
    os.close(fd)
    ours.close()
    os.waitpid(pid, 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
