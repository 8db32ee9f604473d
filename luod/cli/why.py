# SPDX-License-Identifier: Apache-2.0
"""Why a session or an update ended as it did: its story in sentences, and the chain of what led to its end.

A record may name its cause. Most do not need to: what leads to what follows from the protocol between luod, its clients and the kernel,
and `_RULES` says it for every end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from ..engine.book import Book
from ..journal.record import Record
from ..states.errors import LuodError
from ..states.fold import Session, Update
from ..states.names import update_id
from ..states.table import SESSION, UPDATE
from ..views import record_json
from . import sentences
from .printing import clean, clock, day, listed, tinted, wrapped

Json = dict[str, Any]
END_EVENTS = frozenset({
    "finished", "aborted", "lost", "failed", "expired", "done", "refused", "nacked", "abort_requested", "disarmed",
})  # fmt: skip
MAX_CHAIN = 12


class UnknownStory(LuodError):
    """The journal knows nothing of this id."""

    code = "UNKNOWN_ID"


class Story:
    """The records of a journal, with what one needs to find in them."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.book = Book(records)
        self.all = [record_json(record) for record in records]
        self.by_id = {int(one["id"]): one for one in self.all}

    def find(self, name: str) -> Session | Update:
        """Return a session or an update by whatever it may be called. Raises `UnknownStory`."""
        stream = (
            update_id(int(name)) if name.isdigit() and update_id(int(name)) in self.book.streams else name
        )
        found = self.book.streams.get(stream) or self.book.of_client(name)
        if isinstance(found, Session | Update):
            return found
        known = [one for one, record in self.book.streams.items() if isinstance(record, Session | Update)]
        raise UnknownStory(
            f"the journal knows no session, client or update {name!r}",
            hint=f"it knows {', '.join(known[:6])}{' ...' if len(known) > 6 else ''}"
            if known
            else "it holds none at all",
        )

    def of(self, stream: str) -> list[Json]:
        """Return the records of a stream."""
        return [one for one in self.all if one["stream"] == stream]

    def before(self, record: Json, wanted: Callable[[Json], bool]) -> Json | None:
        """Return the last record before `record` that is wanted."""
        at = int(record["id"])
        return next((one for one in reversed(self.all) if one["id"] < at and wanted(one)), None)

    def cause(self, record: Json) -> Json | None:
        """Return what led to a record, as far as the journal can tell."""
        if record["cause"] is not None:
            return self.by_id.get(int(record["cause"]))
        rule = _RULES.get(sentences.event(record))
        return rule(self, record) if rule else None

    def chain(self, record: Json) -> list[Json]:
        """Return what led to a record, nearest first, as long as it is known."""
        found: list[Json] = []
        at = self.cause(record)
        while at is not None and at not in found and len(found) < MAX_CHAIN:
            found.append(at)
            at = self.cause(at)
        return found

    def attempts(self, subject: Session | Update) -> list[str]:
        """Return the other sessions of the same client."""
        client = subject.client if isinstance(subject, Session) else ""
        return [
            one.id for one in self.book.sessions() if one.client == client and client and one.id != subject.id
        ]

    def members(self, update: str) -> set[str]:
        """Return the sessions that took part in an update."""
        return {one.id for one in self.book.sessions() if one.update == update}


def explain(records: Sequence[Record], name: str) -> Json:
    """Tell the story of a session, a client's newest session or an update. Raises `UnknownStory`."""
    story = Story(records)
    subject = story.find(name)
    mine = story.of(subject.id)
    final = UPDATE.final if isinstance(subject, Update) else SESSION.final
    end = next((one for one in reversed(mine) if sentences.event(one).partition(".")[2] in END_EVENTS), None)
    chain = story.chain(end) if end else []
    return {
        "id": subject.id,
        "kind": "update" if isinstance(subject, Update) else "session",
        "state": str(subject.state),
        "ended": subject.state in final,
        "summary": summary(subject, ended=subject.state in final),
        "because": [_line(one, stream=True) for one in ([end] if end else []) + chain],
        "story": [_line(one) for one in mine if _telling(one)],
        "in_doubt": [effect.key for effect in subject.doubts()],
        "anomalies": list(subject.anomalies),
        "others": story.attempts(subject),
    }


def _line(record: Json, *, stream: bool = False) -> Json:
    line = {
        "record": record["id"], "wall_ns": record["wall_ns"], "boot_id": record["boot_id"], "type": record["type"],
        "text": sentences.of(record),
    }  # fmt: skip
    return {**line, "stream": record["stream"]} if stream else line


def _telling(record: Json) -> bool:
    """Say whether a record belongs into a story: of effects only those that did not go as they should."""
    name = sentences.event(record)
    if name == "effect.intended":
        return False
    if name == "effect.outcome":
        return record["body"].get("status") != "done" or record["body"].get("how") in ("adopted", "resolved")
    return True


