# SPDX-License-Identifier: Apache-2.0
"""LUOD's effects: every call by which it changes the world, each with its probe.

Session fds live in `Held` (luod's own copies) and with the second holder. A session fd is born in the second holder, so a luod that
is killed at any instant of `create` or `retrieve` finds the fd there afterwards.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from ..adapters import memfd
from ..adapters.liveupdate.errors import KernelError, SessionUnknown, TokenExists, TokenUnknown
from ..engine.errors import EffectFailed
from ..engine.ports import Absent, Custody, Done, Effect, Intent, Json, Kernel, KexecImage, Probe, Unknown
from ..states.names import BLACK_BOX_SESSION, BLACK_BOX_TOKEN, MARKER_TOKEN, SCRATCH_SESSION

RING = "luod.ring"
"""The name under which the second holder keeps the black-box memfd itself."""


class Held:
    """luod's own copies of fds, by name. Closing is always by name, so nothing is closed twice.

    `settled` is held while a name is let go of, or is given to a new second holder: the two must not cross.
    """

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self.settled = threading.Lock()

    def names(self) -> set[str]:
        """Return the names under which fds are held."""
        return set(self._fds)

    def put(self, name: str, fd: int) -> None:
        """Keep `fd` under a name; an older copy is closed."""
        old = self._fds.get(name)
        self._fds[name] = fd
        if old is not None and old != fd:
            os.close(old)

    def get(self, name: str) -> int:
        """Return the fd held under a name. Raises `EffectFailed` when there is none."""
        try:
            return self._fds[name]
        except KeyError:
            raise EffectFailed(f"luod holds no fd of {name}", errno="EBADF") from None

    def has(self, name: str) -> bool:
        """Say whether an fd is held under a name."""
        return name in self._fds

    def drop(self, name: str) -> None:
        """Close what is held under a name, if anything."""
        fd = self._fds.pop(name, None)
        if fd is not None:
            os.close(fd)

    def close(self) -> None:
        """Close everything."""
        for name in list(self._fds):
            self.drop(name)


class _Base:
    repeatable = False
    carried = False

    def __init__(self, kernel: Kernel, custody: Custody, held: Held) -> None:
        self.kernel = kernel
        self.custody = custody
        self.held = held

    def adopt(self, name: str) -> bool:
        """Take a copy of a session fd from the second holder, if it has one."""
        if self.held.has(name):
            return True
        fd = self.custody.get(name)
        if fd is None:
            return False
        self.held.put(name, fd)
        return True


class Create(_Base):
    """CREATE_SESSION of an outgoing session, in the second holder."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Create the session named in `args` and hold it."""
        name = str(intent.args["name"])
        self.held.put(name, self.custody.create(name))
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the second holder: what neither it nor luod holds, the kernel has destroyed."""
        return Done() if self.adopt(str(intent.args["name"])) else Absent()


class Mark(_Base):
    """PRESERVE_FD of luod's marker, by which FINISH can be seen later."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Preserve a small memfd that names the session and its owner."""
        body = msgspec.json.encode(intent.args)
        fd = memfd.create("luod.marker", len(body))
        try:
            os.pwrite(fd, body, 0)
            self.kernel.preserve_fd(self.held.get(str(intent.args["name"])), MARKER_TOKEN, fd)
        except TokenExists:
            return {"already": True}
        finally:
            os.close(fd)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the kernel whether the token is taken."""
        name = str(intent.args["name"])
        if not self.adopt(name):
            return Absent()
        return Done() if self.kernel.token_preserved(self.held.get(name), MARKER_TOKEN) else Absent()


class Retrieve(_Base):
    """RETRIEVE_SESSION of an incoming session, in the second holder."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Retrieve the session named in `args` and hold it."""
        name = str(intent.args["name"])
        self.held.put(name, self.custody.retrieve(name))
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the second holder; what it does not hold has not been retrieved by it."""
        return Done() if self.adopt(str(intent.args["name"])) else Absent()


class Release(_Base):
    """luod and its second holder let go of a session: the last close, unless a client still holds it."""

    repeatable = True

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Close both copies; harmless when they are closed already."""
        name = str(intent.args["name"])
        with self.held.settled:
            self.held.drop(name)
            self.custody.remove(name)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the second holder."""
        return Absent() if str(intent.args["name"]) in self.custody.names() else Done()


class Hand(_Base):
    """A session fd goes to its client, over its connection."""

    repeatable = True

    def __init__(
        self, kernel: Kernel, custody: Custody, held: Held, send: Callable[[str, dict[str, Json], int], None]
    ) -> None:
        super().__init__(kernel, custody, held)
        self._send = send

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Send the message in `args` with a copy of the fd. Raises `EffectFailed` when the client has gone."""
        self._send(intent.stream, dict(intent.args["message"]), self.held.get(str(intent.args["name"])))
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Nobody can say whether a dead luod's message arrived; the client asks again if it did not."""
        return Unknown("the connection died with luod")


