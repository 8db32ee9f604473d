# SPDX-License-Identifier: Apache-2.0
"""What the tests of the keeper share: a kernel with a gate, a keeper served by a thread, and raw ways to talk to it."""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any, cast

from luod.adapters.keeper.client import Keeper as Client
from luod.adapters.keeper.server import Keeper
from luod.engine.ports import Kernel

PATIENCE_S = 20.0


class GatedKernel:
    """Makes sessions that are memfds; a call waits at the gate while it is shut, and fails with `error` if that is set."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None

    def boot_id(self) -> str:
        return "11111111-2222-4333-8444-555555555555"

    def _session(self, operation: str, name: str) -> int:
        self.calls.append((operation, name))
        self.entered.set()
        assert self.gate.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return os.memfd_create(name)

    def create_session(self, name: str) -> int:
        return self._session("create", name)

    def retrieve_session(self, name: str) -> int:
        return self._session("retrieve", name)


class Rig:
    """A keeper in a thread; leaving it stops the keeper and closes what it holds."""

    def __init__(self, directory: Path, *, limit: int = 64, kind: type[Keeper] = Keeper) -> None:
        self.dir = directory
        self.kernel = GatedKernel()
        self.keeper = kind(directory, cast(Kernel, self.kernel), limit=limit)
        self.client = Client(directory, timeout=PATIENCE_S)
        self.fault: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.keeper.serve()
        except BaseException as error:
            self.fault.append(error)

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        self.kernel.gate.set()
        self.keeper.stop()
        self._thread.join()
        self.keeper.close()
        assert not self.fault, self.fault

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.settimeout(PATIENCE_S)
        sock.connect(str(self.dir / "keeper.sock"))
        return sock

    def ask_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> dict[str, Any] | None:
        """Send bytes as a request and return the answer, None if the keeper hangs up."""
        with self.connect() as sock:
            sock.sendmsg([data], rights(fds))
            answer = sock.recv(65536)
        return cast("dict[str, Any]", json.loads(answer)) if answer else None

    def notify(self, *lines: str, fds: tuple[int, ...] = ()) -> None:
        """Send a datagram as sd_pid_notify_with_fds(3) does."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(str(self.dir / "keeper.notify"))
            sock.sendmsg(["\n".join(lines).encode()], rights(fds))

    def barrier(self) -> None:
        """Return when the keeper has processed every datagram sent before."""
        read, write = os.pipe()
        try:
            self.notify("BARRIER=1", fds=(write,))
        finally:
            os.close(write)
        with open(read, "rb") as pipe:
            assert pipe.read() == b""

    def same(self, name: str, fd: int) -> bool:
        """Say whether the newest fd held under a name is of the same file as `fd`."""
        held = self.client.get(name)
        if held is None:
            return False
        with closing(held):
            return os.fstat(held).st_ino == os.fstat(fd).st_ino

    def copies(self, fd: int) -> int:
        """Count the descriptors of one file here and in the keeper, which is this process too."""
        self.client.boot_id()  # one thread serves: what was asked before is done
        wanted, found = os.fstat(fd).st_ino, 0
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found += os.fstat(int(name)).st_ino == wanted
        return found


def rights(fds: tuple[int, ...]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []


@contextlib.contextmanager
def closing(*fds: int) -> Any:
    """Close fds at the end of the block."""
    try:
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