def summary(subject: Session | Update, *, ended: bool) -> str:
    """Return in one sentence what became of a session or an update."""
    why = subject.reason or subject.abort_reason
    about = f": {why}" if why else ""
    if isinstance(subject, Update):
        counts = ", ".join(f"{count} {word}" for word, count in subject.counts.items() if count)
        if subject.state == "done":
            return f"{subject.id} is done: {counts or 'it had no sessions'}."
        waits = " and waits for a person" if subject.paused and subject.state == "preparing" else ""
        return f"{subject.id} is {subject.state}{waits}{about}."
    of = f" in {subject.update}" if subject.update else ""
    if subject.state == "finished":
        return f"{subject.id} went through{of} and is finished: its client has everything back."
    if not ended and not why:
        return f"{subject.id} is {subject.state}{of}; nothing has ended it."
    if subject.state == "failed":
        return f"{subject.id} has failed{of}{about}. Its fds are kept."
    return f"{subject.id} is {subject.state}{of}{about}."


# -- what leads to what

Rule = Callable[[Story, Json], Json | None]


def _same(*names: str) -> Rule:
    """The last of these events in the same stream."""
    return lambda story, record: story.before(
        record, lambda one: one["stream"] == record["stream"] and sentences.event(one) in names
    )


def _first(*rules: Rule) -> Rule:
    """The first rule that finds something."""

    def rule(story: Story, record: Json) -> Json | None:
        return next((found for one in rules if (found := one(story, record)) is not None), None)

    return rule


def _restart(story: Story, record: Json) -> Json | None:
    """The last start of luod, if it stands between this record and the one before it in its stream."""
    found = story.before(
        record, lambda one: one["stream"] == record["stream"] or sentences.event(one) == "daemon.started"
    )
    return found if found is not None and found["stream"] != record["stream"] else None


def _bad_effect(story: Story, record: Json) -> Json | None:
    """The last effect of the stream that did not succeed."""
    return story.before(
        record,
        lambda one: (
            one["stream"] == record["stream"]
            and sentences.event(one) == "effect.outcome"
            and one["body"].get("status") in ("failed", "unknown")
        ),
    )


def _reason(record: Json) -> str:
    body = record["body"]
    return str(body.get("reason") or body.get("cause") or "")


def _culprit(story: Story, record: Json) -> Json | None:
    """What in a session of the update made it be undone: the reason begins with the session's name."""
    named = _reason(record).partition(":")[0]
    streams = story.members(str(record["stream"]))
    if named not in streams:
        return None
    return story.before(
        record,
        lambda one: (
            one["stream"] == named
            and sentences.event(one)
            in ("session.nacked", "session.abort_requested", "session.aborted", "session.lost")
        ),
    )


def _refusal(story: Story, record: Json) -> Json | None:
    """The kexec that the kernel refused, if the reason says so."""
    return (
        _same("update.refused")(story, record) if _reason(record).startswith("the kernel refused") else None
    )


def _of_update(story: Story, record: Json) -> Json | None:
    """The undoing of the update that the session took part in, if it was for the same reason."""
    session = story.book.session(str(record["stream"]))
    if session is None or not session.update:
        return None
    return story.before(
        record,
        lambda one: (
            one["stream"] == session.update
            and sentences.event(one) == "update.abort_requested"
            and _reason(one) == _reason(record)
        ),
    )


def _last_end(story: Story, record: Json) -> Json | None:
    """The session whose end was the last of the update."""
    ends = {"session.finished", "session.lost", "session.failed", "session.expired"}
    streams = story.members(str(record["stream"]))
    return story.before(record, lambda one: one["stream"] in streams and sentences.event(one) in ends)


_RULES: dict[str, Rule] = {
    "update.done": _last_end,
    "update.aborted": _same("update.abort_requested"),
    "update.abort_requested": _first(_culprit, _refusal, _bad_effect),
    "update.refused": _bad_effect,
    "update.lost": _restart,
    "update.disarmed": _restart,
    "session.finished": _same("session.restored"),
    "session.aborted": _first(_same("session.abort_requested"), _restart),
    "session.abort_requested": _first(_of_update, _same("session.nacked"), _bad_effect),
    "session.failed": _same("session.step"),
    "session.lost": _first(_bad_effect, _restart),
    "session.expired": _same("session.rebooting"),
}


def show(story: Json) -> None:
    """Print a story for people."""
    click.echo(wrapped(story["summary"]))
    if story["because"]:
        click.echo("\nWhat led to it, the last first:")
        for one in story["because"]:
            click.echo(_told(one, f"{clean(one['stream'])}: {one['text']}"))
    click.echo("\nThe story:")
    boot = today = ""
    for one in story["story"]:
        if boot and one["boot_id"] != boot:
            click.echo(f"  -- another kernel: boot {clean(one['boot_id'])}")
        if day(one["wall_ns"]) != today:
            today = day(one["wall_ns"])
            click.echo(f"  -- {today}")
        boot = one["boot_id"]
        click.echo(_told(one, one["text"]))
    for key in story["in_doubt"]:
        click.echo(f"{tinted('unknown', 'in doubt')}: {clean(key)}")
    for note in story["anomalies"]:
        click.echo(wrapped(note, first="anomaly: ", rest="  "))
    if story["others"]:
        click.echo("\n" + wrapped(f"Other sessions of this client: {listed(story['others'])}."))


def _told(line: Json, text: str) -> str:
    return wrapped(text, first=f"  {clock(line['wall_ns'])}  [{line['record']:>4}]  ", rest=" " * 24)