class Load(_Base):
    """kexec_file_load of the next kernel."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Load the image described in `args`."""
        initrd = intent.args.get("initrd")
        image = KexecImage(
            Path(intent.args["kernel"]), Path(initrd) if initrd else None, intent.args["cmdline"]
        )
        self.kernel.load(image)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the kernel whether an image is loaded."""
        return Done() if self.kernel.loaded() else Absent()


class Scratch(_Base):
    """A session made and closed at once, so that a refused CREATE cannot panic the next kernel."""

    repeatable = True

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Create and close the scratch session."""
        self.kernel.scratch(SCRATCH_SESSION)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """It leaves nothing to be seen."""
        return Unknown("a scratch session leaves no trace")


class Reboot(_Base):
    """reboot(LINUX_REBOOT_CMD_KEXEC). Does not return when it succeeds."""

    carried = True

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Leave this kernel; a refusal comes back as `KernelError` with its errno."""
        self.kernel.kexec()

    def probe(self, intent: Intent) -> Probe:
        """This boot runs, so the call has not been made, or was refused."""
        return Absent()


class BoxCreate(_Base):
    """The black box: its kernel session and its memfd, both with the second holder."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Create the session and a zeroed memfd of `size` bytes."""
        self.held.put(BLACK_BOX_SESSION, self.custody.create(BLACK_BOX_SESSION))
        if not self.adopt(RING):
            fd = memfd.create("luod.ring", int(intent.args["size"]))
            try:
                self.custody.store(RING, fd)
            except BaseException:
                os.close(fd)
                raise
            self.held.put(RING, fd)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Both must be with the second holder."""
        return Done() if self.adopt(BLACK_BOX_SESSION) and self.adopt(RING) else Absent()


class BoxPreserve(_Base):
    """PRESERVE_FD of the black-box memfd in its session."""

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Preserve the ring; done already is fine."""
        try:
            self.kernel.preserve_fd(self.held.get(BLACK_BOX_SESSION), BLACK_BOX_TOKEN, self.held.get(RING))
        except TokenExists:
            return {"already": True}
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the kernel whether the token is taken."""
        if not self.adopt(BLACK_BOX_SESSION):
            return Absent()
        taken = self.kernel.token_preserved(self.held.get(BLACK_BOX_SESSION), BLACK_BOX_TOKEN)
        return Done() if taken else Absent()


class BoxFinish(_Base):
    """FINISH of the incoming black box, once it has been read and merged."""

    repeatable = True

    def apply(self, intent: Intent) -> dict[str, Json]:
        """Finish and let go; harmless when it is gone already."""
        if self.adopt(BLACK_BOX_SESSION):
            self.kernel.finish(self.held.get(BLACK_BOX_SESSION))
        with self.held.settled:
            for name in (BLACK_BOX_SESSION, RING):
                self.held.drop(name)
                self.custody.remove(name)
        return {}

    def probe(self, intent: Intent) -> Probe:
        """Ask the second holder."""
        return Absent() if BLACK_BOX_SESSION in self.custody.names() else Done()


def finished(kernel: Kernel, session_fd: int) -> bool:
    """Say whether FINISH has run on a retrieved session: its marker can no longer be asked for.

    Raises `KernelError` when the kernel says neither.
    """
    try:
        os.close(kernel.retrieve_fd(session_fd, MARKER_TOKEN))
    except (TokenUnknown, SessionUnknown):
        return True
    return False


def all_effects(
    kernel: Kernel, custody: Custody, held: Held, send: Callable[[str, dict[str, Json], int], None]
) -> dict[str, Effect]:
    """Return LUOD's effects by kind."""
    return {
        "session.create": Create(kernel, custody, held),
        "session.mark": Mark(kernel, custody, held),
        "session.hand": Hand(kernel, custody, held, send),
        "session.retrieve": Retrieve(kernel, custody, held),
        "session.release": Release(kernel, custody, held),
        "update.load": Load(kernel, custody, held),
        "update.scratch": Scratch(kernel, custody, held),
        "update.reboot": Reboot(kernel, custody, held),
        "box.create": BoxCreate(kernel, custody, held),
        "box.preserve": BoxPreserve(kernel, custody, held),
        "box.retrieve": Retrieve(kernel, custody, held),
        "box.finish": BoxFinish(kernel, custody, held),
    }


__all__ = ["RING", "Held", "KernelError", "all_effects", "finished"]
