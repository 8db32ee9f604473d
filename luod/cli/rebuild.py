# SPDX-License-Identifier: Apache-2.0
"""A journal folded again, by the engine's own book, and shown in the shapes of the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from ..engine.book import Book
from ..journal.record import Record
from ..views import session_json, update_json
from .look import course, session_table
from .printing import clean, number, tinted, wrapped

Json = dict[str, Any]


def rebuild(records: Iterator[Record]) -> Json:
    """Fold records; return sessions and updates as STATUS and SESSIONS show them, with what is in doubt and what does not fit."""
    book, head, boot_id, run_id = Book(), 0, "", ""
    for record in records:
        book.apply(record)
        head, boot_id, run_id = record.id, record.boot_id, record.run_id
    updates = [update_json(one) for one in book.updates()]
    daemon = book.daemon()
    return {
        "head": head,
        "boot_id": boot_id,
        "run_id": run_id,
        "update": updates[-1] if updates else None,
        "updates": updates,
        "sessions": [session_json(one) for one in book.sessions()],
        "luod": {"state": daemon.state, "reason": daemon.reason, "box": bool(daemon.box_boot_id)},
        "in_doubt": [
            {"key": effect.key, "kind": effect.kind, "stream": stream, "status": effect.status}
            for stream, record in book.streams.items()
            for effect in record.doubts()
        ],
        "anomalies": [
            {"stream": stream, "text": text}
            for stream, record in book.streams.items()
            for text in record.anomalies
        ],
        "unknown": dict(book.unknown),
    }


def show(state: Json) -> None:
    """Print a folded journal for people."""
    click.echo(
        f"after record {state['head']}, boot {clean(state['boot_id']) or 'none'}: luod was {tinted(state['luod']['state'])}"
    )
    for update in state["updates"]:
        lead = f"{update['id']:<10}"
        word = update["state"]
        click.echo(
            wrapped(course(update), first=f"{lead}{tinted(word)}", plain_first=f"{lead}{word}", rest=" " * 10)
        )
    click.echo()
    session_table(state["sessions"])
    if state["in_doubt"]:
        click.echo(f"\n{number(len(state['in_doubt']), 'effect')} in doubt:")
        for one in state["in_doubt"]:
            status = "intended, no outcome" if one["status"] == "intended" else "outcome unknown"
            click.echo(wrapped(f"{one['key']} ({one['kind']}): {status}", first="  ", rest="    "))
    mine = [
        one for one in state["anomalies"] if one["stream"] not in {each["id"] for each in state["sessions"]}
    ]
    for one in mine:
        click.echo(wrapped(one["text"], first=f"{clean(one['stream'])}: anomaly: ", rest="  "))
