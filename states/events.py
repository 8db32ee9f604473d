# SPDX-License-Identifier: Apache-2.0
"""The events: what happened, in the past tense, as the journal keeps it.

An event is a fact. It is checked before it is written and never refused when it is read again. Its type, `session.created.v1`,
carries the version: a struct whose meaning changes gets a new version and an upcaster (`upcast.py`); fields may be added with a
default. Nobody subclasses these. Tokens are hex text, times are seconds, errno is the symbolic name.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import msgspec

Policy = Literal["required", "optional", "best-effort"]
"""What a session that cannot follow does to the update: stop it, be dropped and reported, or be dropped silently."""

Devices = Literal["preserve", "reattach"]
"""What becomes of passthrough devices: they are preserved like memory, or, where the kernel cannot do that, they are stopped before the
kexec, reset, and attached again by the restore plan. A session never falls back from the one to the other by itself."""

EffectStatus = Literal["done", "failed", "unknown"]
EffectHow = Literal["called", "adopted", "observed", "resolved"]


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all events: `TYPE` is the tag in the journal, `NAME` the trigger in the table."""

    TYPE: ClassVar[str] = ""
    NAME: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.TYPE:
            cls.NAME = cls.TYPE.rsplit(".", 1)[0].split(".", 1)[1]


class Owner(msgspec.Struct, frozen=True):
    """Who bound a session: the peer credentials of the connection, and its unit or cgroup where known."""

    uid: int
    gid: int
    pid: int
    cgroup: str = ""


class Step(msgspec.Struct, frozen=True):
    """One call that must succeed between RETRIEVE_FD and FINISH, e.g. an ioctl or a QMP command."""

    step: str
    args: dict[str, Any] = {}


class Resource(msgspec.Struct, frozen=True):
    """One preserved object of a session, as its client declared it. `size` in bytes."""

    token: str
    kind: str
    size: int = 0
    label: str = ""
    checksum: str = ""
    plan: tuple[Step, ...] = ()


# -- sessions ---------------------------------------------------------------------------------------------------------


class SessionBound(Event, frozen=True):
    """A client took an id; its owner is fixed from here on."""

    TYPE = "session.bound.v2"
    client: str
    attempt: int
    owner: Owner
    policy: Policy = "required"
    deadline_s: float = 0.0
    order: int = 0
    devices: Devices = "preserve"


class SessionCreated(Event, frozen=True):
    """The kernel session exists and a second holder has it."""

    TYPE = "session.created.v1"
    update: str
    kernel_name: str


class SessionPreserved(Event, frozen=True):
    """The client says that everything is preserved, and what it is."""

    TYPE = "session.preserved.v1"
    resources: tuple[Resource, ...] = ()


class SessionReady(Event, frozen=True):
    """The client has stopped its writers; from here its workload is in the blackout.

    `resources` are what could only be preserved after that, such as a saved device state. `spans` are the parts of the time from FREEZE
    to here as the client measured them, in milliseconds.
    """

    TYPE = "session.ready.v1"
    resources: tuple[Resource, ...] = ()
    spans: dict[str, float] = {}


class SessionThawed(Event, frozen=True):
    """The client was told to go on; what it preserved stays preserved."""

    TYPE = "session.thawed.v1"
    reason: str


class SessionRebooting(Event, frozen=True):
    """Last word of the old kernel about this session."""

    TYPE = "session.rebooting.v1"
    update: str


class SessionRebootRefused(Event, frozen=True):
    """The kernel refused the kexec; the session is where it was."""

    TYPE = "session.reboot_refused.v1"
    errno: str


class SessionRetrieved(Event, frozen=True):
    """The session is held again in the new kernel, by luod and a second holder."""

    TYPE = "session.retrieved.v1"


class SessionStep(Event, frozen=True):
    """A step of a restore plan has an outcome."""

    TYPE = "session.step.v1"
    token: str
    step: str
    ok: bool
    errno: str = ""
    took_ms: float = 0.0


class SessionRestored(Event, frozen=True):
    """Every step of every restore plan succeeded; the workload may run."""

    TYPE = "session.restored.v1"


class SessionFinished(Event, frozen=True):
    """FINISH ran. `proof` says how luod knows: the marker is gone from the session, or the client's word."""

    TYPE = "session.finished.v1"
    proof: Literal["marker", "client", "operator"]


class SessionNacked(Event, frozen=True):
    """The client cannot follow this update."""

    TYPE = "session.nacked.v1"
    errno: str
    message: str = ""
    token: str = ""


class SessionAbortRequested(Event, frozen=True):
    """The session is being undone: its holders are told to close it."""

    TYPE = "session.abort_requested.v1"
    reason: str


class SessionAborted(Event, frozen=True):
    """Undone before the kexec: luod and its second holder have let go."""

    TYPE = "session.aborted.v1"
    reason: str
    still_held_by: str = ""


class SessionLost(Event, frozen=True):
    """The world no longer holds the session."""

    TYPE = "session.lost.v1"
    cause: str


class SessionFailed(Event, frozen=True):
    """Some part could not be restored; the fds are kept for the operator."""

    TYPE = "session.failed.v1"
    reason: str
    errno: str = ""


