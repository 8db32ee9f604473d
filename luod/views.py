# SPDX-License-Identifier: Apache-2.0
"""How sessions, updates and records look as JSON, for the daemon and for every tool: one shape, wherever it comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from .journal.record import Record
from .states import events as ev
from .states.fold import Session, Streamed, Update

Reply = dict[str, Any]


def every(call: Callable[..., Any], verb: str, what: str) -> list[Reply]:
    """Ask for all pages of SESSIONS or CLIENTS; `call(verb, after=...)` returns a reply with `fields`."""
    rows: list[Reply] = []
    after: str | None = ""
    while after is not None:
        fields = call(verb, after=after).fields
        rows += fields[what]
        after = fields.get("next")
    return rows


def to_json(resource: ev.Resource) -> dict[str, Any]:
    """Return a resource as the wire shows it."""
    return {
        "token": resource.token, "kind": resource.kind, "size": resource.size, "label": resource.label,
        "checksum": resource.checksum, "plan": [{"step": one.step, "args": one.args} for one in resource.plan],
    }  # fmt: skip


def _effects_json(record: Streamed) -> Reply:
    return {
        key: {
            "kind": one.kind, "status": one.status, "how": one.how, "errno": one.errno, "attempt": one.attempt,
        }
        for key, one in record.effects.items()
    }  # fmt: skip


def _entered_json(record: Streamed) -> Reply:
    return {
        state: {"wall_ns": at.wall_ns, "boot_ns": at.boot_ns, "boot_id": at.boot_id}
        for state, at in record.entered.items()
    }


def session_json(session: Session) -> Reply:
    """Return a session as every tool shows it."""
    return {
        "id": session.id, "client": session.client, "attempt": session.attempt, "state": str(session.state),
        "owner": {"uid": session.owner.uid, "gid": session.owner.gid, "pid": session.owner.pid} if session.owner else None,
        "policy": session.policy, "order": session.order, "devices": session.devices,
        "update": session.update, "kernel_name": session.kernel_name, "spans": session.spans,
        "resources": [to_json(one) for one in session.resources],
        "steps": {
            key: {"ok": step.ok, "errno": step.errno, "took_ms": step.took_ms} for key, step in session.steps.items()
        },
        "effects": _effects_json(session), "entered": _entered_json(session),
        "reason": session.reason or session.abort_reason, "anomalies": list(session.anomalies),
    }  # fmt: skip


def update_json(update: Update) -> Reply:
    """Return an update as every tool shows it."""
    return {
        "id": update.id, "number": update.number, "state": str(update.state), "sessions": list(update.sessions),
        "dropped": list(update.dropped), "unwritten": update.unwritten, "paused": update.paused, "box": update.box,
        "counts": update.counts, "refused": update.refused, "effects": _effects_json(update), "entered": _entered_json(update),
        "reason": update.reason or update.abort_reason, "anomalies": list(update.anomalies),
    }  # fmt: skip


def record_json(record: Record) -> Reply:
    """Return a journal record as every tool shows it."""
    try:
        body: Any = msgspec.json.decode(record.body)
    except msgspec.DecodeError:
        body = {"undecodable": record.body.hex()}
    return {
        "id": record.id, "stream": record.stream, "seq": record.seq, "type": record.type, "wall_ns": record.wall_ns,
        "boot_ns": record.boot_ns, "boot_id": record.boot_id, "run_id": record.run_id, "cause": record.cause, "body": body,
    }  # fmt: skip
