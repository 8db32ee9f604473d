# SPDX-License-Identifier: Apache-2.0
"""Every command of the protocol as a method, once for both clients.

`R` is what a call gives: a `Reply` in `Client`, a coroutine of one in `AsyncClient`. The fields of each reply are in docs/protocol.md.
All raise `ClientError` with luod's code, `ConnectionLost` and `Timeout`.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, Generic, Literal, TypeVar

from .states.events import Devices, Policy

R = TypeVar("R")
Decision = Literal["done", "absent", "retry", "give-up"]


class Verbs(abc.ABC, Generic[R]):
    """The commands, over one method that sends any of them."""

    @abc.abstractmethod
    def call(self, cmd: str, fds: Sequence[int] = (), *, timeout: float | None = None, **fields: object) -> R:
        """Send a command with copies of `fds` and wait for its reply.

        `timeout` in seconds; None is the connection's, `math.inf` waits for ever. Fields that are None are not sent.
        """

    # -- anybody

    def hello(self, features: Sequence[str] = ("freeze", "inventory", "progress")) -> R:
        """Agree on version 1 and on features; the reply has `features`, `role` and `boot_id`."""
        return self.call("HELLO", version=1, features=list(features))

    def ping(self) -> R:
        """Ask whether luod answers."""
        return self.call("PING")

    # -- a client, before the kexec

    def subscribe(
        self,
        client: str,
        *,
        policy: Policy = "required",
        deadline_s: float | None = None,
        order: int = 0,
        devices: Devices = "preserve",
    ) -> R:
        """Take part in updates under an id, now owned by this process' uid.

        Who has a lower `order` is frozen before the others and restored after them. `devices` says what becomes of passthrough devices.
        """
        return self.call(
            "SUBSCRIBE", id=client, policy=policy, deadline_s=deadline_s, order=order, devices=devices
        )

    def unsubscribe(self, client: str) -> R:
        """Take no further part."""
        return self.call("UNSUBSCRIBE", id=client)

    def preserved(self, client: str, resources: Sequence[Mapping[str, Any]] = ()) -> R:
        """Say what is preserved; writers may still run. Each resource has `token` ("0x1a"), `kind`, `size`, `label`..."""
        return self.call("PRESERVED", id=client, resources=[dict(one) for one in resources])

    def ready(
        self,
        client: str,
        resources: Sequence[Mapping[str, Any]] = (),
        spans: Mapping[str, float] | None = None,
    ) -> R:
        """Say that writers are stopped, what was preserved after that, and how long each part of it took, in milliseconds."""
        listed = [dict(one) for one in resources] or None
        return self.call("READY", id=client, resources=listed, spans=dict(spans) if spans else None)

    def nack(self, client: str, errno: str, message: str = "", *, token: str | None = None) -> R:
        """Say that this update cannot be followed, and why: `errno` is symbolic."""
        return self.call("NACK", id=client, errno=errno, message=message, token=token)

    def aborted(self, client: str) -> R:
        """Say that the session fd is closed after an ABORT."""
        return self.call("ABORTED", id=client)

    def adopt(self, client: str, fd: int) -> R:
        """Hand a copy of a session fd back to a luod that has lost its own."""
        return self.call("ADOPT", (fd,), id=client)

    # -- a client, after the kexec

    def claim(self, client: str) -> R:
        """Get a session back: the reply's fd is the session, `resources` what is in it."""
        return self.call("CLAIM", id=client)

    def restored(
        self,
        client: str,
        token: str,
        step: str,
        ok: bool = True,
        errno: str | None = None,
        *,
        took_ms: float | None = None,
    ) -> R:
        """Report a step of a restore plan and how long it took, in milliseconds; the reply has the `open_steps`."""
        return self.call("RESTORED", id=client, token=token, step=step, ok=ok, errno=errno, took_ms=took_ms)

    def finished(self, client: str) -> R:
        """Say that FINISH has run on the session; luod looks for itself."""
        return self.call("FINISHED", id=client)

    # -- observers: each sees what is theirs, an admin everything

    def status(self) -> R:
        """Ask for the host at a glance."""
        return self.call("STATUS")

    def clients(self) -> R:
        """Ask who is connected."""
        return self.call("CLIENTS")

    def sessions(self) -> R:
        """Ask for all sessions."""
        return self.call("SESSIONS")

    def session(self, name: str) -> R:
        """Ask for one session, by its id or its client's."""
        return self.call("SESSION", id=name)

    def journal(self, after: int = 0, limit: int = 1000, stream: str | None = None) -> R:
        """Ask for a page of records with a journal id above `after`; fewer than `limit` may come."""
        return self.call("JOURNAL", after=after, limit=limit, stream=stream)

    def watch(self, after: int | None = None) -> R:
        """Ask for every record from now on, or after a journal id, as PROGRESS events."""
        return self.call("WATCH", after=after)

    # -- admins

    def load(
        self,
        kernel: str | PathLike[str],
        *,
        initrd: str | PathLike[str] | None = None,
        cmdline: str = "",
        timeout: float | None = None,
    ) -> R:
        """Load the next kernel. The paths are opened by luod."""
        initrd = None if initrd is None else fspath(initrd)
        return self.call("LOAD", timeout=timeout, kernel=fspath(kernel), initrd=initrd, cmdline=cmdline)

    def kexec(self, *, force: bool = False, deadline_s: float | None = None) -> R:
        """Begin an update, or go on with one that waits for a person; its course is told by `watch`."""
        return self.call("KEXEC", force=force, deadline_s=deadline_s)

    def abort(self, client: str | None = None, *, reason: str = "", timeout: float | None = None) -> R:
        """Undo the running update, or one session."""
        return self.call("ABORT", timeout=timeout, id=client, reason=reason)

    def resolve(self, key: str, decision: Decision) -> R:
        """Settle an effect in doubt."""
        return self.call("RESOLVE", key=key, decision=decision)
