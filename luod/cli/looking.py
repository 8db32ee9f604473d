# SPDX-License-Identifier: Apache-2.0
"""The verbs that only look: status, list, sessions, session, clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from .link import luod
from .output import clock, counts, emit, facts, json_option, paint, size, table

Json = dict[str, Any]


@click.command("status")
@json_option
def status(as_json: bool) -> None:
    """Show luod, its kernel, its journal, the update and what is in doubt."""
    with luod() as link:
        found = link.status().fields
    if as_json:
        emit(found)
        return
    kernel, journal = found["kernel"], found["journal"]
    detail = f": {kernel['detail']}" if kernel.get("detail") else ""
    facts((
        ("luod", f"{found['version']}, pid {found['pid']}"),
        ("boot", str(found["boot_id"])),
        ("kernel", f"{kernel['backend']}, {paint(kernel['state'])}{detail}"),
        ("", f"hint: {kernel['hint']}" if kernel.get("hint") else ""),
        ("journal", f"{journal['path']}, {journal['rows']} records"),
        ("image", "loaded" if found["image_loaded"] else "none loaded"),
        ("update", update_phrase(found["update"])),
        ("sessions", counts(found["sessions"])),
        ("clients", f"{found['clients']} connected"),
        ("in doubt", f"{len(found['in_doubt'])} effects: settle them with `luoctl resolve`" if found["in_doubt"] else ""),
    ))  # fmt: skip
    if found["in_doubt"]:
        click.echo()
        table(
            ("EFFECT", "KIND", "STATUS"),
            ((one["key"], one["kind"], one["status"]) for one in found["in_doubt"]),
        )


def update_phrase(update: Mapping[str, Any] | None) -> str:
    """Return an update in one line."""
    if update is None:
        return "none yet"
    parts = [f"{update['id']} {paint(update['state'])}"]
    if update["state"] == "done":
        parts.append(f"({counts({key: value for key, value in update['counts'].items() if value})})")
    elif update["sessions"]:
        parts.append(f"({len(update['sessions'])} sessions)")
    if update["paused"] and update["state"] == "preparing":
        parts.append("and waits for `luoctl kexec` or `luoctl abort`")
    if update["reason"]:
        parts.append(f"- {update['reason']}")
    return " ".join(parts)


@click.command("list")
@json_option
def list_clients(as_json: bool) -> None:
    """Show who takes part: every client id with its newest session, and whether it is connected."""
    with luod() as link:
        connected = {str(one["id"]): one for one in link.clients()["clients"]}
        newest: dict[str, Json] = {}
        for one in link.sessions()["sessions"]:
            old = newest.get(one["client"])
            if old is None or one["attempt"] > old["attempt"]:
                newest[one["client"]] = one
    rows: list[Json] = []
    for client in sorted({*newest, *connected}):
        session, here = newest.get(client), connected.get(client)
        owner = (session or {}).get("owner") or {}
        rows.append({
            "id": client, "connected": here is not None, "session": session["id"] if session else None,
            "state": session["state"] if session else None, "policy": session["policy"] if session else None,
            "uid": here["uid"] if here else owner.get("uid"), "pid": here["pid"] if here else owner.get("pid"),
        })  # fmt: skip
    if as_json:
        emit({"clients": rows})
        return
    table(
        ("CLIENT", "STATE", "SESSION", "POLICY", "UID", "PID", "CONNECTED"),
        (
            (
                r["id"],
                r["state"],
                r["session"],
                r["policy"],
                r["uid"],
                r["pid"],
                "yes" if r["connected"] else "no",
            )
            for r in rows
        ),
        empty="nobody takes part",
    )


def session_rows(sessions: list[Json]) -> None:
    """Print sessions as a table."""
    table(
        ("SESSION", "STATE", "UPDATE", "POLICY", "UID", "MEMORY", "REASON"),
        (
            (
                one["id"], one["state"], one["update"] or "-", one["policy"], (one["owner"] or {}).get("uid", "?"),
                size(sum(res["size"] for res in one["resources"])) if one["resources"] else "-", one["reason"],
            )
            for one in sessions
        ),
        empty="no sessions",
    )  # fmt: skip


@click.command("sessions")
@click.option("--state", help="Only those in this state.")
@json_option
def sessions(state: str | None, as_json: bool) -> None:
    """Show all sessions that you may see."""
    if state is not None:
        check_state(state)
    with luod() as link:
        found = [one for one in link.sessions()["sessions"] if state in (None, one["state"])]
    if as_json:
        emit({"sessions": found})
    else:
        session_rows(found)


def check_state(state: str) -> None:
    """Refuse the name of a state that no session can have."""
    from ..states.table import SESSION

    if state not in SESSION.states:
        raise click.UsageError(f"there is no session state {state!r}; there are {', '.join(SESSION.states)}")


@click.command("session")
@click.argument("id")
@json_option
def session(id: str, as_json: bool) -> None:
    """Show one session by its id (vm1.2), or the newest of a client (vm1)."""
    with luod() as link:
        found: Json = link.session(id)["session"]
    if as_json:
        emit({"session": found})
        return
    owner = found["owner"] or {}
    facts((
        ("session", f"{found['id']} {paint(found['state'])}"),
        ("client", f"{found['client']}, attempt {found['attempt']}"),
        ("owner", f"uid {owner.get('uid')}, pid {owner.get('pid')}" if owner else "unknown"),
        ("policy", str(found["policy"])),
        ("update", str(found["update"])),
        ("in the kernel", str(found["kernel_name"])),
        ("reason", str(found["reason"])),
    ))  # fmt: skip
    story(found)


def story(found: Json) -> None:
    """Print the tables of one session: when it was where, what it holds, what was done for it."""
    entered = sorted(found["entered"].items(), key=lambda item: item[1]["wall_ns"])
    click.echo()
    table(
        ("STATE", "SINCE", "BOOT"),
        ((state, clock(at["wall_ns"]), at["boot_id"][:8]) for state, at in entered),
    )
    if found["resources"]:
        click.echo()
        rows = []
        for res in found["resources"]:
            steps = [
                f"{step['step']}: {step_phrase(found['steps'].get(res['token'] + '/' + step['step']))}"
                for step in res["plan"]
            ]
            rows.append((res["token"], res["kind"], size(res["size"]), res["label"], ", ".join(steps)))
        table(("TOKEN", "KIND", "SIZE", "LABEL", "RESTORE PLAN"), rows)
    if found["effects"]:
        click.echo()
        table(
            ("EFFECT", "STATUS", "HOW", "ERRNO", "ATTEMPT"),
            (
                (key, effect_phrase(one["status"]), one["how"], one["errno"], one["attempt"])
                for key, one in found["effects"].items()
            ),
        )
    for note in found["anomalies"]:
        click.echo(paint(f"anomaly: {note}", "yellow"))


def step_phrase(outcome: Mapping[str, Any] | None) -> str:
    """Return what became of a step of a restore plan."""
    if outcome is None:
        return "open"
    return "ok" if outcome["ok"] else f"failed {outcome['errno']}".rstrip()


def effect_phrase(status: str) -> str:
    """Return the status of an effect in words."""
    return "in doubt" if status in ("intended", "unknown") else status


@click.command("clients")
@json_option
def clients(as_json: bool) -> None:
    """Show who is connected, by the ids that they speak for."""
    with luod() as link:
        found = link.clients()["clients"]
    if as_json:
        emit({"clients": found})
        return
    table(
        ("CLIENT", "UID", "PID", "SESSION", "STATE", "FEATURES", "FOR"),
        (
            (
                one["id"], one["uid"], one["pid"], one["session"], one["state"],
                " ".join(one["features"]), f"{one['connected_s']:.0f} s",
            )
            for one in found
        ),
        empty="no client is connected",
    )  # fmt: skip
