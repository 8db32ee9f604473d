# SPDX-License-Identifier: Apache-2.0
"""Folding: a stream of events becomes a record of where things stand. Pure, and never says no.

`evolve(record, event, at)` returns the record after the event. An event that the table does not allow in that state is a fact all the
same: it is kept in `anomalies` and moves nothing, so that a journal written by another version or damaged in the middle can be read
to its end. New events are judged first, by `machine.judge`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
from msgspec.structs import replace

from . import events as ev
from .guards import GUARDS
from .names import kernel_name
from .table import SESSION_NEXT, UPDATE_NEXT, SessionState, UpdateState


class At(msgspec.Struct, frozen=True):
    """Where and when an event was recorded: journal id, boot id, wall and boot clock in nanoseconds."""

    id: int = 0
    boot_id: str = ""
    wall_ns: int = 0
    boot_ns: int = 0
    run_id: str = ""


class Effect(msgspec.Struct, frozen=True):
    """The latest attempt of one effect; `status` is `intended` while it is in doubt."""

    key: str
    kind: str
    args: dict[str, Any]
    attempt: int
    boot_id: str
    status: str = "intended"
    how: str = ""
    errno: str = ""
    message: str = ""
    result: dict[str, Any] = {}


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """What sessions, updates and luod itself have in common: effects, times and anomalies."""

    id: str
    state: str
    seq: int = 0
    effects: dict[str, Effect] = {}
    entered: dict[str, At] = {}
    abort_reason: str = ""
    reason: str = ""
    anomalies: tuple[str, ...] = ()

    def doubts(self) -> list[Effect]:
        """Return the effects that were intended and have no outcome, or an unknown one."""
        return [effect for effect in self.effects.values() if effect.status in ("intended", "unknown")]

    def last_boot(self) -> str:
        """Return the boot in which it came to where it is; empty before its first event."""
        return max(((at.id, at.boot_id) for at in self.entered.values()), default=(0, ""))[1]

    def done(self, key: str) -> bool:
        """Say whether the effect of this key has happened."""
        effect = self.effects.get(key)
        return effect is not None and effect.status == "done"


class Session(Streamed, frozen=True, kw_only=True):
    """One client's attempt to carry its memory over one kexec."""

    state: str = SessionState.NEW
    client: str = ""
    attempt: int = 0
    owner: ev.Owner | None = None
    policy: ev.Policy = "required"
    deadline_s: float = 0.0
    order: int = 0
    devices: ev.Devices = "preserve"
    kernel_name: str = ""
    update: str = ""
    declared: tuple[ev.Resource, ...] = ()
    """What was preserved while the workload ran; it outlives a thaw."""
    resources: tuple[ev.Resource, ...] = ()
    """All that is preserved now: what was declared, and what READY added."""
    spans: dict[str, float] = {}
    steps: dict[str, ev.SessionStep] = {}
    nack: ev.SessionNacked | None = None
    reboot_boot_id: str = ""

    def open_steps(self) -> list[str]:
        """Return the steps of the restore plans that have no good outcome yet, as `token/step`."""
        wanted = [f"{res.token}/{step.step}" for res in self.resources for step in res.plan]
        return [key for key in wanted if key not in self.steps or not self.steps[key].ok]


class Update(Streamed, frozen=True, kw_only=True):
    """One attempt to replace the kernel."""

    state: str = UpdateState.IDLE
    number: int = 0
    sessions: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unwritten: str = ""
    by_uid: int = -1
    deadline_s: float = 0.0
    box: str = ""
    counts: dict[str, int] = {}
    refused: str = ""
    paused: bool = False
    reboot_boot_id: str = ""


class Daemon(Streamed, frozen=True, kw_only=True):
    """luod itself: its starts, the black box and the loaded image."""

    state: str = "running"
    starts: int = 0
    boot_id: str = ""
    box_boot_id: str = ""
    image: ev.ImageLoaded | None = None
    image_boot_id: str = ""


T = TypeVar("T", bound=Streamed)


def new_record(stream: str) -> Session | Update | Daemon:
    """Return the empty record of a stream, told by its name."""
    if stream == "luod":
        return Daemon(id=stream)
    if stream.startswith("update/"):
        return Update(id=stream)
    return Session(id=stream)


