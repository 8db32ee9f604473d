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


class Intent(msgspec.Struct, frozen=True):
    """An effect that is about to be made: its deterministic key, the stream it belongs to, its kind and arguments."""

    stream: str
    key: str
    kind: str
    args: dict[str, Json] = {}
    attempt: int = 1


class Done(msgspec.Struct, frozen=True):
    """A probe's answer: the effect is in the world."""

    result: dict[str, Json] = {}


class Absent(msgspec.Struct, frozen=True):
    """A probe's answer: the effect is not in the world."""


class Unknown(msgspec.Struct, frozen=True):
    """A probe's answer: the world cannot tell."""

    why: str = ""


Probe = Done | Absent | Unknown


class Effect(Protocol):
    """One kind of call that changes the world.

    `apply` runs in a worker thread and is never cancelled; it raises `EffectFailed` (or any `LuodError`) when the world refuses.
    `probe` says what became of an earlier intent without changing anything. The two attributes are what the reconciliation table asks.
    """

    repeatable: bool
    """Whether making the call once more is harmless, so that an unknown outcome may simply be redone."""
    carried: bool
    """Whether the effect outlives the boot that made it: true of the kexec itself and of nothing else so far."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Make the call; return what is worth keeping in the journal."""
        ...

    def probe(self, intent: Intent) -> Probe:
        """Say whether the call has happened."""
        ...


class Kernel(Protocol):
    """The Live Update Orchestrator and kexec, as one kernel offers them.

    Session fds are ordinary descriptors: closing the last copy of an outgoing one un-preserves it, of a retrieved one finishes it.
    Every method may block; none may be cancelled midway. Failures are `KernelError`s carrying the errno.
    """

    def status(self) -> DeviceStatus:
        """Say whether the device can be used, without changing anything."""
        ...

    def boot_id(self) -> str:
        """Return the id of this boot, as /proc/sys/kernel/random/boot_id gives it."""
        ...

    def create_session(self, name: str) -> int:
        """CREATE_SESSION: return a new outgoing session fd."""
        ...

    def retrieve_session(self, name: str) -> int:
        """RETRIEVE_SESSION: return the fd of an incoming session; once per boot and name."""
        ...

    def preserve_fd(self, session_fd: int, token: int, fd: int) -> None:
        """PRESERVE_FD: put `fd` into an outgoing session under `token`."""
        ...

    def token_preserved(self, session_fd: int, token: int) -> bool:
        """Say whether a token is taken in an outgoing session, without side effects."""
        ...

    def retrieve_fd(self, session_fd: int, token: int) -> int:
        """RETRIEVE_FD: return a new fd of what was preserved under `token`."""
        ...

    def finish(self, session_fd: int) -> None:
        """FINISH: end an incoming session; what was not retrieved is destroyed."""
        ...

    def is_session(self, fd: int) -> bool:
        """Say whether an fd is a session of this kernel, without asking the fd, which may be anybody's."""
        ...

    def session_name(self, session_fd: int) -> str:
        """GET_NAME: return the name of a session."""
        ...

    def scratch(self, name: str) -> None:
        """Create and close a session, which heals the block chain after a refused CREATE_SESSION."""
        ...

    def load(self, image: KexecImage) -> None:
        """Load the next kernel with kexec_file_load(2)."""
        ...

    def unload(self) -> None:
        """Unload the next kernel."""
        ...

    def loaded(self) -> bool:
        """Say whether a next kernel is loaded."""
        ...

    def kexec(self) -> NoReturn:
        """reboot(LINUX_REBOOT_CMD_KEXEC): returns only by raising the refusal."""
        ...

    def sync(self) -> int:
        """Begin to write every file system back; return an fd, the caller's, that becomes readable when that has ended.

        Nobody has to wait for it: closing the fd earlier leaves the sync alone. This and `synced` do not block.
        """
        ...

    def synced(self, fd: int) -> None:
        """Take the outcome of a sync whose fd has become readable, and leave the fd open. Raises when it came to nothing."""
        ...


class Custody(Protocol):
    """A second holder of session fds, which outlives luod: luod-keeper, or systemd's fd store.

    `create` and `retrieve` run the ioctl in the holder itself, so that no instant exists in which luod alone has the fd.
    Every fd returned is a new copy that the caller owns.
    """

    def boot_id(self) -> str:
        """Return the boot in which the holder was started."""
        ...

    def names(self) -> list[str]:
        """Return the names held."""
        ...

    def get(self, name: str) -> int | None:
        """Return a copy of the fd held under a name, or None."""
        ...

    def create(self, name: str) -> int:
        """CREATE_SESSION in the holder; a name already held gives the held one."""
        ...

    def retrieve(self, name: str) -> int:
        """RETRIEVE_SESSION in the holder; a name already held gives the held one."""
        ...

    def store(self, name: str, fd: int) -> None:
        """Hand a copy of `fd` to the holder under a name."""
        ...

    def remove(self, name: str) -> None:
        """Let the holder close what it holds under a name."""
        ...
