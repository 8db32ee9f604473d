# SPDX-License-Identifier: Apache-2.0
"""The verbs that look: list, status, sessions, session, clients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from ..views import every
from . import reach
from .printing import (
    clean,
    clock,
    duration,
    json_option,
    listed,
    number,
    print_json,
    size,
    table,
    tinted,
    wrapped,
)  # fmt: skip
from .program import UNREACHABLE, no

Json = Mapping[str, Any]


@click.command("list")
@json_option
@click.pass_obj
def list_(socket: str, as_json: bool) -> None:
    """List the connected clients, each with its session."""
    with reach.connect(socket) as client:
        clients = every(client.call, "CLIENTS", "clients")
        known = {one["id"]: one for one in every(client.call, "SESSIONS", "sessions")}
    rows = [{**one, "session": known.get(one["session"])} for one in clients]
    if as_json:
        print_json({"clients": rows})
        return
    if not rows:
        click.echo("No client is connected.")
        return
    table(
        ("client", "state", "session", "policy", "uid", "pid", "holds"),
        (
            (one["id"], one["state"] or "-", session["id"] if session else "-", session["policy"] if session else "-",
             one["uid"], one["pid"], holds(session) if session else "-")
            for one in rows for session in [one["session"]]
        ),
        right=("uid", "pid"),
    )  # fmt: skip


def holds(session: Json) -> str:
    """Say what a session has declared."""
    resources = session["resources"]
    return f"{len(resources)}, {size(sum(one['size'] for one in resources))}" if resources else "-"


@click.command("clients")
@json_option
@click.pass_obj
def clients(socket: str, as_json: bool) -> None:
    """List the connections that speak for a client."""
    with reach.connect(socket) as client:
        found = every(client.call, "CLIENTS", "clients")
    if as_json:
        print_json({"clients": found})
        return
    if not found:
        click.echo("No client is connected.")
        return
    table(
        ("client", "uid", "pid", "session", "state", "features", "connected"),
        (
            (one["id"], one["uid"], one["pid"], one["session"] or "-", one["state"] or "-",
             " ".join(one["features"]) or "plain", duration(one["connected_s"]))
            for one in found
        ),
        right=("uid", "pid"),
    )  # fmt: skip


@click.command("status")
@json_option
@click.pass_obj
def status(socket: str, as_json: bool) -> None:
    """Show the host at a glance: kernel, image, update, sessions, journal.

    Exit code 3 when luod runs and the kernel offers no live update.
    """
    reply = reach.ask(socket, "STATUS")
    if as_json:
        print_json(reply)
    else:
        _show_status(reply)
    if reply["kernel"]["state"] not in ("ok", "busy"):
        no(UNREACHABLE)


def _show_status(reply: Json) -> None:
    kernel, journal, update = reply["kernel"], reply["journal"], reply["update"]

    def line(name: str, text: str, before: str = "", state: str = "") -> None:
        """Print a name and `before state text`, with the state in its colour."""
        lead = f"{name:<10}{before}"
        click.echo(wrapped(text, first=lead + tinted(state), plain_first=lead + clean(state), rest=" " * 10))

    line("luod", f"{reply['version']}, pid {reply['pid']}, boot {reply['boot_id']}")
    line("kernel", f": {kernel['detail']}", f"{kernel['backend']}, ", kernel["state"])
    if kernel["hint"]:
        line("", kernel["hint"])
    keeper = reply.get("keeper") or {"state": "ok", "detail": ""}
    if keeper["state"] != "ok":
        line(
            "keeper",
            f": {keeper['detail']}. luod alone holds the sessions: start luod-keeper",
            "",
            keeper["state"],
        )
    line("image", "the next kernel is loaded" if reply["image_loaded"] else "no next kernel is loaded")
    if update is None:
        line("update", "none yet")
    else:
        line("update", course(update), f"{update['id']} ", update["state"])
    counted = ", ".join(f"{count} {state}" for state, count in sorted(reply["sessions"].items()))
    line("sessions", counted or "none")
    line("clients", f"{reply['clients']} connected")
    line("journal", f"{journal['path']}, {number(journal['rows'], 'record')}")
    for doubt in reply["in_doubt"]:
        line(
            "IN DOUBT",
            f"{doubt['key']}: settle it with `luoctl resolve {doubt['key']} done|absent|retry|give-up`",
        )


def course(update: Json) -> str:
    """Say in a few words how an update goes or went."""
    parts = [f"{count} {word}" for word, count in update["counts"].items() if count]
    if update["sessions"] and not parts:
        parts = [number(len(update["sessions"]), "session")]
    if update["dropped"]:
        parts.append(f"dropped {listed(update['dropped'])}")
    if update.get("unwritten"):
        parts.append(f"file systems not written back: {update['unwritten']}")
    if update["paused"] and update["state"] == "preparing":
        parts.append("waits for a person: `luoctl kexec` goes on, `luoctl abort` undoes it")
    elif update["reason"]:
        parts.append(update["reason"])
    return f": {', '.join(parts)}" if parts else ""


@click.command("sessions")
@json_option
@click.pass_obj
def sessions(socket: str, as_json: bool) -> None:
    """List all sessions that the journal knows, ended ones too."""
    with reach.connect(socket) as client:
        found = every(client.call, "SESSIONS", "sessions")
    if as_json:
        print_json({"sessions": found})
    else:
        session_table(found)


def session_table(rows: list[dict[str, Any]]) -> None:
    """Print sessions as a table, those with something to say followed by it."""
    if not rows:
        click.echo("No sessions.")
        return
    table(
        ("session", "state", "update", "policy", "uid", "holds", "since"),
        (
            (one["id"], one["state"], one["update"] or "-", one["policy"],
             one["owner"]["uid"] if one["owner"] else "-", holds(one), since(one))
            for one in rows
        ),
        right=("uid",),
    )  # fmt: skip
    for one in rows:
        notes = [one["reason"]] if one["reason"] else []
        notes += [f"in doubt: {key}" for key in doubts(one)]
        notes += [f"anomaly: {note}" for note in one["anomalies"]]
        for note in notes:
            own = f"{one['id']}: "
            click.echo(wrapped(note.removeprefix(own), first=clean(own), rest="  "))


def since(one: Json) -> str:
    """Return the time of the last change of state."""
    times = [int(at["wall_ns"]) for at in one["entered"].values()]
    return clock(max(times)) if times else "-"


def doubts(one: Json) -> list[str]:
    """Return the keys of the effects that have no outcome."""
    return [key for key, effect in one["effects"].items() if effect["status"] in ("intended", "unknown")]


@click.command("session")
@click.argument("id")
@json_option
@click.pass_obj
def session(socket: str, id: str, as_json: bool) -> None:
    """Show one session. ID is a session's (vm1.1) or a client's (vm1: its newest session)."""
    reply = reach.ask(socket, "SESSION", id=id)
    if as_json:
        print_json(reply)
    else:
        show_session(reply["session"])


def show_session(one: Json) -> None:
    """Print all there is to know of a session."""
    click.echo(f"{clean(one['id'])}  {tinted(one['state'])}")
    if one["reason"]:
        click.echo(wrapped(one["reason"], first="  because: ", rest="    "))
    owner = one["owner"]
    who = f"uid {owner['uid']}, gid {owner['gid']}, pid {owner['pid']}" if owner else "nobody known"
    for name, text in (
        ("client", f"{one['client']}, attempt {one['attempt']}, {one['policy']}"),
        ("owner", who),
        ("update", one["update"] or "none yet"),
        ("kernel", one["kernel_name"]),
    ):
        click.echo(wrapped(str(text), first=f"  {name:<8}", rest=" " * 10))
    _show_times(one["entered"])
    if one["resources"]:
        click.echo()
        table(
            ("token", "kind", "size", "label", "restore plan"),
            ((res["token"], res["kind"], size(res["size"]), res["label"] or "-", _plan(res, one["steps"])) for res in one["resources"]),
            right=("size",), indent=2,
        )  # fmt: skip
    show_effects(one["effects"])
    for note in one["anomalies"]:
        click.echo(wrapped(note, first="  anomaly: ", rest="    "))


def _plan(resource: Json, steps: Json) -> str:
    shown: list[str] = []
    for step in resource["plan"]:
        outcome = steps.get(f"{resource['token']}/{step['step']}")
        word = "open" if outcome is None else "ok" if outcome["ok"] else f"failed {outcome['errno']}".rstrip()
        shown.append(f"{step['step']}: {word}")
    return ", ".join(shown) or "-"


def _show_times(entered: Json) -> None:
    if not entered:
        return
    click.echo()
    before: Json | None = None
    rows: list[tuple[str, ...]] = []
    for state, at in sorted(entered.items(), key=lambda item: int(item[1]["wall_ns"])):
        took = duration((at["wall_ns"] - before["wall_ns"]) / 1e9) if before else ""
        boot = "new kernel" if before and before["boot_id"] != at["boot_id"] else ""
        rows.append((clock(at["wall_ns"]), state, took, boot))
        before = at
    table(("when", "state", "after", ""), rows, right=("after",), indent=2)


def show_effects(effects: Json) -> None:
    """Print effects, if there are any."""
    if effects:
        click.echo()
        table(
            ("effect", "what", "status", "how", "errno", "attempt"),
            (
                (key, one["kind"], "IN DOUBT" if one["status"] == "intended" else one["status"], one["how"] or "-",
                 one["errno"] or "-", one["attempt"])
                for key, one in effects.items()
            ),
            right=("attempt",), indent=2,
        )  # fmt: skip
