# SPDX-License-Identifier: Apache-2.0
"""What a record of the journal says, as a sentence. Pure, and total: a record that is not known is shown as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from .printing import listed, number, size

Body = Mapping[str, Any]
Rec = Mapping[str, Any]

POLICY = {"required": "required", "optional": "optional", "best-effort": "best effort"}
BOX = {
    "merged": "the black box had more than the disk, and was merged", "equal": "the black box and the disk agree",
    "absent": "there is no black box", "consumed": "the black box was read before", "unreadable": "the black box cannot be read",
}  # fmt: skip
PROOF = {
    "marker": "its marker is gone from the session", "client": "its client says so", "operator": "an operator says so",
}  # fmt: skip
VERBS = {
    "session.create": "make the kernel session", "session.mark": "put the marker into the session",
    "session.hand": "hand the session to its client", "session.retrieve": "retrieve the session from the kernel",
    "session.release": "let go of the session", "update.load": "load the next kernel", "update.scratch": "try a scratch session",
    "update.reboot": "jump into the next kernel", "box.create": "make the black box", "box.preserve": "preserve the black box",
    "box.retrieve": "retrieve the black box", "box.finish": "finish the black box",
}  # fmt: skip


def of(record: Rec) -> str:
    """Return what a record says; the stream is named elsewhere."""
    body: Any = record["body"]
    maker = _SENTENCES.get(record["type"])
    if maker is not None:
        try:
            return maker(body)
        except (KeyError, TypeError, ValueError, AttributeError):
            pass
    return f"{record['type']} {json.dumps(body)}"


def event(record: Rec) -> str:
    """Return the name of a record's event without its version: `session.created`."""
    name, _, version = str(record["type"]).rpartition(".")
    return name if version.startswith("v") and version[1:].isdigit() else str(record["type"])


def effect(body: Body) -> str:
    """Return what an effect was to do."""
    kind = str(body.get("kind", ""))
    return VERBS.get(kind, kind or "?")


def _bound(body: Body) -> str:
    owner = body["owner"] if "owner" in body else {"uid": body["uid"], "pid": body["pid"]}
    return (
        f"{body['client']} subscribed: uid {owner['uid']}, pid {owner['pid']}, "
        f"{POLICY.get(body.get('policy', 'required'), body.get('policy'))}, attempt {body['attempt']}"
    )


def _preserved(body: Body) -> str:
    resources = body.get("resources", [])
    if not resources:
        return "everything is preserved"
    total = sum(int(one.get("size", 0)) for one in resources)
    return f"everything is preserved: {number(len(resources), 'resource')}, {size(total)}"


def _step(body: Body) -> str:
    how = "succeeded" if body["ok"] else f"failed: {body.get('errno') or 'no errno'}"
    return f"step {body['step']} of {body['token']} {how}"


def _nacked(body: Body) -> str:
    about = f", token {body['token']}" if body.get("token") else ""
    return f"its client cannot follow: {body['errno']} {body.get('message', '')}".rstrip() + about


def _aborted(body: Body) -> str:
    held = f"; {body['still_held_by']} may still hold it" if body.get("still_held_by") else ""
    return f"undone: {body['reason']}{held}"


def _started(body: Body) -> str:
    limit = f", at most {body['deadline_s']:g} s" if body.get("deadline_s") else ""
    sessions = body.get("sessions", [])
    with_ = f" with {number(len(sessions), 'session')}: {listed(sessions)}" if sessions else ""
    return f"uid {body['by_uid']} asked for the update{with_}{limit}"


def _armed(body: Body) -> str:
    dropped = f"; dropped: {listed(body['dropped'])}" if body.get("dropped") else ""
    unwritten = (
        f"; the file systems were not written back: {body['unwritten']}" if body.get("unwritten") else ""
    )
    return f"everybody is ready: {listed(body['sessions'])}{dropped}{unwritten}"


