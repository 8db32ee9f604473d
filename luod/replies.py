# SPDX-License-Identifier: Apache-2.0
"""The messages that luod sends: every event and the reply to every command, as structs.

They are what the published schema is made of (`python -m luod.protocol`), and a client may decode with them. luod may add fields; a reader
must ignore those it does not know.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec


class ErrorBody(msgspec.Struct, frozen=True):
    """Why something was refused: `code` for programs, the rest for people; `errno` is the kernel's own word, if there is one."""

    code: str
    message: str
    hint: str
    errno: str | msgspec.UnsetType = msgspec.UNSET


class PlanStep(msgspec.Struct, frozen=True):
    """One step of a restore plan."""

    step: str
    args: dict[str, Any]


class ResourceView(msgspec.Struct, frozen=True):
    """One preserved object; `size` in bytes."""

    token: str
    kind: str
    size: int
    label: str
    checksum: str
    plan: tuple[PlanStep, ...]


class RecordView(msgspec.Struct, frozen=True):
    """A record of the journal."""

    id: int
    stream: str
    seq: int
    type: str
    wall_ns: int
    boot_ns: int
    boot_id: str
    run_id: str
    cause: int | None
    body: Any


class OwnerView(msgspec.Struct, frozen=True):
    """Whom a session belongs to."""

    uid: int
    gid: int
    pid: int


class StepView(msgspec.Struct, frozen=True):
    """The last outcome of a step."""

    ok: bool
    errno: str
    took_ms: float


class EffectView(msgspec.Struct, frozen=True):
    """A call that changes the world, and what became of it."""

    kind: str
    status: str
    how: str
    errno: str
    attempt: int


class EnteredView(msgspec.Struct, frozen=True):
    """When and in which boot a state was reached."""

    wall_ns: int
    boot_ns: int
    boot_id: str


class SessionView(msgspec.Struct, frozen=True):
    """A session as every tool shows it."""

    id: str
    client: str
    attempt: int
    state: str
    owner: OwnerView | None
    policy: str
    order: int
    devices: str
    update: str
    kernel_name: str
    spans: dict[str, float]
    resources: tuple[ResourceView, ...]
    steps: dict[str, StepView]
    effects: dict[str, EffectView]
    entered: dict[str, EnteredView]
    reason: str
    anomalies: tuple[Any, ...]


class UpdateView(msgspec.Struct, frozen=True):
    """An update as every tool shows it."""

    id: str
    number: int
    state: str
    sessions: tuple[str, ...]
    dropped: tuple[str, ...]
    paused: bool
    box: str
    counts: dict[str, int]
    refused: str
    effects: dict[str, EffectView]
    entered: dict[str, EnteredView]
    reason: str
    anomalies: tuple[Any, ...]
    unwritten: str = ""
    """Why the file systems were not written back before the freeze; empty when they were, or need not be."""


class ClientView(msgspec.Struct, frozen=True):
    """A connected client."""

    id: str
    uid: int
    pid: int
    features: tuple[str, ...]
    session: str | None
    state: str | None
    connected_s: float


class KernelView(msgspec.Struct, frozen=True):
    """Whether the kernel can be used, and if not, what to do."""

    backend: str
    state: str
    detail: str
    hint: str


class JournalView(msgspec.Struct, frozen=True):
    """Where the journal is and how long; `head` is the chain of its last record, in hex."""

    path: str
    rows: int
    head: str


class KeeperView(msgspec.Struct, frozen=True):
    """Whether the second holder of session fds answers, and how many it holds."""

    state: str
    fds: int
    detail: str


class DoubtView(msgspec.Struct, frozen=True):
    """An effect of which nobody knows what became of it."""

    key: str
    kind: str
    stream: str
    status: str


class ImageView(msgspec.Struct, frozen=True):
    """The next kernel; digests are blake2b-16 in hex."""

    kernel: str
    initrd: str
    cmdline: str
    kernel_digest: str
    initrd_digest: str


# -- events


class Event(msgspec.Struct, frozen=True, tag_field="event"):
    """Base of what luod says by itself."""


class PreservationRequest(Event, frozen=True, tag="PRESERVATION_REQUEST"):
    """An update has begun; START_PRESERVATION follows."""

    id: str
    update: str


class StartPreservation(Event, frozen=True, tag="START_PRESERVATION"):
    """Preserve through the session fd that comes along, within `deadline_s` seconds."""

    id: str
    session: str
    fds: Literal[1]
    deadline_s: float


class Freeze(Event, frozen=True, tag="FREEZE"):
    """Stop all writers and say READY, within `deadline_s` seconds."""

    id: str
    deadline_s: float


class Resume(Event, frozen=True, tag="RESUME"):
    """Let writers run again."""

    id: str
    reason: str


