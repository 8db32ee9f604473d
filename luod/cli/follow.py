# SPDX-License-Identifier: Apache-2.0
"""Following an update to its end, through restarts of luod and through the kexec itself.

Progress goes to standard error: every event of the update as a line, and how many sessions have come how far; on a terminal the latter is
one line that changes.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click

from ..client import Client
from ..conversation import ConnectionLost, Timeout, TransportError
from ..states.errors import LuodError
from . import reach, sentences
from .printing import clean, clock

Json = dict[str, Any]
ENDS = frozenset({"done", "aborted", "lost"})
COUNTED = ("created", "preserved", "ready", "rebooting", "retrieved", "restored", "finished")
TOLD = frozenset({
    "session.nacked", "session.aborted", "session.lost", "session.failed", "session.expired", "session.retried",
})  # fmt: skip


class NotEnded(LuodError):
    """The time given for waiting is over."""


class Progress:
    """Tells people what happens to one update."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._live = sys.stderr.isatty()
        self._states: dict[str, str] = {}
        self._members: set[str] = set()
        self._reached: Counter[str] = Counter()
        self._shown = ""

    def line(self, text: str, wall_ns: int | None = None) -> None:
        """Print one line."""
        if self._quiet:
            return
        self._wipe()
        when = clock(time.time_ns() if wall_ns is None else wall_ns)
        click.echo(f"{when}  {clean(text)}", err=True)
        self._draw()

    def expect(self, sessions: Iterable[str]) -> None:
        """Say which sessions take part."""
        self._members = set(sessions)

    def record(self, record: Mapping[str, Any]) -> None:
        """Take in a record of the journal."""
        if self._quiet:
            return
        name, stream = sentences.event(record), str(record["stream"])
        if name in ("update.started", "update.armed"):
            self.expect(record["body"]["sessions"])
        kind, _, word = name.partition(".")
        if kind == "update" or name in TOLD:
            self.line(f"{stream}: {sentences.of(record)}", int(record["wall_ns"]))
        if kind == "effect" and record["body"].get("status") in ("failed", "unknown"):
            self.line(f"{stream}: {sentences.of(record)}", int(record["wall_ns"]))
        if kind == "session" and word in COUNTED:
            self._states[stream] = word
            self._reached[word] += 1
            if self._live:
                self._draw()
            elif self._reached[word] == len(self._members | set(self._states)):
                self.line(f"{word}: all {self._reached[word]}", int(record["wall_ns"]))

    def _draw(self) -> None:
        if not self._live or not self._states:
            return
        now = Counter(self._states.values())
        self._shown = "  " + ", ".join(f"{now[word]} {word}" for word in COUNTED if now[word])
        click.echo(f"\r\x1b[K{self._shown}", nl=False, err=True)

    def _wipe(self) -> None:
        if self._shown:
            click.echo("\r\x1b[K", nl=False, err=True)

    def close(self) -> None:
        """Leave the line that changes."""
        if self._shown:
            click.echo(err=True)
            self._shown = ""


def newest(client: Client) -> Json | None:
    """Return the newest update."""
    update: Json | None = client.call("STATUS").fields["update"]
    return update


class Follower:
    """Follows the newest update until `until` says that it has come far enough.

    `timeout_s` bounds everything, None means no limit. When luod goes away after the first answer it is awaited for `patience_s`
    (None: as long as the time lasts).
    """

    def __init__(
        self,
        socket: str,
        progress: Progress,
        *,
        timeout_s: float | None = None,
        patience_s: float | None = None,
        after: int | None = None,
    ) -> None:
        self._socket = socket
        self._progress = progress
        self._deadline = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        self._patience = float("inf") if patience_s is None else patience_s
        self._after = after
        self._reached = False

    def run(self, until: Callable[[Json], bool]) -> Json | None:
        """Return the update once it has come far enough, None when there is none.

        Raises `NotEnded` when the time is over first, and `TransportError` when luod cannot be reached.
        """
        last: Json | None = None
        gone = False
        while True:
            retry = None
            if self._reached:
                retry = min(self._deadline, time.monotonic() + self._patience)
            try:
                with reach.connect(self._socket, retry_until=retry) as client:
                    client.call("WATCH", after=self._after)
                    last = newest(client)
                    if last is not None and not until(last):
                        self._progress.expect(last["sessions"])
                        if self._after is None or gone:
                            self._progress.line(verdict(last))
                    self._reached, gone = True, False
                    while last is not None and not until(last):
                        self._next(client, last)
                        try:
                            last = newest(client)
                        except ConnectionLost:
                            self._last_words(client)
                            raise
                    return last
            except ConnectionLost:
                if time.monotonic() >= self._deadline:
                    raise
                if not gone:
                    self._progress.line("luod has gone; waiting for it to come back")
                gone = True

    def _last_words(self, client: Client) -> None:
        """Take in what luod still said before it went: the kexec comes right behind its last record."""
        while True:
            try:
                with client.next_event(0, names=["PROGRESS"]) as event:
                    record = event["record"]
            except TransportError:
                return
            self._after = max(self._after or 0, int(record["id"]))
            self._progress.record(record)

    def _next(self, client: Client, update: Json) -> None:
        """Take in records until the update may have changed."""
        while True:
            left = self._deadline - time.monotonic()
            try:
                with client.next_event(
                    None if left == float("inf") else max(left, 0), names=["PROGRESS"]
                ) as event:
                    record = event["record"]
            except Timeout:
                raise NotEnded(
                    f"{update['id']} is still {update['state']}",
                    hint="`luoctl status` shows what it waits for",
                ) from None
            self._after = max(self._after or 0, int(record["id"]))
            self._progress.record(record)
            if record["stream"] == update["id"] and not record["type"].startswith("effect."):
                return


def good(update: Json) -> bool:
    """Say whether an update has ended well: done, and no session of it lost or failed."""
    counts = update["counts"]
    return update["state"] == "done" and not counts.get("lost") and not counts.get("failed")


def verdict(update: Json) -> str:
    """Return how an update stands, as a sentence."""
    name, state = update["id"], update["state"]
    if state == "done":
        parts = [f"{count} {word}" for word, count in update["counts"].items() if count]
        return f"{name} is done: {', '.join(parts) or 'no sessions'}"
    if state == "aborted":
        return f"{name} was aborted: {update['reason']}"
    if state == "lost":
        return f"{name} is lost: {update['reason']}"
    return f"{name} is {state}"