class SessionRetried(Event, frozen=True):
    """The operator lets the client try again."""

    TYPE = "session.retried.v1"
    by: str


class SessionExpired(Event, frozen=True):
    """Nobody claimed or finished it in time, or the operator gave it up; its memory is free again."""

    TYPE = "session.expired.v1"
    reason: str


# -- effects, in the stream of what they belong to --------------------------------------------------------------------


class EffectIntended(Event, frozen=True):
    """A call that changes the world is about to be made. Durable before the call."""

    TYPE = "effect.intended.v1"
    key: str
    kind: str
    args: dict[str, Any] = {}
    attempt: int = 1


class EffectOutcome(Event, frozen=True):
    """What became of an intent. Durable before anything that depends on it."""

    TYPE = "effect.outcome.v1"
    key: str
    status: EffectStatus
    how: EffectHow = "called"
    errno: str = ""
    message: str = ""
    result: dict[str, Any] = {}


class EffectVoided(Event, frozen=True):
    """The world that held this effect is gone; it is neither done nor to be redone."""

    TYPE = "effect.voided.v1"
    key: str
    reason: str


# -- updates ----------------------------------------------------------------------------------------------------------


class UpdateStarted(Event, frozen=True):
    """Somebody asked for an update. `deadline_s` bounds the time from here to the kexec."""

    TYPE = "update.started.v1"
    number: int
    by_uid: int
    sessions: tuple[str, ...] = ()
    deadline_s: float = 0.0


class UpdateArmed(Event, frozen=True):
    """The barrier is passed: these sessions go, those were dropped by their policy.

    `unwritten` says why the file systems were not written back before, and is left out where they were or need not be.
    """

    TYPE = "update.armed.v1"
    sessions: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    unwritten: str | msgspec.UnsetType = msgspec.UNSET


class UpdateDisarmed(Event, frozen=True):
    """luod was restarted after the barrier: the clients run again and a person decides."""

    TYPE = "update.disarmed.v1"
    reason: str


class UpdateRebooting(Event, frozen=True):
    """The last record before the kexec."""

    TYPE = "update.rebooting.v1"
    sessions: tuple[str, ...]


class UpdateRefused(Event, frozen=True):
    """The kernel refused the kexec; everything is rolled back."""

    TYPE = "update.refused.v1"
    errno: str
    message: str = ""


class UpdateRecovering(Event, frozen=True):
    """luod runs in the new kernel. `box` tells what the black box said."""

    TYPE = "update.recovering.v1"
    box: Literal["merged", "equal", "absent", "consumed", "unreadable"]


class UpdateDone(Event, frozen=True):
    """Every session of the update has reached its end."""

    TYPE = "update.done.v1"
    finished: int
    lost: int
    failed: int
    expired: int = 0


class UpdateAbortRequested(Event, frozen=True):
    """The update is being undone."""

    TYPE = "update.abort_requested.v1"
    reason: str


class UpdateAborted(Event, frozen=True):
    """Undone: no session of it is held by luod, its clients run."""

    TYPE = "update.aborted.v1"
    reason: str


class UpdateLost(Event, frozen=True):
    """The machine came back, but not by this update."""

    TYPE = "update.lost.v1"
    cause: str


# -- luod itself, stream `luod` ---------------------------------------------------------------------------------------


class DaemonStarted(Event, frozen=True):
    """A luod process took the journal."""

    TYPE = "daemon.started.v1"
    version: str
    kernel: str
    pid: int


class DaemonStopped(Event, frozen=True):
    """luod ended on request."""

    TYPE = "daemon.stopped.v1"
    reason: str


class BoxCreated(Event, frozen=True):
    """The black box is preserved in its own kernel session."""

    TYPE = "daemon.box_created.v1"
    size: int


class ImageLoaded(Event, frozen=True):
    """The next kernel is loaded; digests are blake2b-16 hex."""

    TYPE = "daemon.image_loaded.v1"
    kernel: str
    initrd: str
    cmdline: str
    kernel_digest: str
    initrd_digest: str = ""


SESSION_EVENTS: tuple[type[Event], ...] = (
    SessionBound, SessionCreated, SessionPreserved, SessionReady, SessionThawed, SessionRebooting,
    SessionRebootRefused, SessionRetrieved, SessionStep, SessionRestored, SessionFinished, SessionNacked,
    SessionAbortRequested, SessionAborted, SessionLost, SessionFailed, SessionRetried, SessionExpired,
)  # fmt: skip
UPDATE_EVENTS: tuple[type[Event], ...] = (
    UpdateStarted, UpdateArmed, UpdateDisarmed, UpdateRebooting, UpdateRefused, UpdateRecovering,
    UpdateDone, UpdateAbortRequested, UpdateAborted, UpdateLost,
)  # fmt: skip
EFFECT_EVENTS: tuple[type[Event], ...] = (EffectIntended, EffectOutcome, EffectVoided)
DAEMON_EVENTS: tuple[type[Event], ...] = (DaemonStarted, DaemonStopped, BoxCreated, ImageLoaded)
EVENTS: dict[str, type[Event]] = {
    cls.TYPE: cls for cls in (*SESSION_EVENTS, *UPDATE_EVENTS, *EFFECT_EVENTS, *DAEMON_EVENTS)
}
"""Every event type that this version writes."""