class Undo(Event, frozen=True, tag="ABORT"):
    """Close the session fd and say ABORTED, within `deadline_s` seconds."""

    id: str
    reason: str
    deadline_s: float


class SessionHanded(Event, frozen=True, tag="SESSION"):
    """The answer to a CLAIM without `seq`; the session fd comes along."""

    id: str
    session: str
    state: str
    fds: Literal[1]
    resources: tuple[ResourceView, ...]
    open_steps: tuple[str, ...]


class Progress(Event, frozen=True, tag="PROGRESS"):
    """A record of the journal, for who said WATCH."""

    record: RecordView


class Fault(Event, frozen=True, tag="ERROR"):
    """A command without `seq`, or a line that could not be read, was refused."""

    error: ErrorBody


AnyEvent = PreservationRequest | StartPreservation | Freeze | Resume | Undo | SessionHanded | Progress | Fault
EVENTS: dict[str, type[Event]] = {str(cls.__struct_config__.tag): cls for cls in AnyEvent.__args__}


# -- replies


class Done(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to request `reply`: it was obeyed. By itself the answer to commands that have nothing to tell."""

    reply: int
    ok: Literal[True]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The reply to request `reply`: it was refused, and nothing has changed."""

    reply: int
    ok: Literal[False]
    error: ErrorBody


class HelloReply(Done, frozen=True, kw_only=True):
    """What both ends agree on, and who luod takes the caller for."""

    version: int
    features: tuple[str, ...]
    server: str
    boot_id: str
    role: Literal["admin", "client"]


class SessionState(Done, frozen=True, kw_only=True):
    """Which session it is, and where it stands."""

    session: str
    state: str


class ClaimReply(SessionState, frozen=True, kw_only=True):
    """The session; its fd comes along."""

    id: str
    fds: Literal[1]
    resources: tuple[ResourceView, ...]
    open_steps: tuple[str, ...]


class RestoredReply(Done, frozen=True, kw_only=True):
    """The steps that have no good outcome yet."""

    open_steps: tuple[str, ...]


class FinishedReply(Done, frozen=True, kw_only=True):
    """The state after luod has looked."""

    state: str


class StatusReply(Done, frozen=True, kw_only=True):
    """The host at a glance; `sessions` counts them by state."""

    version: str
    pid: int
    boot_id: str
    kernel: KernelView
    journal: JournalView
    update: UpdateView | None
    sessions: dict[str, int]
    clients: int
    image_loaded: bool
    in_doubt: tuple[DoubtView, ...]
    keeper: KeeperView | msgspec.UnsetType = msgspec.UNSET


class ClientsReply(Done, frozen=True, kw_only=True):
    """Who is connected; with `next`, ask on with it as `after`."""

    clients: tuple[ClientView, ...]
    next: str | None


class SessionsReply(Done, frozen=True, kw_only=True):
    """The sessions that the caller may see; with `next`, ask on with it as `after`."""

    sessions: tuple[SessionView, ...]
    next: str | None


class SessionReply(Done, frozen=True, kw_only=True):
    """One session."""

    session: SessionView


class JournalReply(Done, frozen=True, kw_only=True):
    """Records, oldest first; `head` is the id of the newest there is."""

    records: tuple[RecordView, ...]
    head: int


class WatchReply(Done, frozen=True, kw_only=True):
    """The id of the record after which PROGRESS events come."""

    head: int


class LoadReply(Done, frozen=True, kw_only=True):
    """What was loaded."""

    image: ImageView


class KexecReply(Done, frozen=True, kw_only=True):
    """The update that has begun."""

    update: str


class AbortReply(Done, frozen=True, kw_only=True):
    """What is being undone: the id of the update or of the session."""

    aborted: tuple[str, ...]


class ResolveReply(Done, frozen=True, kw_only=True):
    """The effect that was settled."""

    key: str
    status: str


REPLIES: dict[str, type[Done]] = {
    "HELLO": HelloReply, "PING": Done, "SUBSCRIBE": SessionState, "UNSUBSCRIBE": Done, "PRESERVED": Done, "READY": Done,
    "NACK": Done, "ABORTED": Done, "ADOPT": SessionState, "CLAIM": ClaimReply, "RESTORED": RestoredReply,
    "FINISHED": FinishedReply, "STATUS": StatusReply, "CLIENTS": ClientsReply, "SESSIONS": SessionsReply,
    "SESSION": SessionReply, "JOURNAL": JournalReply, "WATCH": WatchReply, "LOAD": LoadReply, "KEXEC": KexecReply,
    "ABORT": AbortReply, "RESOLVE": ResolveReply,
}  # fmt: skip
"""What each command is answered with when it is obeyed; otherwise it is a `Refusal`."""
