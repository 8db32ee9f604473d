# SPDX-License-Identifier: Apache-2.0
"""The demo's client: memory with a pattern, carried over a kexec through luod, and compared byte by byte.

It behaves as a good client must: it comes back when luod was restarted, says the same thing again when it does not know whether it was
heard, lets go when told to abort, and finishes only what it has checked.
"""

from __future__ import annotations

import json
import mmap
import os
import time
from pathlib import Path

from ..adapters import memfd
from ..adapters.kernel import Backend, open_kernel
from ..adapters.liveupdate.errors import TokenExists
from ..client import Client, ClientError, ConnectionLost
from ..engine.ports import Kernel
from . import pattern

PATIENCE_S = 60.0
TOKENS = (0x10, 0x11)


class DemoClient:
    """One client process. Reports JSON lines on `pipe`."""

    def __init__(self, name: str, socket_path: Path, kernel: Kernel, size: int, pipe: int) -> None:
        self.name = name
        self.kernel = kernel
        self.pipe = pipe
        self.sizes = (size // 2, size - size // 2)
        self.session = ""
        self.session_fd = -1
        self._undone = False
        self._path = socket_path
        self.link = self._connect()

    def report(self, at: str, **more: object) -> None:
        """Tell the harness where this client is."""
        os.write(self.pipe, json.dumps({"at": at, **more}).encode() + b"\n")

    def _connect(self) -> Client:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            link = Client.connect(self._path, timeout=PATIENCE_S, retry_until=deadline)
            try:
                link.hello(["freeze", "inventory", "progress"])
            except ConnectionLost:
                link.close()
                if time.monotonic() > deadline:
                    raise
                continue
            return link

    def _seed(self, index: int) -> str:
        return f"{self.name}/{index}"

    # -- the old kernel

    def first_boot(self) -> int:
        """Take part in the update; return after an abort. The kexec ends this process."""
        memory: list[tuple[int, mmap.mmap]] = []
        sums: list[str] = []
        for index, size in enumerate(self.sizes):
            fd = memfd.create(f"ram{index}", size)
            mapped = mmap.mmap(fd, size, mmap.MAP_SHARED)
            sums.append(pattern.fill(mapped, self._seed(index)))
            memory.append((fd, mapped))
        resources: list[dict[str, object]] = [
            {
                "token": f"{token:#x}", "kind": "memfd", "size": size, "label": f"ram{index}", "checksum": sums[index],
                "plan": [{"step": "retrieve"}, {"step": "verify"}],
            }
            for index, (token, size) in enumerate(zip(TOKENS, self.sizes, strict=True))
        ]  # fmt: skip
        while True:
            try:
                self._serve(memory, resources)
                break
            except ConnectionLost:
                self.link.close()
                self.link = self._connect()
        verified = sum(pattern.verify(mapped, self._seed(index)) for index, (_, mapped) in enumerate(memory))
        self.report("aborted", bytes=verified)
        return 0

    def _serve(self, memory: list[tuple[int, mmap.mmap]], resources: list[dict[str, object]]) -> None:
        if self._undone:
            return  # luod died between its ABORT and our answer; whoever comes next finds the session closed
        session = str(self.link.subscribe(self.name)["session"])
        if self.session not in ("", session):
            self._hold(
                -1
            )  # while nobody was there to say ABORT our session was undone, and this is another attempt
            return
        self.session = session
        self.report("subscribed")
        while True:
            event = self.link.next_event(PATIENCE_S)
            match event.name:
                case "START_PRESERVATION":
                    self._hold(event.fds.pop(0))
                    for token, (fd, _) in zip(TOKENS, memory, strict=True):
                        try:
                            self.kernel.preserve_fd(self.session_fd, token, fd)
                        except TokenExists:
                            continue
                    self.link.preserved(self.name, resources)
                    self.report("preserved")
                case "FREEZE":
                    self.link.ready(self.name)
                    self.report("ready")
                case "ABORT":
                    self._undone = True
                    self._hold(-1)
                    self.link.aborted(self.name)
                    return
                case _:
                    continue

    def _hold(self, fd: int) -> None:
        if self.session_fd >= 0:
            os.close(self.session_fd)
        self.session_fd = fd

    # -- the new kernel

    def second_boot(self) -> int:
        """Claim, retrieve, compare every byte, finish."""
        verified = self._claim_and_verify()
        while True:
            try:
                self.link.finished(self.name)
                break
            except ConnectionLost:
                self.link.close()
                self.link = self._connect()
                try:
                    claimed = self.link.claim(self.name)
                except ClientError as error:
                    if error.code == "ENDED":
                        break
                    raise
                except ConnectionLost:
                    continue
                os.close(claimed.fds.pop(0))
        self._hold(-1)
        self.link.close()
        self.report("finished", bytes=verified)
        return 0

    def _claim_and_verify(self) -> int:
        while True:
            try:
                claimed = self.link.claim(self.name)
                self._hold(claimed.fds.pop(0))
                verified = 0
                for index, (token, size) in enumerate(zip(TOKENS, self.sizes, strict=True)):
                    verified += self._restore(index, token, size)
                self.report("verified", bytes=verified)
                self.kernel.finish(self.session_fd)
                return verified
            except ConnectionLost:
                self.link.close()
                self.link = self._connect()

    def _restore(self, index: int, token: int, size: int) -> int:
        text = f"{token:#x}"
        fd = self.kernel.retrieve_fd(self.session_fd, token)
        try:
            self.link.restored(self.name, text, "retrieve", ok=True)
            with mmap.mmap(fd, size, mmap.MAP_SHARED) as mapped:
                right = pattern.verify(mapped, self._seed(index))
        finally:
            os.close(fd)
        if right == size:
            self.link.restored(self.name, text, "verify", ok=True)
        else:
            self.link.restored(self.name, text, "verify", ok=False, errno="EIO")
        return right


def run(
    name: str, run_dir: Path, backend: Backend, emulator: Path | None, size: int, boot: int, pipe: int
) -> int:
    """Be one client of the demo in the first or the second boot; return the exit code."""
    kernel = open_kernel(backend, directory=emulator)
    client = DemoClient(name, run_dir / "liveupdate.sock", kernel, size, pipe)
    return client.first_boot() if boot == 1 else client.second_boot()