def _done(body: Body) -> str:
    parts = [f"{body[word]} {word}" for word in ("finished", "lost", "failed", "expired") if body.get(word)]
    return f"all sessions have ended: {', '.join(parts) or 'there were none'}"


def _intended(body: Body) -> str:
    again = f", attempt {body['attempt']}" if body.get("attempt", 1) > 1 else ""
    return f"about to {effect(body)} [{body['key']}{again}]"


HOW = {"called": "", "adopted": "found done", "observed": "seen", "resolved": "a person says"}


def _outcome(body: Body) -> str:
    why = f" {body['errno']}" if body.get("errno") else ""
    message = f": {body['message']}" if body.get("message") else ""
    how = f" ({HOW[body.get('how', 'called')]})" if HOW[body.get("how", "called")] else ""
    return f"{body['status']}{why}{how}{message} [{body['key']}]"


def _image(body: Body) -> str:
    initrd = f" with {body['initrd']}" if body.get("initrd") else ""
    return f"the next kernel is loaded: {body['kernel']}{initrd}, cmdline {body['cmdline']!r}"


_SENTENCES: dict[str, Callable[[Body], str]] = {
    "session.bound.v1": _bound,
    "session.bound.v2": _bound,
    "session.created.v1": lambda body: f"in the kernel as {body['kernel_name']}, for {body['update']}",
    "session.preserved.v1": _preserved,
    "session.ready.v1": lambda _: "its client has stopped its writers: ready",
    "session.thawed.v1": lambda body: f"its client was told to go on: {body['reason']}",
    "session.rebooting.v1": lambda body: f"goes into the kexec of {body['update']}",
    "session.reboot_refused.v1": lambda body: f"the kernel refused the kexec: {body['errno']}; still ready",
    "session.retrieved.v1": lambda _: "held again, in the new kernel",
    "session.step.v1": _step,
    "session.restored.v1": lambda _: "everything is restored",
    "session.finished.v1": lambda body: f"finished: {PROOF.get(body['proof'], body['proof'])}",
    "session.nacked.v1": _nacked,
    "session.abort_requested.v1": lambda body: f"is being undone: {body['reason']}",
    "session.aborted.v1": _aborted,
    "session.lost.v1": lambda body: f"lost: {body['cause']}",
    "session.failed.v1": lambda body: f"failed: {body['reason']} {body.get('errno', '')}".rstrip(),
    "session.retried.v1": lambda body: f"its client may try again, says {body['by']}",
    "session.expired.v1": lambda body: f"given up: {body['reason']}",
    "update.started.v1": _started,
    "update.armed.v1": _armed,
    "update.disarmed.v1": lambda body: f"waits for a person: {body['reason']}",
    "update.rebooting.v1": lambda body: f"the kexec begins with {number(len(body['sessions']), 'session')}",
    "update.refused.v1": lambda body: (
        f"the kernel refused the kexec: {body['errno']} {body.get('message', '')}".rstrip()
    ),
    "update.recovering.v1": lambda body: f"luod runs in the new kernel; {BOX.get(body['box'], body['box'])}",
    "update.done.v1": _done,
    "update.abort_requested.v1": lambda body: f"is being undone: {body['reason']}",
    "update.aborted.v1": lambda body: f"undone: {body['reason']}",
    "update.lost.v1": lambda body: f"lost: {body['cause']}",
    "effect.intended.v1": _intended,
    "effect.outcome.v1": _outcome,
    "effect.voided.v1": lambda body: f"void: {body['reason']} [{body['key']}]",
    "daemon.started.v1": lambda body: (
        f"luod {body['version']} started, pid {body['pid']}, kernel: {body['kernel']}"
    ),
    "daemon.stopped.v1": lambda body: f"luod ended: {body['reason']}",
    "daemon.box_created.v1": lambda body: f"the black box is preserved, {size(body['size'])}",
    "daemon.image_loaded.v1": _image,
}
