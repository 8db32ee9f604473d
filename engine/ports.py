# SPDX-License-Identifier: Apache-2.0
"""What the engine asks of the world: the ports that `adapters/` implement.

The engine never opens a device or a socket. It sees the kernel, the second holder of session fds and every other effect through
the protocols below, so that a test, the emulator and the real host differ only in what is plugged in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NoReturn, Protocol

import msgspec

Json = Any
"""A value that JSON can carry: what effect arguments and results are made of."""


class DeviceStatus(msgspec.Struct, frozen=True):
    """Whether the kernel's live-update device can be used, and if not, what to do."""

    state: Literal["ok", "absent", "disabled", "busy", "broken", "denied"]
    detail: str
    hint: str = ""


class KexecImage(msgspec.Struct, frozen=True):
    """The next kernel: paths of the image and of the optional initrd, and its command line."""

    kernel: Path
    initrd: Path | None
    cmdline: str


class Kernel(Protocol):
    """The Live Update Orchestrator and kexec, as one kernel offers them.

    Session fds are ordinary descriptors: closing the last copy of an outgoing one un-preserves it, of a retrieved one finishes it.
    Every method may block; none may be cancelled midway. Failures are `KernelError`s carrying the errno.
    """

    def status(self) -> DeviceStatus: ...
    def boot_id(self) -> str: ...
    def create_session(self, name: str) -> int: ...
    def retrieve_session(self, name: str) -> int: ...
    def preserve_fd(self, session_fd: int, token: int, fd: int) -> None: ...
    def token_preserved(self, session_fd: int, token: int) -> bool: ...
    def retrieve_fd(self, session_fd: int, token: int) -> int: ...
    def finish(self, session_fd: int) -> None: ...
    def session_name(self, session_fd: int) -> str: ...
    def scratch(self, name: str) -> None: ...
    def load(self, image: KexecImage) -> None: ...
    def unload(self) -> None: ...
    def loaded(self) -> bool: ...
    def kexec(self) -> NoReturn: ...


class Custody(Protocol):
    """A second holder of session fds, which outlives luod: luod-keeper, or systemd's fd store.

    `create` and `retrieve` run the ioctl in the holder itself, so that no instant exists in which luod alone has the fd.
    Every fd returned is a new copy that the caller owns.
    """

    def boot_id(self) -> str: ...
    def names(self) -> list[str]: ...
    def get(self, name: str) -> int | None: ...
    def create(self, name: str) -> int: ...
    def retrieve(self, name: str) -> int: ...
    def store(self, name: str, fd: int) -> None: ...
    def remove(self, name: str) -> None: ...