def evolve(record: T, event: ev.Event, at: At) -> T:
    """Return `record` after `event`; total, and pure."""
    fields: dict[str, Any] = {"seq": record.seq + 1}
    if isinstance(event, ev.EFFECT_EVENTS):
        fields.update(_effect(record, event, at))
        return replace(record, **fields)
    if isinstance(record, Session):
        table, known = SESSION_NEXT, isinstance(event, ev.SESSION_EVENTS)
    elif isinstance(record, Update):
        table, known = UPDATE_NEXT, isinstance(event, ev.UPDATE_EVENTS)
    else:
        fields.update(_daemon(event, at))
        return replace(record, **fields)
    step = table.get((record.state, event.NAME)) if known else None
    if step is None or not (not step[1] or GUARDS[step[1]](record, event, at)):
        why = "its guard" if step else "the table"
        note = f"{event.TYPE} in {record.state} at {at.id}: refused by {why}"
        fields["anomalies"] = (*record.anomalies, note)
        return replace(record, **fields)
    state = step[0]
    if state != record.state or record.seq == 0:
        fields["entered"] = {**record.entered, state: at}
    fields["state"] = state
    fields.update(_session(record, event, at) if isinstance(record, Session) else _update(event, at))
    return replace(record, **fields)


def _effect(record: Streamed, event: ev.Event, at: At) -> dict[str, Any]:
    effects = dict(record.effects)
    match event:
        case ev.EffectIntended():
            effects[event.key] = Effect(event.key, event.kind, event.args, event.attempt, at.boot_id)
        case ev.EffectOutcome() | ev.EffectVoided():
            old = effects.get(event.key)
            if old is None:
                note = f"{event.TYPE} of {event.key} at {at.id}: no intent before it"
                return {"anomalies": (*record.anomalies, note)}
            if isinstance(event, ev.EffectVoided):
                effects[event.key] = replace(old, status="voided", message=event.reason)
            else:
                effects[event.key] = replace(
                    old, status=event.status, how=event.how, errno=event.errno,
                    message=event.message, result=event.result,
                )  # fmt: skip
        case _:
            pass
    return {"effects": effects}


def _session(record: Session, event: ev.Event, at: At) -> dict[str, Any]:
    match event:
        case ev.SessionBound():
            return {
                "client": event.client, "attempt": event.attempt, "owner": event.owner, "policy": event.policy,
                "deadline_s": event.deadline_s, "order": event.order, "devices": event.devices,
                "kernel_name": kernel_name(record.id),
            }  # fmt: skip
        case ev.SessionCreated():
            return {"update": event.update, "kernel_name": event.kernel_name}
        case ev.SessionPreserved():
            return {"declared": event.resources, "resources": event.resources}
        case ev.SessionReady():
            return {"resources": (*record.declared, *event.resources), "spans": event.spans}
        case ev.SessionRebooting():
            return {"reboot_boot_id": at.boot_id, "update": event.update}
        case ev.SessionStep():
            return {"steps": {**record.steps, f"{event.token}/{event.step}": event}}
        case ev.SessionNacked():
            return {"nack": event}
        case ev.SessionAbortRequested():
            return {"abort_reason": event.reason}
        case ev.SessionThawed():
            return {"reason": event.reason, "resources": record.declared, "spans": {}}
        case ev.SessionAborted() | ev.SessionFailed() | ev.SessionExpired():
            return {"reason": event.reason}
        case ev.SessionLost():
            return {"reason": event.cause}
        case ev.SessionRetried():
            return {"steps": {key: step for key, step in record.steps.items() if step.ok}}
        case _:
            return {}


def _update(event: ev.Event, at: At) -> dict[str, Any]:
    match event:
        case ev.UpdateStarted():
            return {
                "number": event.number, "by_uid": event.by_uid, "deadline_s": event.deadline_s,
                "sessions": event.sessions,
            }  # fmt: skip
        case ev.UpdateArmed():
            return {
                "sessions": event.sessions, "dropped": event.dropped, "paused": False,
                "unwritten": event.unwritten or "",
            }  # fmt: skip
        case ev.UpdateDisarmed():
            return {"paused": True, "reason": event.reason}
        case ev.UpdateRebooting():
            return {"reboot_boot_id": at.boot_id, "sessions": event.sessions}
        case ev.UpdateRefused():
            return {"refused": event.errno}
        case ev.UpdateRecovering():
            return {"box": event.box}
        case ev.UpdateDone():
            counts = {
                "finished": event.finished, "lost": event.lost, "failed": event.failed, "expired": event.expired,
            }  # fmt: skip
            return {"counts": counts}
        case ev.UpdateAbortRequested():
            return {"abort_reason": event.reason}
        case ev.UpdateAborted():
            return {"reason": event.reason}
        case ev.UpdateLost():
            return {"reason": event.cause}
        case _:
            return {}


def _daemon(event: ev.Event, at: At) -> dict[str, Any]:
    match event:
        case ev.DaemonStarted():
            return {"boot_id": at.boot_id, "state": "running"}
        case ev.DaemonStopped():
            return {"state": "stopped", "reason": event.reason}
        case ev.BoxCreated():
            return {"box_boot_id": at.boot_id}
        case ev.ImageLoaded():
            return {"image": event, "image_boot_id": at.boot_id}
        case _:
            return {}
